"""The best pairs of all features, within a model too: the "optimal" matching of ZipIt!'s ablation.

ZipIt! (Stoica et al., ICLR 2024, arXiv 2305.03053) compares its greedy matching with the exact one: of all ways to
join the 2n features of two models in n pairs, whichever model they come from, the one with the greatest Σ S[i, j], a
matching of maximum weight in the complete graph (Edmonds 1965). The greedy one is nearly as good and much faster, and
may also let clusters grow beyond pairs.

To keep m of N features, N - m pairs are joined and 2m - N features stay alone: with so many places for lone features
added to the graph, each joined to every feature at weight 0, the best perfect matching is the best of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import torch
from torch import Tensor

from ...errors import OptionError
from ..clusters import in_first_layout
from ..merge import Merge, cluster_merge
from ..method import SpaceMethod
from ..moments import Moments
from ..similarities import similarity


@dataclass(frozen=True)
class Optimal(SpaceMethod):
    """Pairs of features with the greatest total similarity, within and across two models.

    >>> from fxzip.matching.moments import moments
    >>> x = torch.randn(99, 2)
    >>> Optimal()(moments([x[:, [0, 0]], x[:, [1, 1]]])).labels()
    tensor([0, 0, 1, 1])

    O(N³) time, in Python: a second for N = 128 features, ten for 256, minutes for 512. For comparisons on small spaces.
    """

    name: ClassVar[str] = "optimal"

    def __call__(self, moments: Moments, size: int | None = None) -> Merge:
        """The merge to `size` features, those of the first model by default.

        Raises:
            OptionError: `size` is less than half of the features, or more than all of them.
            DataError: nothing was observed, or the moments are not finite.
        """
        total, kept = sum(moments.sizes), moments.sizes[0] if size is None else size
        if not total <= 2 * kept <= 2 * total:
            raise OptionError(
                f"`optimal` joins features in pairs: of the {total} features it keeps {-(-total // 2)} to {total}; got "
                f'`size` {kept}. Use `method="zip"`.'
            )
        alike = similarity(moments)
        return cluster_merge(in_first_layout(_best_pairs(alike, kept), moments.sizes), moments.sizes, alike)


def _best_pairs(alike: Tensor, kept: int) -> Tensor:
    """The pair that each feature is in, or its own number where it stays alone: 0 to `kept` - 1, int64 [N].

    >>> _best_pairs(torch.tensor([[1.0, 0.1, 0.9], [0.1, 1.0, 0.0], [0.9, 0.0, 1.0]]), 2)
    tensor([0, 1, 0])
    """
    total, rows = len(alike), alike.cpu().tolist()
    graph = nx.Graph()
    graph.add_weighted_edges_from((i, j, rows[i][j]) for i in range(total) for j in range(i))
    graph.add_weighted_edges_from((i, j, 0.0) for i in range(total) for j in range(total, 2 * kept))
    labels = torch.empty(total, dtype=torch.int64, device=alike.device)
    for number, pair in enumerate(sorted(map(sorted, nx.max_weight_matching(graph, maxcardinality=True)))):
        labels[[i for i in pair if i < total]] = number
    return labels

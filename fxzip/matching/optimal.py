"""The best pairs of all features, within a model too: the "optimal" matching of ZipIt!'s ablation.

ZipIt! (Stoica et al., ICLR 2024, arXiv 2305.03053) compares its greedy matching with the exact one: of all ways to
join the 2n features of two models in n pairs, whichever model they come from, the one with the greatest Σ S[i, j], a
matching of maximum weight in the complete graph (Edmonds 1965). The greedy one is nearly as good and much faster, and
may also let clusters grow beyond pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import torch

from fxzip.errors import InputError
from fxzip.matching.merge import Merge, cluster_merge, in_first_layout, similarity
from fxzip.matching.permute import Permute
from fxzip.moments import Moments


@dataclass(frozen=True)
class Optimal:
    """Pairs of features with the greatest total similarity, within and across two models.

    >>> from fxzip.moments import moments
    >>> x = torch.randn(99, 2)
    >>> Optimal()(moments([x[:, [0, 0]], x[:, [1, 1]]])).labels()
    tensor([0, 0, 1, 1])

    O(N³) time, in Python: a second for N = 128 features, ten for 256, minutes for 512. For comparisons on small spaces.
    """

    name: ClassVar[str] = "optimal"

    def __call__(self, moments: Moments, size: int | None = None) -> Merge:
        """The merge to half of the features.

        Raises:
            InputError: the features to keep are not half of those there are.
            DataError: nothing was observed, or the moments are not finite.
        """
        total, kept = sum(moments.sizes), moments.sizes[0] if size is None else size
        if total != 2 * kept:
            raise InputError(
                f"`optimal` joins features in pairs, so it keeps half of them; got {total} features and `size` {kept}. "
                'Use `method="zip"`.'
            )
        alike = similarity(moments)
        rows = alike.cpu().tolist()
        graph = nx.Graph()
        graph.add_weighted_edges_from((i, j, rows[i][j]) for i in range(total) for j in range(i))
        labels = torch.empty(total, dtype=torch.int64)
        for number, (i, j) in enumerate(sorted(map(sorted, nx.max_weight_matching(graph, maxcardinality=True)))):
            labels[i] = labels[j] = number
        return cluster_merge(in_first_layout(labels.to(alike.device), moments.sizes), moments.sizes, alike)

    def relabelling(self) -> Permute:
        """`Permute`."""
        return Permute()

"""Two other clusterings: k-means and hierarchical, from the same similarities as the greedy matching.

Standardised features are points z with <z_i, z_j> = S_ij, their correlation, so |z_i - z_j|² = 2 - 2 S_ij, and both
clusterings can be had from S alone. They are alternatives to the greedy loop of ZipIt! (Stoica et al., ICLR 2024,
arXiv 2305.03053); some of their clusters may grow large, which averaging does not forgive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from ...errors import OptionError
from ..clusters import in_first_layout, kept
from ..merge import Merge, cluster_merge
from ..method import SpaceMethod
from ..moments import Moments
from ..similarities import similarity

LINKAGES = ("average", "complete", "single")


@dataclass(frozen=True)
class KMeans(SpaceMethod):
    """Lloyd's algorithm on standardised features, from the first model's features as centres.

    >>> from fxzip.matching.moments import moments
    >>> x = torch.randn(99, 3)
    >>> KMeans()(moments([x, x[:, [2, 0, 1]]])).assignment(1)
    tensor([2, 0, 1])

    Minimises Σ_clusters Σ_members |z - mean|², locally. A cluster that loses all its members takes the feature that is
    farthest from its own centre. O(rounds · N²) for N features.

    Attributes:
        rounds: most passes; it usually settles in a few.
    """

    name: ClassVar[str] = "kmeans"

    rounds: int = 100

    def __call__(self, moments: Moments, size: int | None = None) -> Merge:
        """The merge of N features of K models to `size` features, by default those of the first model.

        Raises:
            OptionError: `size` is not between 1 and N.
            DataError: nothing was observed, or the moments are not finite.
        """
        alike = similarity(moments)
        size = kept(size, moments, self.name)
        labels = torch.arange(len(alike), device=alike.device).clamp(max=size - 1)
        labels[size:] = alike[size:, :size].argmax(1)

        for _ in range(self.rounds):
            distance = _distances(alike, labels, size)
            new = distance.argmin(1)
            own = distance.gather(1, new[:, None])[:, 0]
            for empty in (torch.bincount(new, minlength=size) == 0).nonzero().flatten().tolist():
                crowded = torch.bincount(new, minlength=size)[new] > 1
                far = int(torch.where(crowded, own, -torch.inf).argmax())
                new[far], own[far] = empty, 0.0
            if torch.equal(new, labels):
                break
            labels = new

        return cluster_merge(in_first_layout(labels, moments.sizes), moments.sizes, alike)


def _distances(alike: Tensor, labels: Tensor, size: int) -> Tensor:
    """|z_i - mean of cluster c|² less what does not depend on c: [N, size]."""
    member = torch.zeros(len(alike), size, dtype=alike.dtype, device=alike.device)
    member[torch.arange(len(alike), device=alike.device), labels] = 1
    mean = member / member.sum(0)
    reach = alike @ mean
    return (mean * reach).sum(0) - 2 * reach


@dataclass(frozen=True)
class Agglomerative(SpaceMethod):
    """Hierarchical clustering: again and again the two clusters whose members are most alike on average.

    >>> from fxzip.matching.moments import moments
    >>> x = torch.randn(99, 3)
    >>> Agglomerative()(moments([x, x[:, [2, 0, 1]]])).assignment(1)
    tensor([2, 0, 1])

    With "complete" linkage it is ZipIt!'s greedy matching with α = 1 and no budget for merges within a model.
    O(N²) memory, O(N²) time (scipy).

    Attributes:
        linkage: how alike clusters are: "average" (mean over pairs of members), "complete" (the least), "single".
    """

    name: ClassVar[str] = "agglomerative"

    linkage: str = "average"

    def __post_init__(self) -> None:
        if self.linkage not in LINKAGES:
            raise OptionError(f"`linkage` must be one of {', '.join(map(repr, LINKAGES))}; got {self.linkage!r}.")

    def __call__(self, moments: Moments, size: int | None = None) -> Merge:
        """The merge of N features of K models to `size` features, by default those of the first model.

        Raises:
            OptionError: `size` is not between 1 and N.
            DataError: nothing was observed, or the moments are not finite.
        """
        alike = similarity(moments)
        size = kept(size, moments, self.name)
        if len(alike) == 1:
            return Merge.identity(1, 1)
        distance = (1 - (alike + alike.T) / 2).clamp(min=0).fill_diagonal_(0).cpu().numpy()
        tree = linkage(squareform(distance, checks=False), self.linkage)
        labels = _cut(tree[: len(alike) - size, :2], len(alike)).to(alike.device)
        return cluster_merge(in_first_layout(labels, moments.sizes), moments.sizes, alike)


def _cut(joins: Any, count: int) -> Tensor:
    """The cluster of each of `count` points after some joins of clusters, as scipy lists them."""
    labels = torch.arange(count, device="cpu")
    for number, pair in enumerate(joins.astype(int).tolist()):
        labels[torch.isin(labels, torch.tensor(pair, device="cpu"))] = count + number
    return labels

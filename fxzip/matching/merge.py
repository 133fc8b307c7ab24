"""The change of basis that a method finds for one feature space, and how it is built from clusters.

Model k has n_k features x_k in this space; x = (x_1, ..., x_K) stacks them, N = Σ n_k. Merging keeps m features,

    x* = M x        M  [m, N]   merge matrix, rows are weighted means (they sum to 1)
    x  ≈ U x*       U  [N, m]   unmerge matrix

and a linear call with weight W_k in model k becomes  W* = Σ_k M_k W_k U_k  (ZipIt!, arXiv 2305.03053, section 3).
Where clusters partition the features, U is their 0/1 membership and M = U⁺ the mean over the members: for this U it
is the M that reconstructs all features of all models at the least squared error, and M U = I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .moments import Moments
from .similarities import mean_similarity, similarity


class Entries(NamedTuple):
    """The entries of a sparse matrix that are not zero, each [entries]."""

    rows: Tensor
    columns: Tensor
    weights: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Entries:
        """Those of a dense matrix.

        >>> Entries.of(torch.tensor([[0.0, 2.0]])).columns
        tensor([1])
        """
        rows, columns = matrix.nonzero().T
        return cls(rows, columns, matrix[rows, columns])

    @property
    def T(self) -> Entries:
        """Those of the transposed matrix."""
        return Entries(self.columns, self.rows, self.weights)


@dataclass(frozen=True, eq=False)
class Merge:
    """Change of basis of one feature space for K models: x* = M x, x ≈ U x*.

    >>> merge = Merge.from_clusters(torch.tensor([0, 1, 1, 0]), sizes=(2, 2))
    >>> merge.M(1)
    tensor([[0.0000, 0.5000],
            [0.5000, 0.0000]], dtype=torch.float64)
    >>> merge.assignment(1)
    tensor([1, 0])

    Attributes:
        merge: M, float64 [m, N], N = Σ n_k; each row is a weighted mean (sums to 1).
        unmerge: U, float64 [N, m].
        sizes: (n_1, ..., n_K).
        correlation: how alike the merged features are: over the clusters with at least two members, the mean of the
            mean pairwise similarity of their members (see `similarity`). 1.0 where no cluster has two members, or
            where nothing was observed.
    """

    merge: Tensor
    unmerge: Tensor
    sizes: tuple[int, ...]
    correlation: float

    @classmethod
    def from_clusters(cls, labels: Tensor, sizes: Sequence[int], moments: Moments | None = None) -> Merge:
        """The merge that averages each cluster and copies it back to its members.

        >>> Merge.from_clusters(torch.tensor([0, 1, 0]), sizes=(2, 1)).merge
        tensor([[0.5000, 0.0000, 0.5000],
                [0.0000, 1.0000, 0.0000]], dtype=torch.float64)

        Args:
            labels: int64 [N], cluster of every feature; every id in 0..m-1 occurs. Cluster i becomes merged feature i.
            sizes: (n_1, ..., n_K) with Σ n_k = N.
            moments: what was observed, for `correlation`.

        Raises:
            InputError: `labels` and `sizes` do not fit, or a cluster id has no member.
        """
        alike = None if moments is None or moments.count == 0 else similarity(moments)
        return cluster_merge(labels, sizes, alike)

    @classmethod
    def identity(
        cls, n: int, models: int, moments: Moments | None = None, weights: Sequence[float] | None = None
    ) -> Merge:
        """Feature i of every model merges with feature i of all others.

        >>> Merge.identity(2, models=2).M(0)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
        >>> Merge.identity(1, models=2, weights=(3, 1)).merge
        tensor([[0.7500, 0.2500]], dtype=torch.float64)

        `weights`: of the models, positive; only their ratios count.
        """
        device = torch.device("cpu") if moments is None else moments.outer.device
        even = cls.from_clusters(torch.arange(n, device=device).repeat(models), (n,) * models, moments)
        if weights is None:
            return even
        shares = torch.tensor(weights, dtype=torch.float64, device=device) / sum(weights)
        return replace(even, merge=even.unmerge.T * shares.repeat_interleave(n))

    @property
    def size(self) -> int:
        """How many features are kept, m.

        >>> Merge.from_clusters(torch.tensor([0, 1, 1]), sizes=(2, 1)).size
        2
        """
        return self.merge.shape[0]

    def M(self, k: int) -> Tensor:
        """Columns of the merge matrix that belong to model k, [m, n_k].

        >>> Merge.identity(3, models=2).M(1).shape
        torch.Size([3, 3])
        """
        start = sum(self.sizes[:k])
        return self.merge[:, start : start + self.sizes[k]]

    def U(self, k: int) -> Tensor:
        """Rows of the unmerge matrix that belong to model k, [n_k, m].

        >>> Merge.from_clusters(torch.tensor([0, 1, 1]), sizes=(2, 1)).U(1)
        tensor([[0., 1.]], dtype=torch.float64)
        """
        start = sum(self.sizes[:k])
        return self.unmerge[start : start + self.sizes[k]]

    @cached_property
    def entries(self) -> tuple[tuple[Entries, ...], tuple[Entries, ...]]:
        """Those of M_k, and those of U_k, for each model; found once, for every parameter needs them."""
        models = range(len(self.sizes))
        return tuple(Entries.of(self.M(k)) for k in models), tuple(Entries.of(self.U(k)) for k in models)

    def check_averages(self, space: str) -> None:
        """Rows of M must be weighted means: scales and variances take M alone, and what is no mean of the models'
        variances is no variance.

        >>> Merge.identity(2, models=2).check_averages("0.weight")

        Raises:
            InputError: a row has an entry below zero, or another sum than 1.
        """
        sums, least = self.merge.sum(1), float(self.merge.min())
        if least >= 0 and bool(((sums - 1).abs() < 1e-6).all()):
            return

        raise InputError(
            "Every merged feature must be a weighted mean: rows of `Merge.merge` have no entry below 0 and sum to 1; "
            f"in the space of `{space}` the least entry is {least:.3g}, and sums run from {float(sums.min()):.3g} to "
            f"{float(sums.max()):.3g}. Divide each row by its sum, or put what is no mean into `Merge.unmerge`, which "
            "may be any matrix."
        )

    def assignment(self, k: int) -> Tensor | None:
        """U_k as a gather: x_k ≈ x*[assignment]. int64 [n_k]; None where a row of U_k is more than a single 1.

        >>> Merge.from_clusters(torch.tensor([0, 1, 1, 1]), sizes=(2, 2)).assignment(1)
        tensor([1, 1])
        """
        return gather_index(self.U(k))

    def bijective(self, k: int) -> bool:
        """Whether U_k is a permutation matrix: model k keeps all its features apart and fills every slot.

        >>> merge = Merge.from_clusters(torch.tensor([0, 1, 1, 1]), sizes=(2, 2))
        >>> merge.bijective(0), merge.bijective(1)
        (True, False)
        """
        index, m = self.assignment(k), self.merge.shape[0]
        return index is not None and len(index) == m and len(index.unique()) == m

    @cached_property
    def by_position(self) -> bool:
        """Whether feature i of every model is merged feature i, and there are no others.

        >>> Merge.identity(2, models=3).by_position, Merge.from_clusters(torch.tensor([0, 1, 1, 0]), (2, 2)).by_position
        (True, False)
        """
        labels, n = self.labels(), self.sizes[0]
        if labels is None or any(own != n for own in (self.size, *self.sizes)):
            return False
        return torch.equal(labels, torch.arange(n, device=labels.device).repeat(len(self.sizes)))

    def labels(self) -> Tensor | None:
        """The cluster of every feature, int64 [N]; None where U is more than a membership.

        >>> Merge.identity(2, models=2).labels()
        tensor([0, 1, 0, 1])
        """
        return gather_index(self.unmerge)


def cluster_merge(labels: Tensor, sizes: Sequence[int], alike: Tensor | None) -> Merge:
    """`Merge.from_clusters` for a similarity [N, N] that is at hand already.

    >>> cluster_merge(torch.tensor([0, 0]), (1, 1), torch.full((2, 2), 0.25)).correlation
    0.25
    """
    sizes = tuple(sizes)
    if len(labels) != sum(sizes):
        raise InputError(f"`labels` must hold one cluster per feature: {len(labels)} labels for sizes {sizes}.")

    counts = torch.bincount(labels)
    if (counts == 0).any():
        empty = int((counts == 0).nonzero()[0])
        raise InputError(f"Cluster ids must run from 0 without a gap; of {len(counts)} ids, {empty} has no member.")

    index = torch.arange(len(labels), device=labels.device)
    merge = torch.zeros(len(counts), len(labels), dtype=torch.float64, device=labels.device)
    merge[labels, index] = 1 / counts[labels].double()
    unmerge = torch.zeros(len(labels), len(counts), dtype=torch.float64, device=labels.device)
    unmerge[index, labels] = 1
    correlation = 1.0 if alike is None else mean_similarity(labels, alike)

    return Merge(merge, unmerge, sizes, correlation)


def gather_index(unmerge: Tensor) -> Tensor | None:
    """The column of the single 1 in every row of a membership matrix, else None."""
    membership = bool(((unmerge == 0) | (unmerge == 1)).all()) and bool((unmerge.sum(1) == 1).all())
    return unmerge.argmax(1) if membership else None

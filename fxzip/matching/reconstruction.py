"""What merging and unmerging loses of the variance of features, before any refit."""

from __future__ import annotations

from torch import Tensor

from .merge import Merge
from .moments import Moments

_STILL = 1e-12  # of the second moment: below that, variance is rounding
_SPARSE = 0.05
"""The share of entries that are not zero up to which a sparse product takes less time."""


def unexplained_share(merge: Merge, moments: Moments, unmerge: Tensor | None = None) -> list[float | None]:
    """For each model the share of its features' variance that x ≈ U M x misses, None where they do not vary.

    `unmerge`: another U, [N, m].

    >>> import torch
    >>> from fxzip.matching.moments import moments
    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> same = Merge.identity(2, models=2)
    >>> unexplained_share(same, moments([x, x])), unexplained_share(same, moments([x, x.flip(1)]))
    ([0.0, 0.0], [0.5, 0.5])
    """
    count, mean, outer = max(moments.count, 1.0), moments.mean.cpu(), moments.outer.cpu()
    merging, copying = (_compact(own.cpu()) for own in (merge.merge, merge.unmerge if unmerge is None else unmerge))
    carried = (merging @ outer / count).addr_(merging @ mean, mean, alpha=-1)  # M C, without a copy of C
    both = merging @ carried.T  # M C Mᵀ
    crossed = (copying * carried.T).sum(1).to_dense()  # diagonal of U M C
    kept = (copying * (copying @ both)).sum(1).to_dense()  # diagonal of U M C Mᵀ Uᵀ
    whole = (outer.diagonal() / count - mean.square()).clamp(min=0)
    left = whole - 2 * crossed + kept
    still = _STILL * outer.diagonal() / count
    parts = zip(*(values.split(list(merge.sizes)) for values in (left, whole, still)), strict=True)
    return [
        max(float(own.sum() / alone.sum()), 0.0) if float(alone.sum()) > float(rounding.sum()) else None
        for own, alone, rounding in parts
    ]


def _compact(matrix: Tensor) -> Tensor:
    """Means over clusters, and copies, as sparse matrices."""
    return matrix.to_sparse() if int(matrix.count_nonzero()) < _SPARSE * matrix.numel() else matrix

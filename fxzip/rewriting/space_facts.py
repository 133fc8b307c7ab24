"""What a report says of every feature space: how many features it keeps, how alike they are, and what merging loses.

The error of a space is, for each model, the share of its features' variance that merging and unmerging loses. With C
the covariance of all features x, and R = I - U M, it is tr (R C Rᵀ)_kk / tr C_kk: 0 where the merged features tell
all. A refit mends what weights can mend; this is what it starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..matching import Merge
from ..matching.moments import Moments
from .zip_plan import ZipPlan

_STILL = 1e-12  # of the second moment: below that, variance is rounding
_SPARSE = 0.05
"""The share of entries that are not zero up to which a sparse product takes less time."""


def space_facts(plan: ZipPlan, statistics: Mapping[int, Moments]) -> list[dict[str, Any]]:
    """Of every space of the trunk, plain values; `statistics` by the number of the space."""
    trunk = plan.trunk
    return [
        {
            "name": space.name, "size": space.size, "kept": plan.merges[number].size,
            "sizes": list(trunk.sizes(number)), "legality": space.legality, "reason": space.reason,
            "correlation": None if number in plan.unobserved else round(plan.merges[number].correlation, 4),
            "error": _errors(plan, number, statistics.get(number)),
            "folded": [number in folded for folded in plan.folded],
        }
        for number, space in enumerate(trunk.spaces[0].spaces)
    ]  # fmt: skip


def narrowed_facts(plan: ZipPlan, k: int, statistics: Mapping[int, Moments]) -> list[dict[str, Any]]:
    """Of every space of head k that keeps fewer features, plain values."""
    own = plan.heads.get(k)
    if own is None:
        return []
    spaces = own.trunk.spaces[0].spaces
    return [
        {
            "name": spaces[s].name, "size": spaces[s].size, "kept": kept,
            "error": None if (found := _errors(own, s, statistics.get(s))) is None else found[0],
        }
        for s, kept in own.kept.items()
    ]  # fmt: skip


def _errors(plan: ZipPlan, number: int, moments: Moments | None) -> list[float | None] | None:
    """For each model the share of the variance of a space that its head does not get back; None if nothing was seen."""
    if moments is None or not moments.count:
        return None
    merge = plan.merges[number]
    unmerge = torch.cat([plan.U(number, k) for k in range(len(merge.sizes))])
    return [None if error is None else round(error, 4) for error in lost(merge, moments, unmerge)]


def lost(merge: Merge, moments: Moments, unmerge: Tensor | None = None) -> list[float | None]:
    """For each model the share of its features' variance that x ≈ U M x misses, None where they do not vary.

    `unmerge`: another U, [N, m].

    >>> from fxzip.matching.moments import moments
    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> lost(Merge.identity(2, models=2), moments([x, x])), lost(Merge.identity(2, models=2), moments([x, x.flip(1)]))
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

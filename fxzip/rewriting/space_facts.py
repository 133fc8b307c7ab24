"""What a report says of every feature space: how many features it keeps, how alike they are, and what merging loses.

The error of a space is, for each model, the share of its features' variance that merging and unmerging loses. With C
the covariance of all features x, and R = I - U M, it is tr (R C Rᵀ)_kk / tr C_kk: 0 where the merged features tell
all. A refit mends what weights can mend; this is what it starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..matching.moments import Moments
from ..matching.reconstruction import unexplained_share
from .zip_plan import ZipPlan


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
    return [None if error is None else round(error, 4) for error in unexplained_share(merge, moments, unmerge)]

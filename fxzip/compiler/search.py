"""`until="auto"`: the deepest cut that is good enough, the earliest that is cheap enough, or the best at a cost.

Sharing more costs less and agrees less. Agreement falls nearly monotonically from cut to cut, so bisection finds where
it crosses the bound: one evaluation of the full trunk, and if that does not do, log₂ of the number of cuts more.

With widths by need every cut may cost the same: an early one keeps few features in the heads, or in the trunk where
heads stay as they are, a late one keeps many. Agreement then has one broad maximum along the row: six cuts evenly along
it, then those halfway between the best and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..calibration.holdout import HeldOut
from ..errors import CostError, CutError
from ..partition.cut_points import Cut
from ..rewriting.module import ZippedModule
from ..rewriting.report import Report
from .session import Candidate

Build = Callable[[Candidate], ZippedModule]
"""Zips at a cut."""

_COARSE = 6


def deepest(count: int, passes: Callable[[int], bool]) -> int:
    """The last of `count` cuts that passes, -1 for none, if all before one that passes do.

    >>> asked = []
    >>> deepest(10, lambda place: asked.append(place) or place <= 6), asked
    (6, [9, 4, 6, 7])
    """
    if count == 0 or passes(count - 1):
        return count - 1
    low, high = -1, count - 1
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            low = middle
        else:
            high = middle
    return low


def deepest_agreeing(candidates: Sequence[Candidate], build: Build, held: HeldOut, minimum: float) -> ZippedModule:
    """The zip of the deepest cut every head of which agrees on `minimum` of the held-out inputs.

    `zipped.report["auto"]` holds the cut, the agreement of the heads, and every cut that was tried with what it costs.

    Raises:
        CutError: none does.
    """
    cuts = [candidate.cut for candidate in candidates]
    tried: dict[int, tuple[float, ...]] = {}
    costs: dict[int, float] = {}
    best: list[ZippedModule] = []

    def passes(place: int) -> bool:
        zipped = build(candidates[place])
        tried[place], costs[place] = held.agreement(zipped), zipped.report.cost
        if min(tried[place]) < minimum:
            return False
        best[:] = [zipped]
        return True

    place = deepest(len(cuts), passes)
    evaluations = {cuts[i].until: min(heads) for i, heads in tried.items()}
    if place < 0:
        first = min(tried)
        raise CutError(
            f'`until="auto"` needs a cut whose heads all agree with the originals on {minimum} of the held-out inputs; '
            f"the earliest of {len(cuts)}, {cuts[first].until!r}, reaches {min(tried[first]):.3f}. Lower "
            '`min_agreement`, pass more `data`, try `refit="lstsq"`, or keep the models apart with '
            "`fxzip.side_by_side`."
        )
    heads = ", ".join(f"{value:.3f}" for value in tried[place])
    note = (
        f'`until="auto"` chose {_place(cuts[place])} of {len(cuts)} cuts by {len(tried)} evaluations: the heads agree '
        f"on {heads} of {held.size} held-out inputs, on which nothing was fitted"
    )
    values = {"until": cuts[place].until, "agreement": tried[place], "held_out": held.size, "evaluations": evaluations}
    return _noted(best[0], {**values, "frontier": _frontier(cuts, tried, costs)}, note)


def earliest_affordable(candidates: Sequence[Candidate], build: Build, limit: float) -> ZippedModule:
    """The zip of the earliest cut that costs at most `limit`: of those, the one that shares least.

    Raises:
        CutError: even the full trunk costs more.
    """
    cuts = [candidate.cut for candidate in candidates]
    first = next((i for i, cut in enumerate(cuts) if cut.cost <= limit), len(cuts) - 1)
    for place in range(first, len(cuts)):  # unmerging may cost a little more than a cut lets expect
        zipped = build(candidates[place])
        flops = zipped.report["flops"]
        cost = flops["total"] / flops["originals"][0]
        if cost <= limit:
            note = f'`until="auto"` chose {_place(cuts[place])} of {len(cuts)} cuts: cost {cost:.3f} of at most {limit}'
            return _noted(zipped, {"until": cuts[place].until, "cost": cost}, note)
    raise CutError(
        f"`max_cost={limit}` must be in reach; the zip that shares most, up to the heads, costs {cost:.3f} times the "
        f"first model. Pass at least `max_cost={cost + 0.005:.2f}`."
    )


def best_agreeing(candidates: Sequence[Candidate], build: Build, held: HeldOut, limit: float) -> ZippedModule:
    """The zip of the cut whose heads agree best on average, of some; every zip takes at most `limit` by its widths.

    Raises:
        CutError: at none of the cuts tried a zip can be had at that cost.
    """
    cuts = [candidate.cut for candidate in candidates]
    tried: dict[int, tuple[float, ...]] = {}
    costs: dict[int, float] = {}
    best: list[tuple[float, int, ZippedModule]] = []

    def attempt(place: int) -> None:
        if place in tried:
            return
        try:
            zipped = build(candidates[place])
        except CostError:
            tried[place] = ()
            return
        tried[place], costs[place] = held.agreement(zipped), zipped.report.cost
        score = sum(tried[place]) / len(tried[place])
        if not best or (score, place) > best[0][:2]:
            best[:] = [(score, place, zipped)]

    last = len(cuts) - 1
    coarse = sorted({round(last * i / (_COARSE - 1)) for i in range(_COARSE)})
    for place in coarse:
        attempt(place)
    if not best:
        raise CutError(
            f"`max_cost={limit}` must be in reach; what has to keep its size takes more at each of {len(cuts)} cuts. "
            "Raise it."
        )
    middle = best[0][1]
    for place in (coarse[i] for i in (coarse.index(middle) - 1, coarse.index(middle) + 1) if 0 <= i < len(coarse)):
        attempt((place + middle) // 2)
    _, place, zipped = best[0]
    cost = costs[place]
    heads = ", ".join(f"{value:.3f}" for value in tried[place])
    evaluations = {cuts[i].until: min(found) for i, found in sorted(tried.items()) if found}
    note = (
        f'`until="auto"` chose {_place(cuts[place])} of {len(cuts)} cuts by {len(evaluations)} evaluations: cost '
        f"{cost:.3f} of at most {limit}, the heads agree on {heads} of {held.size} held-out inputs, on which nothing "
        "was fitted"
    )
    values = {"until": cuts[place].until, "cost": cost, "agreement": tried[place], "held_out": held.size}
    return _noted(zipped, {**values, "evaluations": evaluations, "frontier": _frontier(cuts, tried, costs)}, note)


def _frontier(
    cuts: Sequence[Cut], tried: dict[int, tuple[float, ...]], costs: dict[int, float]
) -> list[dict[str, Any]]:
    """Every zip that was tried: its cut, its cost relative to the first model, the agreement of its heads."""
    return [
        {"until": cuts[place].until, "cost": costs[place], "agreement": list(tried[place])} for place in sorted(costs)
    ]


def exactly_shared(zipped: ZippedModule, until: str) -> ZippedModule:
    """The zip of the layers that the models have in common, with what the report says of a search."""
    note = (
        f'`until="auto"` chose {until!r}, up to where the models agree to the bit: a later cut could only be less '
        "exact; a fixed `until` or `max_cost` shares more"
    )
    return _noted(zipped, {"until": until, "evaluations": {}}, note)


def _place(cut: Cut) -> str:
    return "the full trunk" if cut.until is None else repr(cut.until)


def _noted(zipped: ZippedModule, values: dict[str, Any], note: str) -> ZippedModule:
    zipped.meta["fxzip_report"] = Report({**zipped.report.as_dict(), "auto": values}).noting(note)
    return zipped

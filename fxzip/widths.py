"""How many features each space keeps: as many as the first model, a share more, or by need (`by_need.py`)."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .branches import Alone, behind
from .by_need import TRUNK, Flops, by_need
from .elastic import stiff_spaces
from .errors import InputError
from .moments import Moments
from .trunk import Trunk

Width = float | str | Mapping[str, float]


@dataclass(frozen=True)
class Widths:
    """Features to keep where that is not the number that there were; and for the report, why the others did not change.

    Attributes:
        kept: by space number of model 0.
        notes: for the report.
        heads: for each model the same of its head's spaces, by their numbers in the model alone.
    """

    kept: Mapping[int, int]
    notes: tuple[str, ...] = ()
    heads: tuple[Mapping[int, int], ...] = ()


def check_width(width: Width, max_cost: float | None, models: int) -> None:
    """Raises an InputError for what `choose_widths` would not understand.

    >>> check_width(1.25, None, 2)
    """
    if isinstance(width, str):
        if width != "auto":
            raise InputError(f'`width` must be a number, a dict of numbers by space, or "auto"; found {width!r}.')
        if max_cost is not None and not max_cost > 0:
            raise InputError(f"`max_cost` must be positive; found {max_cost!r}. Try 1.3, or 1.0 for the cost of one.")
        return
    for value in width.values() if isinstance(width, Mapping) else (width,):
        if not 0 < value <= models:
            raise InputError(
                f"`width` must lie in (0, {models}], at {models} nothing of {models} models need be merged; found "
                f"{value!r}. Try 1.25."
            )


def choose_widths(
    trunk: Trunk,
    statistics: Mapping[int, Moments],
    width: Width,
    max_cost: float | None,
    flops: Flops,
    alone: Sequence[Alone | None] = (),
) -> Widths:
    """The numbers of features to keep.

    Args:
        trunk: what is shared.
        statistics: moments by space number; spaces that were not observed keep their size.
        width: of every space, relative to the first model; a dict of that by the name of a space; or "auto", by need.
        max_cost: with "auto": FLOPs of the zipped network relative to the first model; None: 1.
        flops: of every node of every model.
        alone: every model by itself; with "auto" its head may keep fewer features too. Without, heads stay as they are.

    Raises:
        InputError: a name is no space of the trunk, or cannot have another size.
        CostError: what has to keep its size takes more than `max_cost`.
    """
    if not isinstance(width, (str, Mapping)) and width == 1:
        return Widths({})
    spaces = trunk.spaces[0].spaces
    able = _able(trunk)
    asked = _asked(trunk, width) if isinstance(width, Mapping) else dict.fromkeys(able, width)
    free, reasons = _elastic(trunk, statistics, able, asked)
    notes = _notes(trunk, reasons)
    if isinstance(width, str):
        heads = [_behind(trunk, k, own) for k, own in enumerate(alone)]
        for k, (own, (_, why)) in enumerate(zip(alone, heads, strict=True)):
            notes += [] if own is None else _notes(own.trunk, why, f" in head {k}")
        limit = 1.0 if max_cost is None else max_cost
        found = by_need(trunk, statistics, free, limit, flops, alone, [narrow for narrow, _ in heads])
        kept = {s: m for (part, s), m in found.items() if part == TRUNK}
    else:
        found = {}
        most = {s: sum(own.spaces[trunk.partners[k][s]].size for k, own in enumerate(trunk.spaces)) for s in free}
        kept = {s: min(max(1, round(float(asked[s]) * spaces[s].size)), most[s]) for s in free}
    narrowed = tuple(
        {
            s: m
            for (part, s), m in found.items()
            if part == k and own is not None and m != own.trunk.spaces[0].spaces[s].size
        }
        for k, own in enumerate(alone)
    )
    return Widths({s: m for s, m in kept.items() if m != spaces[s].size}, tuple(notes), narrowed)


def _able(trunk: Trunk) -> set[int]:
    """Spaces that may have another number of features, as far as the analysis knows."""
    return {s for s, space in enumerate(trunk.spaces[0].spaces) if space.legality == "free" and space.tie is None}


def _elastic(
    trunk: Trunk, statistics: Mapping[int, Moments], able: Collection[int], asked: Collection[int]
) -> tuple[list[int], dict[int, str]]:
    """Of the spaces asked for those that can get another size, and of the others the reasons."""
    tried = [s for s in asked if s in able and s in statistics and statistics[s].count]
    stiff = stiff_spaces(trunk, tried)
    spaces = trunk.spaces[0].spaces
    reasons = {
        s: stiff.get(s) or spaces[s].reason or "it was not observed" for s in asked if s not in tried or s in stiff
    }
    return [s for s in tried if s not in stiff], reasons


def _behind(trunk: Trunk, k: int, own: Alone | None) -> tuple[list[int], dict[int, str]]:
    """The spaces of head k that may be narrowed; of those that look like it but may not, the reasons."""
    if own is None:
        return [], {}
    able = _able(own.trunk) & behind(trunk, k, own.trunk)
    return _elastic(own.trunk, own.statistics, able, sorted(able))


def _notes(trunk: Trunk, reasons: Mapping[int, str], where: str = "") -> list[str]:
    spaces = trunk.spaces[0].spaces
    return [
        f"`{spaces[s].name}`{where} keeps its {spaces[s].size} features: {why}" for s, why in sorted(reasons.items())
    ]


def overspent(report: Mapping[str, Any], width: Width, max_cost: float | None) -> tuple[str, ...]:
    """A note if a zip by need takes more than it may: what heads spend on reading features through a matrix."""
    flops, limit = report["flops"], 1.0 if max_cost is None else max_cost
    cost = flops["total"] / max(flops["originals"][0], 1)
    if width != "auto" or cost <= limit * (1 + 1e-9):
        return ()
    return (
        f"the zip takes {cost:.3f} of the first model's FLOPs, not {limit}: heads read features through a matrix, "
        "which widths by need do not count",
    )


def _asked(trunk: Trunk, width: Mapping[str, float]) -> dict[int, float]:
    spaces = trunk.spaces[0].spaces
    names = [space.name for space in spaces]
    for name in width:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise InputError(f"`width` must name spaces of the trunk (see `fxzip.inspect`); found {name!r}.{hint}")
    return {s: width[name] for s, name in enumerate(names) if name in width}

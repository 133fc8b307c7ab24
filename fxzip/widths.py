"""How many features each space keeps: as many as the first model, a share more, or by need (`by_need.py`)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .branches import Alone, behind
from .by_need import TRUNK, Flops, by_need
from .elastic import elastic_spaces
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
    asked = _asked(trunk, width) if isinstance(width, Mapping) else None
    free, reasons = elastic_spaces(trunk, statistics, asked)
    notes = _notes(trunk, reasons)
    narrowed: list[Mapping[int, int]] = []
    if isinstance(width, str):
        heads = [frozenset() if own is None else behind(trunk, k, own.trunk) & own.elastic[0]
                 for k, own in enumerate(alone)]  # fmt: skip
        found = by_need(
            trunk,
            statistics,
            sorted(free),
            1.0 if max_cost is None else max_cost,
            flops,
            alone,
            list(map(sorted, heads)),
        )
        kept = {s: found[TRUNK, s] for s in free}
        for k, own in enumerate(alone):
            if own is not None:
                here = behind(trunk, k, own.trunk)
                notes += _notes(own.trunk, {s: why for s, why in own.elastic[1].items() if s in here}, f" in head {k}")
            sizes = [] if own is None else [space.size for space in own.trunk.spaces[0].spaces]
            narrowed.append({s: found[k, s] for s in sorted(heads[k]) if found[k, s] != sizes[s]})
    else:
        share = {s: float(width[spaces[s].name] if isinstance(width, Mapping) else width) for s in free}
        kept = {s: min(max(1, round(share[s] * spaces[s].size)), sum(_sizes(trunk, s))) for s in free}
    changed = {s: kept[s] for s in sorted(free) if {kept[s]} != set(_sizes(trunk, s))}
    return Widths(changed, tuple(notes), tuple(narrowed))


def _sizes(trunk: Trunk, space: int) -> list[int]:
    """How many features each model has."""
    return [own.spaces[trunk.partners[k][space]].size for k, own in enumerate(trunk.spaces)]


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


def _asked(trunk: Trunk, width: Mapping[str, float]) -> set[int]:
    spaces = trunk.spaces[0].spaces
    names = [space.name for space in spaces]
    for name in width:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise InputError(f"`width` must name spaces of the trunk (see `fxzip.inspect`); found {name!r}.{hint}")
    return {s for s, name in enumerate(names) if name in width}

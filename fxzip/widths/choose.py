"""How many features each space keeps: as many as the first model, a share more, or by need (`widths/budget.py`)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import InputError, OptionError
from ..matching.moments import Moments
from ..partition.trunk import Trunk
from .budget import Flops, by_need
from .narrow_heads import Alone, behind
from .resizable import elastic_spaces

Width = float | str | Mapping[str, float]


@dataclass(frozen=True)
class Widths:
    """Features to keep where that is not the number that there were; and for the report, why the others did not change.

    Attributes:
        kept: by space number of model 0.
        notes: for the report.
        heads: model -> the same of its head's spaces, by their numbers in the model alone.
    """

    kept: Mapping[int, int]
    notes: tuple[str, ...] = ()
    heads: Mapping[int, Mapping[int, int]] = field(default_factory=dict)


def check_width(width: Width, max_cost: float | None, models: int) -> None:
    """Raises an InputError for what `choose_widths` would not understand.

    >>> check_width(1.25, None, 2)
    """
    if isinstance(width, str):
        if width != "auto":
            raise OptionError(f'`width` must be a number, a dict of numbers by space, or "auto"; found {width!r}.')
        if max_cost is not None and not max_cost > 0:
            raise OptionError(f"`max_cost` must be positive; found {max_cost!r}. Try 1.3, or 1.0 for the cost of one.")
        return
    for value in width.values() if isinstance(width, Mapping) else (width,):
        if not 0 < value <= models:
            raise OptionError(
                f"`width` must lie in (0, {models}], at {models} nothing of {models} models need be merged; found "
                f"{value!r}. Try 1.25."
            )


def choose_widths(
    trunk: Trunk,
    statistics: Mapping[int, Moments],
    width: Width,
    max_cost: float | None,
    flops: Flops,
    alone: Mapping[int, Alone] = MappingProxyType({}),
) -> Widths:
    """The numbers of features to keep.

    Args:
        trunk: what is shared.
        statistics: moments by space number; spaces that were not observed keep their size.
        width: of every space, relative to the first model; a dict of that by the name of a space; or "auto", by need.
        max_cost: with "auto": FLOPs of the zipped network relative to the first model; None: 1.
        flops: of every node of every model.
        alone: models by themselves; with "auto" its head may keep fewer features too. Without, heads stay as they are.

    Raises:
        InputError: a name is no space of the trunk, or cannot have another size.
        CostError: what has to keep its size takes more than `max_cost`.
    """
    if not isinstance(width, (str, Mapping)) and width == 1:
        return Widths({})
    spaces = trunk.spaces[0].spaces
    asked = _asked(trunk, width) if isinstance(width, Mapping) else None
    elastic = elastic_spaces(trunk, statistics, asked)
    free = elastic.spaces
    notes, heads = _notes(trunk, elastic.reasons), {}
    if isinstance(width, str):
        narrow = {}
        for k, own in alone.items():
            names = [space.name for space in own.trunk.spaces[0].spaces]
            narrow[k] = own.elastic.among(behind(trunk, k, own.trunk), names)
            notes += _notes(own.trunk, narrow[k].reasons, f" in head {k}")
        limit = 1.0 if max_cost is None else max_cost
        kept, found = by_need(trunk, statistics, elastic, limit, flops, alone, narrow)
        heads = {k: _changed(alone[k].trunk, sizes) for k, sizes in found.items()}
    else:
        share = {s: float(width[spaces[s].name] if isinstance(width, Mapping) else width) for s in free}
        kept = {s: min(max(1, round(share[s] * spaces[s].size)), sum(trunk.sizes(s))) for s in free}
    return Widths(_changed(trunk, kept), tuple(notes), {k: sizes for k, sizes in heads.items() if sizes})


def _changed(trunk: Trunk, kept: Mapping[int, int]) -> dict[int, int]:
    """Without the spaces that keep what every model has."""
    return {s: kept[s] for s in sorted(kept) if {kept[s]} != set(trunk.sizes(s))}


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

"""How many features each space keeps: as many as the first model, a share more, or by need (`widths/budget.py`)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ..errors import InputError
from ..partition.region import Trunk
from .budget import NONE, by_need, ranks_by_need
from .levers import Key
from .narrow_heads import behind
from .observed import Observed
from .prices import Prices
from .rank_losses import RankLosses
from .requests import UNCHANGED, Budget, Scaled, ScaledSpaces, WidthRequest
from .resizable import elastic_spaces


@dataclass(frozen=True)
class Widths:
    """Features to keep where that is not the number that there were; and for the report, why the others did not change.

    Attributes:
        kept: by space number of model 0.
        notes: for the report.
        heads: model -> the same of its head's spaces, by their numbers in the model alone.
        ranks: (part, node of the part's first model) -> rank of a call, where ranks are by need.
    """

    kept: Mapping[int, int]
    notes: tuple[str, ...] = ()
    heads: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    ranks: Mapping[tuple[str, str], int] = field(default_factory=dict)


def choose_widths(
    observed: Observed, request: WidthRequest, prices: Prices, solo: Mapping[int, Observed] = MappingProxyType({}),
    *, ranks: Budget | None = None, calls: Mapping[Key, RankLosses] = NONE,
) -> Widths:  # fmt: skip
    """The numbers of features to keep, and the ranks of calls if those are to be chosen by need.

    Args:
        observed: what is shared; its spaces that were not observed keep their size.
        request: what the user asks for.
        prices: of every node of every model, in the currency of the request, if that is a budget.
        solo: models by themselves, by number; under a budget their heads may keep fewer features too. Without, heads
            stay as they are.
        ranks: what the zip may cost by the ranks of calls; None: they are not by need.
        calls: that may have a lower rank.

    Raises:
        InputError: a name is no space of the trunk, or cannot have another size.
        CostError: what has to keep its size takes more than the budget.
    """
    if isinstance(request, Budget):
        return _within(observed, request, prices, solo, calls)

    found = Widths({}) if request == UNCHANGED else _scaled(observed, request)
    if ranks is None:
        return found
    return replace(found, ranks=ranks_by_need(observed, ranks, prices, found.kept, calls))


def _scaled(observed: Observed, request: Scaled | ScaledSpaces) -> Widths:
    """The numbers of features by shares."""
    trunk = observed.trunk
    spaces = trunk.spaces[0].spaces
    if isinstance(request, ScaledSpaces):
        elastic = elastic_spaces(trunk, observed.moments, _asked(trunk, request.shares))
        share = {s: float(request.shares[spaces[s].name]) for s in elastic.spaces}
    else:
        elastic = observed.elastic
        share = dict.fromkeys(elastic.spaces, request.share)

    kept = {s: min(max(1, round(own * spaces[s].size)), sum(trunk.sizes(s))) for s, own in share.items()}
    return Widths(_changed(trunk, kept), tuple(_notes(trunk, elastic.reasons)))


def _within(
    observed: Observed, budget: Budget, prices: Prices, solo: Mapping[int, Observed], calls: Mapping[Key, RankLosses]
) -> Widths:
    """The numbers of features by need, in the trunk and in the heads of the models that are looked at by themselves."""
    notes, narrow = _notes(observed.trunk, observed.elastic.reasons), {}
    for k, own in solo.items():
        names = [space.name for space in own.trunk.spaces[0].spaces]
        narrow[k] = own.elastic.among(behind(observed.trunk, k, own.trunk), names)
        notes += _notes(own.trunk, narrow[k].reasons, f" in head {k}")

    found = by_need(observed, budget, prices, solo, narrow, calls)
    heads = {k: changed for k, sizes in found.heads.items() if (changed := _changed(solo[k].trunk, sizes))}
    return Widths(_changed(observed.trunk, found.spaces), tuple(notes), heads, found.ranks)


def _changed(trunk: Trunk, kept: Mapping[int, int]) -> dict[int, int]:
    """Without the spaces that keep what every model has."""
    return {s: kept[s] for s in sorted(kept) if {kept[s]} != set(trunk.sizes(s))}


def _notes(trunk: Trunk, reasons: Mapping[int, str], where: str = "") -> list[str]:
    spaces = trunk.spaces[0].spaces
    return [
        f"`{spaces[s].name}`{where} keeps its {spaces[s].size} features: {why}" for s, why in sorted(reasons.items())
    ]


def overspent(report: Mapping[str, Any], request: Budget | None) -> tuple[str, ...]:
    """A note if a zip by need takes more than it may: what heads spend on reading features through a matrix."""
    if request is None or request.is_measured:
        return ()

    cost = request.counted(report)
    if cost <= request.cost * (1 + 1e-9):
        return ()

    return (
        f"the zip takes {cost:.3f} of the first model's {request.noun}, not {request.cost}: heads read features "
        "through a matrix, which widths by need do not count",
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

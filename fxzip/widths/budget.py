"""How many features each space keeps by need, at a given cost.

Space s with m_s features kept loses r_s L_s(m_s), see `losses.py`; the network takes the cost C(m), see `costs.py`.
Each space is a lever, see `levers.py`, which has the greedy choice.

The heads' own spaces (`narrow_heads.py`) are among them. In the trunk a feature serves all models, but the weights of
all models read it; in a head a model's features meet that model's weights only. So an early cut with narrow heads may
lose less than a late one at the same cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..errors import CostError
from .costs import CallCosts
from .latency import multiple_of
from .levers import TRUNK, Floats, Key, Lever, Sizes, allocate
from .observed import Observed
from .prices import Prices
from .rank_losses import RankLosses
from .requests import Budget
from .resizable import Elastic

NONE: Mapping[Key, RankLosses] = MappingProxyType({})


@dataclass(frozen=True)
class Allocation:
    """What is kept of everything.

    Attributes:
        spaces: how many features the spaces of the trunk keep, by number.
        heads: model -> the same of its head's spaces.
        ranks: (part, node) -> rank of a call.
    """

    spaces: Mapping[int, int]
    heads: Mapping[int, Mapping[int, int]]
    ranks: Mapping[tuple[str, str], int]


def by_need(
    observed: Observed, budget: Budget, prices: Prices, solo: Mapping[int, Observed], narrow: Mapping[int, Elastic],
    calls: Mapping[Key, RankLosses] = NONE,
) -> Allocation:  # fmt: skip
    """Give up features and ranks where that loses the least per cost saved, until the cost is right; then use what is
    left.

    Args:
        observed: what is shared.
        budget: what the zipped network may take, relative to the first model.
        prices: of every node of every model, in the budget's currency.
        solo: models by themselves, by number.
        narrow: of each of them, what its head may narrow.
        calls: that may have a lower rank.

    Raises:
        CostError: what has to keep its size takes more than the budget.
    """
    device = _device(observed, budget)
    levers, base = _levers(observed, solo, narrow, device)
    chosen = {k: own.spaces for k, own in narrow.items()}
    costs = CallCosts(observed, prices, solo, chosen, base, {key: own.size for key, own in calls.items()})
    kept = _within(budget, [*levers, *_rank_levers(calls, device)], costs)

    parts: dict[int, dict[int, int]] = {part: {} for part in (TRUNK, *narrow)}
    for (part, own), size in kept.items():
        if not isinstance(own, str):
            parts[part][own] = size
    return Allocation(parts.pop(TRUNK), parts, _ranks(kept))


def ranks_by_need(
    observed: Observed, budget: Budget, prices: Prices, kept: Mapping[int, int], calls: Mapping[Key, RankLosses]
) -> Mapping[tuple[str, str], int]:
    """The same for ranks alone. `kept`: how many features spaces of the trunk keep, where that is not the number of the
    first model."""
    _, base = _levers(observed, {}, {}, None)
    costs = CallCosts(observed, prices, {}, {}, base, {key: own.size for key, own in calls.items()})
    stay: dict[Key, int] = {(part, s): kept.get(int(s), size) for (part, s), size in base.items()}
    return _ranks(_within(budget, _rank_levers(calls, _device(observed, budget)), costs, stay))


def _device(observed: Observed, budget: Budget) -> torch.device | None:
    """The one whose vector units sizes should fill; None: they may be any."""
    return observed.trunk.alignment.programs[0].call.device if budget.currency == "latency" else None


def _rank_levers(calls: Mapping[Key, RankLosses], device: torch.device | None) -> list[Lever]:
    levers = []
    for key, own in calls.items():
        multiple = 1 if device is None else multiple_of(own.size.outputs, device)
        levers.append(Lever((key,), (own.losses,), own.step, far=True, multiple=multiple))
    return levers


def _ranks(kept: Mapping[Key, int]) -> dict[tuple[str, str], int]:
    """Those of all sizes that are of calls, by part and node."""
    ranks = {}
    for (part, own), size in kept.items():
        if isinstance(own, str):
            ranks["trunk" if part == TRUNK else f"head {part}", own] = size
    return ranks


def _within(
    budget: Budget, levers: Sequence[Lever], costs: CallCosts, stay: Sizes = MappingProxyType({})
) -> dict[Key, int]:
    """The sizes of everything. Raises a CostError if they are beyond the budget."""
    limit = budget.cost * costs.one
    kept, total = allocate(levers, costs, limit, stay)
    if total > limit:
        raise CostError(
            f"`max_cost={budget.cost}` cannot be reached: what has to keep its size takes {total / costs.one:.2f} of "
            f"the first model's {budget.noun}. Raise it, or choose a later cut."
        )
    return kept


def _levers(
    observed: Observed, solo: Mapping[int, Observed], narrow: Mapping[int, Elastic], device: torch.device | None
) -> tuple[list[Lever], dict[Key, int]]:
    """The spaces, those together that have one size; and their sizes in the first model.

    `device`: the one whose vector units the sizes should fill.
    """
    base: dict[Key, int] = {}
    groups: list[list[Key]] = []
    losses: dict[Key, Floats] = {}

    parts = [(TRUNK, observed, observed.elastic), *((k, solo[k], elastic) for k, elastic in narrow.items())]
    for part, own, elastic in parts:
        for s in sorted(elastic.spaces):
            losses[part, s] = own.losses.of(s)
            base[part, s] = own.trunk.sizes(s)[0]
        groups += [[(part, s) for s in sorted(group)] for group in elastic.alike]

    tied = {s for group in groups for s in group}
    units = {group[0]: tuple(group) for group in groups}
    units |= {s: (s,) for s in base if s not in tied}
    ordered = [units[s] for s in base if s in units]
    levers = []
    for unit in ordered:
        size = base[unit[0]]
        multiple = 1 if device is None else multiple_of(size, device)
        levers.append(Lever(unit, tuple(losses[s] for s in unit), math.ceil(size / 16), multiple=multiple))
    return levers, base

"""How many features each space keeps by need, at a given cost.

Space s with m_s features kept loses r_s L_s(m_s), see `losses.py`; the network takes the cost C(m), see `costs.py`.
Each space is a lever, see `levers.py`, which has the greedy choice.

The heads' own spaces (`narrow_heads.py`) are among them. In the trunk a feature serves all models, but the weights of
all models read it; in a head a model's features meet that model's weights only. So an early cut with narrow heads may
lose less than a late one at the same cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ..errors import CostError
from .costs import CallCosts
from .latency import multiple_of
from .levers import TRUNK, Floats, Key, Lever, allocate
from .observed import Observed
from .prices import Prices
from .requests import Budget
from .resizable import Elastic


def by_need(
    observed: Observed, budget: Budget, prices: Prices, solo: Mapping[int, Observed], narrow: Mapping[int, Elastic]
) -> tuple[dict[int, int], dict[int, dict[int, int]]]:
    """Give up features where that loses the least per cost saved, until the cost is right; then use what is left.

    Args:
        observed: what is shared.
        budget: what the zipped network may take, relative to the first model.
        prices: of every node of every model, in the budget's currency.
        solo: models by themselves, by number.
        narrow: of each of them, what its head may narrow.

    Returns:
        How many features the free spaces keep, and for each model those of its head.

    Raises:
        CostError: what has to keep its size takes more than the budget.
    """
    device = observed.trunk.alignment.programs[0].call.device if budget.currency == "latency" else None
    levers, base = _levers(observed, solo, narrow, device)
    costs = CallCosts(observed, prices, solo, {k: own.spaces for k, own in narrow.items()}, base)
    limit = budget.cost * costs.one
    kept, total = allocate(levers, costs, limit)
    if total > limit:
        raise CostError(
            f"`max_cost={budget.cost}` cannot be reached: what has to keep its size takes {total / costs.one:.2f} of "
            f"the first model's {budget.noun}. Raise it, or choose a later cut."
        )

    parts: dict[int, dict[int, int]] = {part: {} for part in (TRUNK, *narrow)}
    for (part, s), size in kept.items():
        parts[part][int(s)] = size
    return parts.pop(TRUNK), parts


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

"""How many features each space keeps by need, at a given cost.

Space s with m_s features kept loses r_s L_s(m_s), see `losses.py`; the network takes the FLOPs C(m). Starting with all
features of all models, the space that loses the least per FLOP saved gives up some, until C is what is wanted: the
greedy solution of  min Σ_s r_s L_s(m_s)  with  C(m) ≤ `max_cost` · C of the first model.

The heads' own spaces (`narrow_heads.py`) are among them. In the trunk a feature serves all models, but the weights of
all models read it; in a head a model's features meet that model's weights only. So an early cut with narrow heads may
lose less than a late one at the same cost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..analysis.relabelling import group_run
from ..errors import CostError
from ..partition.region import Trunk
from ..rewriting.zip_plan import head_params, unmerged_spaces
from .observed import Observed
from .requests import Budget
from .resizable import Elastic

Flops = Sequence[Mapping[str, int]]
_Key = tuple[int, int]  # a space: number of the model whose head it is in, or _TRUNK; its own number there
Floats = npt.NDArray[np.float64]
_Unit = tuple[_Key, ...]  # spaces that have one size
_TRUNK = -1


def by_need(
    observed: Observed, budget: Budget, flops: Flops, solo: Mapping[int, Observed], narrow: Mapping[int, Elastic]
) -> tuple[dict[int, int], dict[int, dict[int, int]]]:
    """Give up features where that loses the least per FLOP saved, until the cost is right; then use what is left.

    Args:
        observed: what is shared.
        budget: what the zipped network may take, relative to the first model.
        flops: of every node of every model.
        solo: models by themselves, by number.
        narrow: of each of them, what its head may narrow.

    Returns:
        How many features the free spaces keep, and for each model those of its head.

    Raises:
        CostError: what has to keep its size takes more than the budget.
    """
    losses, base, units = _spaces(observed, solo, narrow)
    chosen = {k: own.spaces for k, own in narrow.items()}
    costs = _Costs(observed, flops, solo, chosen)
    kept = {s: len(losses[s]) - 1 for s in base}
    one = sum(flops[0].values())
    limit = budget.cost * one
    total = costs.total({s: kept[s] / base[s] for s in base})

    def steps(sign: int) -> list[tuple[float, _Unit, int, float]]:
        """(loss per FLOP, spaces, their new size, new total) of all steps by a sixteenth of a space, cheapest first."""
        ratio = {s: kept[s] / base[s] for s in base}
        result = []
        for unit in units:
            s = unit[0]
            size = min(kept[s] + sign * math.ceil(base[s] / 16), len(losses[s]) - 1)
            if size < 1 or size == kept[s]:
                continue
            saved = costs.saved(ratio, unit, size / base[s])
            if sign * saved < 0:
                more = sum(float(losses[own][size] - losses[own][kept[own]]) for own in unit)
                result.append((more / saved, unit, size, total - saved))
        return sorted(result, key=lambda step: step[0], reverse=sign > 0)

    while total > limit:
        possible = steps(-1)
        if not possible:
            raise CostError(
                f"`max_cost={budget.cost}` cannot be reached: what has to keep its size takes {total / one:.2f} of the "
                "first model's FLOPs. Raise it, or choose a later cut."
            )
        _, unit, size, total = possible[0]
        kept |= dict.fromkeys(unit, size)
    while affordable := [step for step in steps(+1) if step[3] <= limit]:
        _, unit, size, total = affordable[0]
        kept |= dict.fromkeys(unit, size)
    parts: dict[int, dict[int, int]] = {part: {} for part in (_TRUNK, *narrow)}
    for (part, s), size in kept.items():
        parts[part][s] = size
    return parts.pop(_TRUNK), parts


def _spaces(
    observed: Observed, solo: Mapping[int, Observed], narrow: Mapping[int, Elastic]
) -> tuple[dict[_Key, Floats], dict[_Key, int], list[_Unit]]:
    """Losses of the spaces by size, their sizes in the first model, and which of them have one size."""
    losses: dict[_Key, Floats] = {}
    base: dict[_Key, int] = {}
    groups: list[list[_Key]] = []

    parts = [(_TRUNK, observed, observed.elastic), *((k, solo[k], elastic) for k, elastic in narrow.items())]
    for part, own, elastic in parts:
        for s in sorted(elastic.spaces):
            losses[part, s] = own.losses.of(s)
            base[part, s] = own.trunk.sizes(s)[0]
        groups += [[(part, s) for s in sorted(group)] for group in elastic.alike]

    tied = {s for group in groups for s in group}
    units: dict[_Key, _Unit] = {group[0]: tuple(group) for group in groups}
    units |= {s: (s,) for s in base if s not in tied}
    return losses, base, [units[s] for s in base if s in units]


_Axis = Mapping[_Key, tuple[float, float]]
"""Spaces along one axis of a call: share of its places; the first model's size relative to that of the call's model."""


class _Costs:
    """FLOPs as a function of the spaces' sizes relative to what they were, in the first model those of the trunk.

    A call with a parameter takes FLOPs in proportion to the parameter's length along each of its labelled axes; a run
    that is shared out among several spaces has the length of all of them. A head that needs features in its own basis
    takes what it takes.
    """

    def __init__(
        self, observed: Observed, flops: Flops, solo: Mapping[int, Observed], narrow: Mapping[int, Collection[int]]
    ) -> None:
        trunk, free = observed.trunk, observed.elastic.spaces
        self.fixed = 0
        self._calls: list[tuple[int, list[_Axis]]] = []
        self._of: dict[_Key, list[int]] = defaultdict(list)
        inside, given = set(trunk.nodes), {(_TRUNK, s): 1.0 for s in free}
        for node, cost in flops[0].items():
            if node in inside:
                self._add(cost, _lengths(trunk, 0, trunk.labellings[0].touches[node], _TRUNK), given)
        for k, (own, reach) in enumerate(zip(flops, trunk.reach, strict=True)):
            inside, params = set(trunk.names(k).values()), head_params(trunk, k)
            self.fixed += sum(own[name] for name in trunk.alignment.stem(k) if name in own and name not in inside)
            unmerged = unmerged_spaces(trunk, k, reach)
            given = {(_TRUNK, s): trunk.sizes(s)[0] / trunk.sizes(s)[k] for s in free if s not in unmerged}
            given |= {(k, s): 1.0 for s in narrow.get(k, ())}
            for name in trunk.head_nodes(k):
                cost = own.get(name, 0)
                touched = trunk.labellings[k].touches[name] & params if cost else frozenset()
                lengths = _lengths(trunk, k, touched, _TRUNK, reach)
                if k in narrow:
                    mine = _lengths(solo[k].trunk, 0, touched, k)
                    lengths = [{**shared, **more} for shared, more in zip(lengths, mine, strict=True)]
                self._add(cost, lengths, given)

    def _add(self, cost: int, lengths: Sequence[Mapping[_Key, float]], given: Mapping[_Key, float]) -> None:
        """A call with the shares of spaces along its axes, of which those count that are `given`."""
        every = ({s: (share, given[s]) for s, share in length.items() if s in given} for length in lengths)
        axes: list[_Axis] = [axis for axis in every if axis]
        if not cost or not axes:
            self.fixed += cost
            return
        for key in {key for axis in axes for key in axis}:
            self._of[key].append(len(self._calls))
        self._calls.append((cost, axes))

    def total(self, ratio: Mapping[_Key, float]) -> float:
        return self.fixed + sum(_scaled(*call, ratio) for call in self._calls)

    def saved(self, ratio: Mapping[_Key, float], unit: _Unit, less: float) -> float:
        """FLOPs saved by making the spaces of a unit that small."""
        after = {**ratio, **dict.fromkeys(unit, less)}
        calls = [self._calls[number] for number in sorted({n for space in unit for n in self._of[space]})]
        return sum(_scaled(*call, ratio) - _scaled(*call, after) for call in calls)


def _scaled(cost: int, axes: Sequence[_Axis], ratio: Mapping[_Key, float]) -> float:
    return cost * math.prod(1 + sum(f * (ratio[s] * first - 1) for s, (f, first) in axis.items()) for axis in axes)


def _lengths(
    trunk: Trunk, k: int, params: Collection[str], part: int, reach: Tensor | None = None
) -> list[dict[_Key, float]]:
    """For each axis of the largest labelled parameter of a call: space -> its share of the places.

    Spaces are those of model k in `trunk`, by their numbers in model 0, as of `part`.
    """
    spaces = trunk.spaces[k]
    numbers = {own: s for s, own in enumerate(trunk.partners[k])}
    labelled = [spaces.labelling.params[name] for name in sorted(params) if name in spaces.labelling.params]
    if not labelled:
        return []
    largest = max(labelled, key=lambda own: math.prod(run.numel() for run in own.fields))
    runs = largest.fields[:1] if largest.groups > 1 and len(group_run(largest)) == largest.groups else largest.fields
    result = []
    for run in runs:
        flat = run.reshape(-1)
        layout = spaces.layout(flat if reach is None else reach[flat].clamp(min=0))
        found = {int(s): int((layout.space == s).sum()) / len(flat) for s in layout.space.unique() if s >= 0}
        result.append({(part, numbers[s]): share for s, share in found.items() if s in numbers})
    return result

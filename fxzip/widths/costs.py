"""What a zipped network takes, as a function of the sizes of its spaces.

Every node has a price, a function of its work: the product of the lengths of the axes along which its features lie,
those of its largest parameter or, without one, those of its value. A run that is shared out among several spaces has
the length of all of them. A head that needs features in its own basis takes what it takes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from ..analysis.labelling import Labelling
from ..partition.region import Trunk
from ..rewriting.factorised import LinearSize
from ..rewriting.zip_plan import head_params, unmerged_spaces
from .levers import TRUNK, Key, Lever, Sizes
from .observed import Observed
from .prices import Price, Prices

_Axis = Mapping[Key, tuple[float, float]]
"""Spaces along one axis of a call: share of its places; the first model's size relative to that of the call's model."""


@dataclass(frozen=True)
class _Call:
    """What a node costs, the spaces along the axes that its work goes with, and what rank it may have."""

    price: Price
    axes: Sequence[tuple[int, _Axis]]
    key: Key | None = None
    linear: LinearSize | None = None


_Length = tuple[int, Mapping[Key, float]]
"""An axis of a parameter, and the shares of spaces along it."""


class CallCosts:
    """What a zip costs, as a function of the spaces' sizes and of the ranks of calls: `levers.Costs`.

    Args:
        observed: what is shared.
        prices: of every node of every model.
        solo: models by themselves, by number.
        narrow: of each of them, the spaces of its head that may be narrowed.
        base: the spaces' sizes in the first model, those of heads in their own.
        ranks: calls that may be factorised, by key.
    """

    def __init__(
        self, observed: Observed, prices: Prices, solo: Mapping[int, Observed], narrow: Mapping[int, Collection[int]],
        base: Sizes, ranks: Mapping[Key, LinearSize] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        trunk, free = observed.trunk, observed.elastic.spaces
        self.one = sum(price.at(1.0) for price in prices[0].values())
        self.fixed = 0.0
        self.base, self.ranks = base, ranks
        self._calls: list[_Call] = []
        self._of: dict[Key, list[int]] = defaultdict(list)
        inside = set(trunk.nodes)
        given: dict[Key, float] = {(TRUNK, s): 1.0 for s in free}
        for node, price in prices[0].items():
            if node in inside:
                lengths = axes_of(trunk, 0, node, trunk.labellings[0].touches[node], TRUNK)
                self._add((TRUNK, node), price, lengths, given)
        for k, (own, reach) in enumerate(zip(prices, trunk.reach, strict=True)):
            inside, params = set(trunk.names(k).values()), head_params(trunk, k)
            stem = [name for name in trunk.alignment.stem(k) if name in own and name not in inside]
            self.fixed += sum(own[name].at(1.0) for name in stem)
            unmerged = unmerged_spaces(trunk, k, reach)
            given = {(TRUNK, s): trunk.sizes(s)[0] / trunk.sizes(s)[k] for s in free if s not in unmerged}
            given |= {(k, s): 1.0 for s in narrow.get(k, ())}
            for name in trunk.head_nodes(k):
                if name not in own:
                    continue
                touched = trunk.labellings[k].touches[name] & params
                lengths = axes_of(trunk, k, name, touched, TRUNK, reach)
                if k in narrow:
                    mine = axes_of(solo[k].trunk, 0, name, touched, k)
                    both = zip(lengths, mine, strict=True)
                    lengths = [(axis, {**shared, **more}) for (axis, shared), (_, more) in both]
                self._add((k, name), own[name], lengths, given)

    def _add(self, key: Key, price: Price, lengths: Sequence[_Length], given: Mapping[Key, float]) -> None:
        """A node with the shares of spaces along its axes, of which those count that are `given`."""
        axes: list[tuple[int, _Axis]] = []
        for axis, length in lengths:
            if found := {s: (share, given[s]) for s, share in length.items() if s in given}:
                axes.append((axis, found))
        linear = self.ranks.get(key)
        if not (axes or linear):
            self.fixed += price.at(1.0)
            return
        for own in {own for _, axis in axes for own in axis} | ({key} if linear else set()):
            self._of[own].append(len(self._calls))
        self._calls.append(_Call(price, axes, key, linear))

    def total(self, sizes: Sizes) -> float:
        """What the whole network costs."""
        return self.fixed + sum(self._cost(call, sizes) for call in self._calls)

    def saved(self, sizes: Sizes, lever: Lever, size: int) -> float:
        """What is saved by giving a lever this size."""
        after = {**sizes, **dict.fromkeys(lever.keys, size)}
        calls = [self._calls[number] for number in self.calls(lever)]
        return sum(self._cost(call, sizes) - self._cost(call, after) for call in calls)

    def calls(self, lever: Lever) -> Sequence[int]:
        """Numbers of the calls whose cost depends on a lever."""
        return sorted({number for key in lever.keys for number in self._of[key]})

    def _cost(self, call: _Call, sizes: Sizes) -> float:
        kept = [(axis, self._kept(own, sizes)) for axis, own in call.axes]
        whole = call.price.at(math.prod(share for _, share in kept))
        if call.linear is None or call.key is None:
            return whole
        along = call.linear.along
        outputs, inputs = (math.prod(n for axis, n in kept if (axis == along) == own) for own in (True, False))
        return min(whole, factorised_cost(call.price, call.linear, sizes[call.key], outputs, inputs))

    def _kept(self, axis: _Axis, sizes: Sizes) -> float:
        """How long an axis is, relative to what it was."""
        return 1 + sum(f * (sizes[s] / self.base[s] * first - 1) for s, (f, first) in axis.items())


def factorised_cost(price: Price, call: LinearSize, rank: float, outputs: float = 1.0, inputs: float = 1.0) -> float:
    """What a call of this rank costs as two: to so many features, and from there.

    >>> flops, call = Price.proportional(100.0), LinearSize(10, 10)
    >>> factorised_cost(flops, call, 4), factorised_cost(flops, call, 4, inputs=0.5)
    (80.0, 60.0)

    Args:
        price: of the call as one.
        call: how many outputs and inputs it has.
        rank: the number of features in between.
        outputs, inputs: the shares of them that are kept.
    """
    return price.at(rank * inputs / call.outputs) + price.at(rank * outputs / call.inputs)


def axes_of(
    trunk: Trunk, k: int, node: str, params: Collection[str], part: int, reach: Tensor | None = None
) -> list[_Length]:
    """The labelled axes of a node's largest labelled parameter, or of its value, each with space -> its share of the
    places.

    Spaces are those of `trunk`, as of `part`.
    """
    spaces = trunk.spaces[k]
    result: list[_Length] = []
    for place, run in enumerate(_runs(spaces.labelling, node, params)):
        axis = next((a for a, n in enumerate(run.shape) if n > 1), place)
        flat = run.reshape(-1)
        layout = spaces.layout(flat if reach is None else reach[flat].clamp(min=0))
        found = {int(s): int((layout.space == s).sum()) / len(flat) for s in layout.space.unique() if s >= 0}
        result.append((axis, {(part, s): share for s, share in found.items()}))
    return result


def _runs(labelling: Labelling, node: str, params: Collection[str]) -> Sequence[Tensor]:
    """Labels along the axes that a node's work goes with."""
    labelled = [labelling.params[name] for name in sorted(params) if name in labelling.params]
    if not labelled:
        return labelling.fields.get(node, ())
    largest = max(labelled, key=lambda own: math.prod(run.numel() for run in own.fields))
    return largest.fields[:1] if largest.groups > 1 and len(largest.runs()[1][1]) == largest.groups else largest.fields

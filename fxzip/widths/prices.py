"""What a node costs as a function of its work, in the currency of a budget.

The work of a node goes with the lengths of the axes along which its features lie: those of its largest parameter, or,
without one, those of its value. FLOPs and numbers of parameters are in proportion to the work; seconds are not, and are
measured at some sizes (`latency.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..analysis.labelling import Labelling


@dataclass(frozen=True)
class Price:
    """What a node costs, by its work relative to the model as it is; linear between points, and in line beyond them.

    >>> Price.proportional(6.0).at(0.5)
    3.0
    >>> seconds = Price(((0.5, 2.0), (1.0, 3.0), (2.0, 7.0)))
    >>> seconds.at(1.5), seconds.at(4.0), seconds.at(0.0)
    (5.0, 15.0, 1.0)

    Attributes:
        points: (work, cost), work rising; two at least.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def proportional(cls, cost: float) -> Price:
        """That of a node that costs in proportion to its work."""
        return cls(((0.0, 0.0), (1.0, float(cost))))

    def at(self, work: float) -> float:
        """The cost of so much work, never below zero."""
        place = min(max(bisect_left(self.points, (work,)), 1), len(self.points) - 1)
        (low, first), (high, last) = self.points[place - 1 : place + 1]
        return max(0.0, first + (last - first) * (work - low) / (high - low))


Prices = Sequence[Mapping[str, Price]]
"""Of every node of every model, by its name; nodes that cost nothing are left out."""


def flop_prices(flops: Sequence[Mapping[str, int]]) -> Prices:
    """In: the FLOPs of every node of every model."""
    return [{name: Price.proportional(cost) for name, cost in own.items() if cost} for own in flops]


def parameter_prices(labellings: Sequence[Labelling]) -> Prices:
    """Of a parameter that several nodes read the first has the price."""
    result = []
    for labelling in labellings:
        named = dict(labelling.program.module.named_parameters())
        seen: set[str] = set()
        own = {}
        for node in labelling.program.module.graph.nodes:
            new = (labelling.touches.get(node.name, frozenset()) & named.keys()) - seen
            seen |= new
            if new:
                own[node.name] = Price.proportional(sum(named[name].numel() for name in new))
        result.append(own)
    return result

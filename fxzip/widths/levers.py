"""What may be given up for cost, whatever it is, and the greedy choice of how much of each.

A lever is something that can be had smaller, step by step: features of a space, or the rank of a call. It has a curve
of what is lost with so much of it kept, and there is a function of all sizes that says what the network takes. Starting
with all of everything, the step that loses the least per cost saved is taken, until the cost is what is wanted: the
greedy solution of  min Σ L(m)  with  C(m) ≤ limit. What is left of the budget is then given back where it is worth the
most.

Losses are in one currency for all levers: the share of the variance of what a weight computes that is lost, summed over
weights (`losses.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Key = tuple[int, int | str]
"""A space: the number of the model whose head it is in, or `TRUNK`, and its own number there; or a call: the same, and
the name of its node."""

TRUNK = -1
Floats = npt.NDArray[np.float64]
Sizes = Mapping[Key, int]


@dataclass(frozen=True, eq=False)
class Lever:
    """Something that can be had smaller.

    Attributes:
        keys: what has this size: spaces of one size, or a call.
        losses: for each of them what is lost with 0, 1, ..., N kept, float64 [N + 1], falling.
        step: by how much it is made smaller at a time.
        far: whether steps of several lengths count, since a short one may save nothing.
        multiple: sizes are multiples of it, but for the largest.

    >>> lever = Lever(((TRUNK, 0),), (np.zeros(41),), step=3, multiple=8)
    >>> lever.next(40, -1), lever.next(32, -1), lever.next(8, -1), lever.next(32, +1), lever.next(38, +1)
    ([32], [24], [], [40], [40])
    """

    keys: tuple[Key, ...]
    losses: tuple[Floats, ...]
    step: int
    far: bool = False
    multiple: int = 1

    @property
    def most(self) -> int:
        """The size with which nothing is lost."""
        return len(self.losses[0]) - 1

    def lost(self, size: int, now: int) -> float:
        """What more is lost with this size than with another."""
        return sum(float(losses[size] - losses[now]) for losses in self.losses)

    def next(self, now: int, sign: int) -> Sequence[int]:
        """The sizes that a step leads to, smaller ones (-1) or larger ones (+1)."""
        if not self.far:
            sizes = [self._rounded(now + sign * self.step, sign)]
        else:
            end = self.most + 1 if sign > 0 else 0
            sizes = [self._rounded(size, sign) for size in range(now + sign * self.step, end, sign * self.step)]
            sizes += [self.most] if sign > 0 and now < self.most and self.most not in sizes else []
        return [size for size in dict.fromkeys(sizes) if 1 <= size != now]

    def _rounded(self, size: int, sign: int) -> int:
        """A multiple that lies at least so far in the direction of the step."""
        whole = -(-size // self.multiple) if sign > 0 else size // self.multiple
        return min(whole * self.multiple, self.most)


class Costs(Protocol):
    """What a network takes, as a function of all sizes."""

    def total(self, sizes: Sizes) -> float:
        """Of the whole network."""
        ...

    def saved(self, sizes: Sizes, lever: Lever, size: int) -> float:
        """By giving a lever this size while the others stay."""
        ...

    def calls(self, lever: Lever) -> Collection[int]:
        """Numbers of the calls whose cost depends on a lever."""
        ...


class _Step(NamedTuple):
    """Loss per cost saved; which lever gets which size; what that saves."""

    price: float
    lever: int
    size: int
    saved: float


class _Greedy:
    """Levers at their present sizes, and the steps from there."""

    def __init__(self, levers: Sequence[Lever], costs: Costs, fixed: Sizes) -> None:
        self.levers, self.costs = levers, costs
        self.sizes: dict[Key, int] = {**fixed, **{key: lever.most for lever in levers for key in lever.keys}}
        self.total = costs.total(self.sizes)
        self._calls = [frozenset(costs.calls(lever)) for lever in levers]
        self._known: dict[int, list[_Step]] = {}

    def steps(self, sign: int) -> list[_Step]:
        """All steps, those that lose the least per cost first; with +1 those that gain the most."""
        for number in range(len(self.levers)):
            if number not in self._known:
                self._known[number] = self._from_here(number, sign)
        every = [step for number in range(len(self.levers)) for step in self._known[number]]
        return sorted(every, key=lambda step: step.price, reverse=sign > 0)

    def _from_here(self, number: int, sign: int) -> list[_Step]:
        lever = self.levers[number]
        now = self.sizes[lever.keys[0]]
        found = []
        for size in lever.next(now, sign):
            saved = self.costs.saved(self.sizes, lever, size)
            if sign * saved < 0:
                found.append(_Step(lever.lost(size, now) / saved, number, size, saved))
        return found

    def take(self, step: _Step) -> None:
        """Give a lever its new size."""
        self.sizes |= dict.fromkeys(self.levers[step.lever].keys, step.size)
        self.total -= step.saved
        for number, calls in enumerate(self._calls):
            if number == step.lever or calls & self._calls[step.lever]:
                self._known.pop(number, None)

    def turn(self) -> None:
        """From here on steps lead the other way."""
        self._known.clear()


def allocate(
    levers: Sequence[Lever], costs: Costs, limit: float, fixed: Sizes = MappingProxyType({})
) -> tuple[dict[Key, int], float]:
    """The sizes that lose little at a cost of at most `limit`, and what they cost; more than `limit` if nothing more
    can be given up. `fixed`: sizes that stay."""
    greedy = _Greedy(levers, costs, fixed)
    while greedy.total > limit and (possible := greedy.steps(-1)):
        greedy.take(possible[0])

    greedy.turn()
    while affordable := [step for step in greedy.steps(+1) if greedy.total - step.saved <= limit]:
        greedy.take(affordable[0])
    return greedy.sizes, greedy.total

"""Which features of a network may change places, by construction: the generator's own account.

A *space* is a run of features that one call writes. Whoever builds a network says, block by block, what a space must
respect: it is tied to another one (a sum), in blocks (heads, groups), cut in two (a slice), or fixed (its order
matters).
Only relabellings that are legal by construction are ever drawn; some legal ones are left out, where the exact account
would be long. Nothing here looks at a graph, runs a network or asks the compiler that is under test.

A relabelling is an array P per axis: the copy has at place p what the original has at place P[p].
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor


class Order:
    """How the blocks of some spaces are ordered; spaces of one order move their blocks alike."""

    def __init__(self, count: int, *, fixed: bool = False) -> None:
        self.count, self._fixed, self._parent = count, fixed, self

    @property
    def root(self) -> Order:
        while self._parent is not self:
            self = self._parent
        return self

    @property
    def fixed(self) -> bool:
        return self.root._fixed

    def fix(self) -> None:
        self.root._fixed = True

    def tie(self, other: Order) -> None:
        a, b = self.root, other.root
        assert a.count == b.count
        if a is not b:
            b._fixed |= a._fixed
            a._parent = b


class Space:
    """Features that may change places: blocks by their `order`, features inside of each block by themselves."""

    def __init__(self, size: int, order: Order | None = None, *, alike: bool = False, fixed: bool = False) -> None:
        self.size, self._order, self._alike, self._fixed = size, order or Order(1), alike, fixed
        self._parent, self._parts = self, ()
        if fixed:
            self._order.fix()

    @property
    def root(self) -> Space:
        while self._parent is not self:
            self = self._parent
        return self

    @property
    def leaves(self) -> list[Space]:
        """The spaces into which this one was cut."""
        own = self.root
        return [leaf for part in own._parts for leaf in part.leaves] if own._parts else [own]

    def fix(self) -> None:
        for leaf in self.leaves:
            leaf._fixed = True
            leaf._order.fix()

    def cut(self, place: int) -> None:
        """Cut a leaf in two."""
        if self._order.count > 1:
            self.fix()
        self._parts = tuple(Space(n, fixed=self._fixed) for n in (place, self.size - place))

    def tie(self, other: Space) -> None:
        """Two leaves of one size move alike from now on."""
        if self is other:
            return
        if self._order.count != other._order.count and 1 not in (self._order.count, other._order.count):
            self.fix()
            other.fix()
            self._order = other._order
        keep, drop = (self, other) if self._order.count > other._order.count else (other, self)
        if keep._order.count == drop._order.count:
            keep._order.tie(drop._order)
        keep._alike |= drop._alike
        drop._parent = keep
        if drop._fixed or keep._fixed:
            keep.fix()


@dataclass(frozen=True, eq=False)
class Axis:
    """What lies along an axis: spaces, one after another; `places` says which feature lies where, if not in order."""

    spaces: tuple[Space, ...]
    places: np.ndarray | None = None

    @classmethod
    def new(cls, size: int, **settings: object) -> Axis:
        return cls((Space(size, **settings),))  # type: ignore[arg-type]

    @classmethod
    def fixed(cls, size: int) -> Axis:
        return cls((Space(size, fixed=True),))

    @property
    def leaves(self) -> list[Space]:
        return [leaf for space in self.spaces for leaf in space.leaves]

    @property
    def width(self) -> int:
        """How many features there are."""
        return sum(space.size for space in self.spaces)

    @property
    def size(self) -> int:
        """How many places there are."""
        return self.width if self.places is None else len(self.places)

    def moved(self, places: np.ndarray | Tensor) -> Axis:
        """The axis behind a call that puts at place p what was at `places[p]`; all features occur equally often."""
        own = np.asarray(places)
        return Axis(self.spaces, own if self.places is None else self.places[own])

    @classmethod
    def join(cls, *axes: Axis) -> Axis:
        """One axis behind the other."""
        spaces = tuple(space for axis in axes for space in axis.spaces)
        if all(axis.places is None for axis in axes):
            return cls(spaces)
        places, start = [], 0
        for axis in axes:
            places.append(start + (np.arange(axis.width) if axis.places is None else axis.places))
            start += axis.width
        return cls(spaces, np.concatenate(places))

    def fix(self) -> None:
        for leaf in self.leaves:
            leaf.fix()

    def cut(self, *sizes: int) -> list[Axis]:
        """The axis in parts: what was one space becomes several, that cannot exchange features."""
        assert sum(sizes) == self.size
        edges = np.cumsum((0, *sizes))
        if self.places is not None:
            self.fix()
            return [Axis(self.spaces, self.places[a:b]) for a, b in pairwise(edges)]
        for edge in edges[1:-1]:
            start = 0
            for leaf in self.leaves:
                if start < edge < start + leaf.size:
                    leaf.cut(int(edge) - start)
                start += leaf.size
        starts = np.cumsum([0, *(leaf.size for leaf in self.leaves)])
        return [
            Axis(tuple(leaf for leaf, at in zip(self.leaves, starts[:-1], strict=True) if a <= at < b))
            for a, b in pairwise(edges)
        ]

    def tie(self, other: Axis) -> Axis:
        """The features of both lie on each other: they move alike."""
        assert self.size == other.size
        if self.places is None and other.places is None:
            edges = sorted({*np.cumsum([s.size for s in self.leaves]), *np.cumsum([s.size for s in other.leaves])})
            sizes = [int(n) for n in np.diff([0, *edges])]
            self.cut(*sizes)
            other.cut(*sizes)
            if len(self.leaves) != len(other.leaves):  # what was cut here had been tied to what was cut there
                return self.tie(other)
            for a, b in zip(self.leaves, other.leaves, strict=True):
                a.root.tie(b.root)
        elif self.places is None or other.places is None or not np.array_equal(self.places, other.places):
            self.fix()
            other.fix()
        else:
            Axis(self.spaces).tie(Axis(other.spaces))
        return self

    def in_blocks(self, count: int) -> Order:
        """The axis falls into so many blocks, that must stay together: the order in which they lie."""
        leaves = self.leaves
        if self.places is None and len(leaves) == 1 and leaves[0]._order.count in (1, count):
            if leaves[0]._order.count == 1:
                leaves[0]._order = Order(count, fixed=leaves[0]._fixed)
            return leaves[0]._order
        self.cut(*[self.size // count] * count)
        return Order(count, fixed=True)


@dataclass(frozen=True, eq=False)
class Blocks:
    """An axis with a place for each block of an order."""

    order: Order

    @property
    def size(self) -> int:
        return self.order.count


@dataclass(frozen=True, eq=False)
class Grouped:
    """The axis of a grouped kernel that holds, for each group, the group's own part of another axis."""

    axis: Axis
    groups: int

    @property
    def size(self) -> int:
        return self.axis.size // self.groups


Along = Axis | Blocks | Grouped | int

"""Solve the constraints for feature spaces: which features may change places with which.

Labels made equal fall into classes. Blocks and members of classes form a forest of units: a class outside of all
blocks is a unit of its own, a block with all it holds is one (an attention head, a convolution group). Units of the
same kind, that is the same occurrences in parameters and in the graph, may change places, and so may members of the
same kind inside one unit. Every legal relabelling that is used anywhere in fxzip is built from these two moves.

Simplifications, each to a smaller set of relabellings and so never to a wrong one:
* A block is its set of members: blocks with the same members are one, a block with one member is that member.
* Members of a pinned block take the block as part of their kind and leave it.
* A unit whose members are all of different kinds moves rigidly: it becomes one class.
* A unit that is no tree (two blockings across each other) gives up the blocking with the fewest blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .fingerprints import Runs, fingerprints_of
from .labelling import Labelling
from .roles import Roles
from .rules import Constraints
from .rules.axis_labels import occurrences
from .rules.constraint_store import PinKind
from .solver import Ints, Solver, Unit, hold_unique, units_of, untangle

Legality = Literal["free", "blockwise", "relabel only", "pinned"]
"""What may be done with the features of a space, see `FeatureSpace`."""


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """Features that may change places with one another.

    Attributes:
        name: the parameter that writes the features first.
        classes: class numbers, shape [n]; the features' order is that of this array.
        legality: "free", "blockwise" (whole blocks first, then inside a block), "relabel only" (averaging clusters
            would not be exact even through linear calls: q and k of a head, a kernel and its transpose), or "pinned".
        reason: why it is not free.
        tie: number of the tie group whose blocks move together, or None.
        blocks: feature numbers, shape [blocks, features per block], or None.
    """

    name: str
    classes: Tensor
    legality: Legality
    reason: str = ""
    tie: int | None = None
    blocks: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.classes)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the features sit along a run of labels: for each place its space (-1: none), feature, and occurrence."""

    space: Tensor
    feature: Tensor
    occurrence: Tensor


@dataclass(frozen=True, eq=False)
class FeatureSpaces:
    """The spaces of a part of a program, and the classes behind them.

    Attributes:
        klass: label -> class, shape [labels].
        pinned: class -> why it is pinned, with the kind of pin.
        space_of, feature_of: class -> its space (-1: none), and its number there.
        tie_of: class -> the tie group of which it is a block that no parameter holds (-1: none); its number among the
            blocks is in `feature_of`.
        consumed: (parameter, field number) pairs that are summed over against activations.
        block_of: class -> the class of the block that it moves with, -1 if there is none.
    """

    labelling: Labelling
    spaces: tuple[FeatureSpace, ...]
    klass: Tensor
    space_of: Tensor
    feature_of: Tensor
    tie_of: Tensor
    pins: dict[int, tuple[str, PinKind]]
    consumed: frozenset[tuple[str, int]]
    block_of: Tensor
    touched: dict[str, set[int]] = field(default_factory=dict)

    def layout(self, labels: Tensor) -> Layout:
        """Space, feature and occurrence of every place of a field (flattened in order)."""
        flat = labels.reshape(-1)
        classes = torch.where(flat > 0, self.klass[flat.clamp(min=0)], -1)
        space = torch.where(classes >= 0, self.space_of[classes.clamp(min=0)], -1)
        feature = torch.where(space >= 0, self.feature_of[classes.clamp(min=0)], -1)
        return Layout(space, feature, occurrences(classes))

    def layout_with_blocks(self, labels: Tensor) -> Layout:
        """The same, and blocks that no parameter holds are in spaces of their own: that of tie group t has the number
        behind the last space, plus t."""
        own = self.layout(labels)
        flat = labels.reshape(-1)
        classes = self.klass[flat.clamp(min=0)]
        tie = torch.where(flat > 0, self.tie_of[classes], -1)
        space = torch.where(tie >= 0, len(self.spaces) + tie, own.space)
        return Layout(space, torch.where(tie >= 0, self.feature_of[classes], own.feature), own.occurrence)

    def renumbered(self, order: Sequence[int], like: FeatureSpaces) -> FeatureSpaces:
        """The same with what is space `order[s]` as space s, and tie groups with the numbers that they have in `like`,
        where space s is the same."""
        numbers = torch.full((len(order) + 1,), -1, device="cpu")
        numbers[list(order)] = torch.arange(len(order), device="cpu")
        pairs = [(self.spaces[own], like.spaces[s]) for s, own in enumerate(order)]
        ties = {own.tie: twin.tie for own, twin in pairs if own.tie is not None}
        tie_of = self.tie_of.clone()
        for own, tie in ties.items():
            tie_of[self.tie_of == own] = -1 if tie is None else tie

        spaces = tuple(replace(own, tie=twin.tie) for own, twin in pairs)
        return replace(self, spaces=spaces, space_of=numbers[self.space_of], tie_of=tie_of)

    def pin_of(self, labels: Tensor) -> tuple[str, PinKind] | None:
        """(reason, kind) of the worst pin among the labels: output before barrier before fixed; None if free."""
        flat = labels.reshape(-1)
        found = {self.pins[c] for c in self.klass[flat[flat > 0]].unique().tolist() if c in self.pins}
        order = {"output": 0, "barrier": 1, "fixed": 2}
        return min(found, key=lambda pin: order[pin[1]], default=None)


def slots(layout: Layout, space: int) -> Tensor:
    """Places of the features of a space along a run, [occurrences, n]."""
    here = (layout.space == space).nonzero().flatten()
    times = int(layout.occurrence[here].max()) + 1
    count = len(here) // times
    result = torch.empty(times, count, dtype=torch.int64, device="cpu")
    result[layout.occurrence[here], layout.feature[here]] = here
    return result


def solve(
    labelling: Labelling,
    nodes: Collection[str] | None = None,
    *,
    pinned: Mapping[int, str] | None = None,
    entering: Collection[str] = (),
) -> FeatureSpaces:
    """The feature spaces of the part of the graph made of `nodes` (all if None).

    `pinned` maps further labels to a reason to leave them alone. `entering`: nodes in front of that part whose values
    enter it; their features are written there, as those of a parameter are.
    """
    chosen = [name for name in labelling.constraints if nodes is None or name in nodes]
    constraints = [labelling.constraints[name] for name in chosen]
    params = {param for name in chosen for param in labelling.touches[name]}
    solver = Solver(
        labelling.size,
        _joined([pairs for stated in constraints for pairs in stated.equal]),
        _joined([pairs for stated in constraints for pairs in stated.blocks]),
        *_pins(labelling.size, constraints, pinned or {}),
    )
    fields = {id(run): run for name in sorted(params) for run in labelling.params[name].fields}
    fields |= {id(run): run for name in chosen for run in labelling.seen[name]}
    written = {name: labelling.fields.get(name, ()) for name in entering}
    fields |= {id(run): run for runs in written.values() for run in runs}
    runs = Runs.of([run.reshape(-1).numpy() for run in fields.values()], labelling.size)
    more = np.zeros(labelling.size, np.uint64)

    while True:
        fingerprints = fingerprints_of(solver, runs, more)
        units, deep, tangles = units_of(solver, fingerprints)
        rigid = [unit.classes for unit in units if unit.is_rigid]
        if tangles or rigid or deep:
            more[solver.labels_of()] += fingerprints.view(np.uint64)  # what is given up below still tells members apart
        if hold_unique(solver, fingerprints, tangles + deep):
            continue
        if tangles:
            untangle(solver, fingerprints, tangles)
        elif rigid or deep:
            solver.merge(rigid + deep)
        else:
            break

    roles = Roles.of(labelling, solver, constraints, params, written)
    return _assemble(labelling, solver, fingerprints, units, constraints, roles)


def _joined(pairs: list[Tensor]) -> Ints:
    return torch.cat([torch.zeros(2, 0, dtype=torch.int64, device="cpu"), *pairs], 1).numpy()


def _pins(
    size: int, constraints: Sequence[Constraints], further: Mapping[int, str]
) -> tuple[Ints, list[tuple[str, PinKind]]]:
    """For each label the number of the reason why it is pinned (0: it is not), and the reasons."""
    numbers: dict[tuple[str, PinKind], int] = {}
    pins = np.zeros(size, np.int64)
    for kind in ("fixed", "barrier", "output"):  # the last one written wins
        for pin in reversed([pin for stated in constraints for pin in stated.pins if pin.kind == kind]):
            pins[pin.labels.numpy()] = numbers.setdefault((pin.reason, pin.kind), len(numbers) + 1)
    for label, why in further.items():
        pins[label] = numbers.setdefault((why, "fixed"), len(numbers) + 1)
    return pins, [("", "fixed"), *numbers]


def _assemble(
    labelling: Labelling,
    solver: Solver,
    fingerprints: Ints,
    units: Sequence[Unit],
    constraints: Sequence[Constraints],
    roles: Roles,
) -> FeatureSpaces:
    """Group classes and units of one kind into spaces."""
    dual = np.zeros(solver.count, bool)
    for labels in (labels for stated in constraints for how, labels in stated.touched if how == "dual"):
        dual[solver.klass[labels.numpy()]] = True
    space_of, feature_of, tie_of = (torch.full((solver.count,), -1, device="cpu") for _ in range(3))
    spaces: list[FeatureSpace] = []

    def add(classes: Ints, tie: int | None = None, blocks: Tensor | None = None) -> None:
        named = roles.name(classes)
        if named is None:
            return

        index = torch.from_numpy(classes)
        space_of[index], feature_of[index] = len(spaces), torch.arange(len(classes), device="cpu")
        legality: Legality = "free" if tie is None else "blockwise"
        reason = "" if tie is None else _TIED
        if dual[classes].any():
            legality, reason = "relabel only", _DUAL
        elif roles.both[classes].any():
            legality, reason = "relabel only", _BOTH
        elif roles.bent[classes].any():
            legality, reason = "relabel only", _BENT

        spaces.append(FeatureSpace(named, index, legality, reason, tie, blocks))

    for classes in _singles(roles, solver, fingerprints, units):
        add(classes)
    families: dict[tuple[object, ...], list[Unit]] = defaultdict(list)
    for unit in units:
        families[int(fingerprints[unit.root]), unit.kind].append(unit)
    for tie, family in enumerate(families.values()):
        family.sort(key=lambda unit: unit.members[0][1])
        for cell in range(len(family[0].members)):
            rows = np.array([unit.members[cell][1] for unit in family], np.int64)
            order = np.argsort(rows, axis=None)
            places = np.empty(rows.size, np.int64)
            places[order] = np.arange(rows.size)
            add(rows.reshape(-1)[order], tie, torch.from_numpy(places.reshape(rows.shape)))
        roots = np.array([unit.root for unit in family])
        add(roots, tie, torch.arange(len(family), device="cpu")[:, None])
        if int(space_of[roots[0]]) < 0:
            tie_of[torch.from_numpy(roots)], feature_of[torch.from_numpy(roots)] = (
                tie,
                torch.arange(len(family), device="cpu"),
            )
    held = np.flatnonzero(solver.pinned)
    pins = {c: solver.reasons[why] for c, why in zip(held.tolist(), solver.pinned[held].tolist(), strict=True)}
    klass, block_of = torch.from_numpy(solver.klass), torch.full((solver.count,), -1, device="cpu")
    blocks, members = torch.from_numpy(solver.free_edges())
    block_of[members] = blocks
    return FeatureSpaces(labelling, tuple(spaces), klass, space_of, feature_of, tie_of, pins, roles.consumed, block_of)


def _singles(roles: Roles, solver: Solver, fingerprints: Ints, units: Sequence[Unit]) -> list[Ints]:
    """The classes that a parameter writes and that move on their own, by kind, in order."""
    alone = (roles.first < len(roles.names)) & (solver.pinned == 0)
    alone[[c for unit in units for c in unit.classes]] = False
    classes = np.flatnonzero(alone)
    _, start, which = np.unique(fingerprints[classes], return_index=True, return_inverse=True)
    order = np.argsort(start[which], kind="stable")
    return np.split(classes[order], np.flatnonzero(np.diff(start[which][order])) + 1) if classes.size else []


_DUAL = "two activations are multiplied and summed over it: both sides share one map"
_BOTH = "one parameter writes it and is summed over along it: both at once only a relabelling can be"
_BENT = "weights that sum over it are a function of parameters that is not linear"
_TIED = "its features move in whole blocks"

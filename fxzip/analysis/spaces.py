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

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from .fingerprints import Runs, fingerprints_of
from .grouping import FeatureSpace, Grouping, families, singles
from .labelling import Labelling
from .roles import Roles
from .rules import Constraints
from .rules.axis_labels import occurrences
from .rules.constraint_store import PinKind
from .solver import Ints, Solver, Unit, hold_unique, units_of, untangle


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
    return _assembled(labelling, solver, fingerprints, units, constraints, roles)


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


def _assembled(
    labelling: Labelling, solver: Solver, fingerprints: Ints, units: Sequence[Unit],
    constraints: Sequence[Constraints], roles: Roles,
) -> FeatureSpaces:  # fmt: skip
    """Group classes and units of one kind into spaces."""
    made = Grouping(solver, constraints, roles)
    for classes in singles(roles, solver, fingerprints, units):
        made.add(classes)
    for tie, family in enumerate(families(units, fingerprints)):
        made.add_tied(tie, family)

    held = np.flatnonzero(solver.pinned)
    pins = {c: solver.reasons[why] for c, why in zip(held.tolist(), solver.pinned[held].tolist(), strict=True)}
    klass, block_of = torch.from_numpy(solver.klass), torch.full((solver.count,), -1, device="cpu")
    blocks, members = torch.from_numpy(solver.free_edges())
    block_of[members] = blocks
    return FeatureSpaces(
        labelling,
        tuple(made.spaces),
        klass,
        made.space_of,
        made.feature_of,
        made.tie_of,
        pins,
        roles.consumed,
        block_of,
    )

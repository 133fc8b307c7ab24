"""Solve the facts for feature spaces: which features may change places with which.

Labels made equal fall into classes. Blocks and members of classes form a forest of units: a class outside of all
blocks is a unit of its own, a block with all it holds is one (an attention head, a convolution group). Units of the
same kind, that is the same occurrences in parameters and in the graph, may change places, and so may members of the
same kind inside one unit. Every legal relabelling that is used anywhere in fxzip is built from these two moves.

Simplifications, each to a smaller set of relabellings and so never to a wrong one:
* A block is its set of members: blocks with the same members are one, a block with one member is that member.
* Members of a pinned block take the block as part of their kind and leave it.
* A unit whose members are all of different kinds moves rigidly: it becomes one class.
* A unit that is no tree (two blockings across each other) gives up the blocking with the most blocks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from .labelling import Labelling

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """Features that may change places with one another.

    Attributes:
        name: the parameter that writes the features first.
        classes: class numbers, shape [n]; the features' order is that of this array.
        legality: "free", "blockwise" (whole blocks first, then inside a block), "relabel only" (averaging clusters
            would not be exact even through linear calls: q and k of a head), or "pinned".
        reason: why it is not free.
        tie: number of the tie group whose blocks move together, or None.
        blocks: feature numbers, shape [blocks, features per block], or None.
    """

    name: str
    classes: Tensor
    legality: str
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
        consumed: (parameter, field number) pairs that are summed over against activations.
    """

    labelling: Labelling
    spaces: tuple[FeatureSpace, ...]
    klass: Tensor
    space_of: Tensor
    feature_of: Tensor
    pins: dict[int, tuple[str, str]]
    consumed: frozenset[tuple[str, int]]
    touched: dict[str, set[int]] = field(default_factory=dict)

    def layout(self, labels: Tensor) -> Layout:
        """Space, feature and occurrence of every place of a field (flattened in order)."""
        flat = labels.reshape(-1)
        classes = torch.where(flat > 0, self.klass[flat.clamp(min=0)], -1)
        space = torch.where(classes >= 0, self.space_of[classes.clamp(min=0)], -1)
        feature = torch.where(space >= 0, self.feature_of[classes.clamp(min=0)], -1)
        return Layout(space, feature, _occurrences(classes))

    def pin_of(self, labels: Tensor) -> tuple[str, str] | None:
        """(reason, kind) of the worst pin among the labels: output before barrier before fixed; None if free."""
        flat = labels.reshape(-1)
        found = {self.pins[c] for c in self.klass[flat[flat > 0]].unique().tolist() if c in self.pins}
        order = {"output": 0, "barrier": 1, "fixed": 2}
        return min(found, key=lambda pin: order[pin[1]], default=None)


def _occurrences(classes: Tensor) -> Tensor:
    """For each place, how many earlier places hold the same class."""
    order = torch.argsort(classes, stable=True)
    ranked = classes[order]
    start = torch.ones_like(ranked, dtype=torch.bool)
    start[1:] = ranked[1:] != ranked[:-1]
    places = torch.arange(len(ranked))
    first = torch.where(start, places, 0).cummax(0).values if len(ranked) else places
    result = torch.empty_like(places)
    result[order] = places - first
    return result


@dataclass
class _Solver:
    """Classes under construction. `parent[label]` is the class; block edges and pins are kept by label."""

    size: int
    equal: list[Ints]
    blocks: Ints
    pins: dict[int, tuple[str, str]]
    klass: Ints = field(init=False)
    edges: Ints = field(init=False)
    pinned: dict[int, tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.settle()

    def union(self) -> None:
        pairs = np.concatenate([np.zeros((2, 0), np.int64), *self.equal], axis=1)
        graph = coo_matrix((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(self.size, self.size))
        self.klass = connected_components(graph, directed=False)[1].astype(np.int64)
        edges = self.klass[self.blocks]
        self.edges = np.unique(edges[:, edges[0] != edges[1]], axis=1)
        self.pinned = {}
        for label, why in self.pins.items():
            self.pinned.setdefault(int(self.klass[label]), why)

    def settle(self) -> None:
        """Union, then identify blocks by their members, until nothing changes."""
        while True:
            self.union()
            members: dict[int, list[int]] = defaultdict(list)
            for block, member in self.edges.T.tolist():
                members[block].append(member)
            first: dict[tuple[int, ...], int] = {}
            same = []
            for block, items in members.items():
                key = tuple(sorted(items))
                other = items[0] if len(items) == 1 else first.setdefault(key, block)
                if other != block:
                    same.append((block, other))
            changed = self._pin_blocks(members)
            if not same and not changed:
                return
            self._identify(same)

    def _pin_blocks(self, members: dict[int, list[int]]) -> bool:
        """A block with a pinned member is pinned."""
        changed = False
        for block, items in members.items():
            held = [m for m in items if m in self.pinned]
            if held and block not in self.pinned:
                self.pins[self.label_of(block)] = self.pinned[held[0]]
                changed = True
        return changed

    def label_of(self, klass: int) -> int:
        return int(np.argmax(self.klass == klass))

    def _identify(self, pairs: list[tuple[int, int]]) -> None:
        """Make classes equal, through one label of each."""
        if pairs:
            first = np.full(int(self.klass.max()) + 1, -1, np.int64)
            first[self.klass[::-1]] = np.arange(self.size - 1, -1, -1)
            self.equal.append(first[np.asarray(pairs, np.int64).T])

    def merge(self, groups: list[list[int]]) -> None:
        self._identify([(group[0], other) for group in groups for other in group[1:]])
        self.settle()

    def pin(self, classes: Collection[int], why: tuple[str, str]) -> None:
        for klass in classes:
            self.pins.setdefault(self.label_of(klass), why)
        self.settle()


def _kinds(labelling: Labelling, solver: _Solver, nodes: Collection[str], params: Collection[str]) -> Ints:
    """A 64-bit fingerprint per class: on which parameters, in which fields of the graph, and how often it occurs."""
    rng = np.random.default_rng(0)
    count = int(solver.klass.max()) + 1
    kinds = np.zeros(count, np.uint64)
    mark = np.uint64(0x9E3779B97F4A7C15)
    runs = [labels for name in sorted(params) for labels in labelling.params[name].fields]
    runs += [labels for name in nodes for labels in labelling.seen[name]]
    for labels in runs:
        flat = labels.reshape(-1).numpy()
        classes, times = np.unique(solver.klass[flat[flat > 0]], return_counts=True)
        salt = rng.integers(1, 2**63, dtype=np.uint64)
        kinds[classes] += salt * (times.astype(np.uint64) * mark + np.uint64(1))
    for block, member in solver.edges.T:
        if int(block) in solver.pinned:
            kinds[member : member + 1] += np.uint64((int(block) + 1) * int(mark) * 7 % 2**64)
    return kinds.view(np.int64)


@dataclass(frozen=True)
class _Unit:
    """A block with what it holds: root class, members by kind (each sorted)."""

    root: int
    members: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def kind(self) -> tuple[tuple[int, int], ...]:
        return tuple((kind, len(items)) for kind, items in self.members)


def _units(solver: _Solver, kinds: Ints) -> tuple[list[_Unit], list[list[int]], list[list[int]]]:
    """Split what is tied in blocks into units that are flat trees, deep trees (to be made rigid), and tangles."""
    free = np.array([int(b) not in solver.pinned and int(m) not in solver.pinned for b, m in solver.edges.T], bool)
    edges = solver.edges[:, free] if len(free) else solver.edges
    if not edges.size:
        return [], [], []
    count = int(solver.klass.max()) + 1
    graph = coo_matrix((np.ones(edges.shape[1], bool), (edges[0], edges[1])), shape=(count, count))
    component = connected_components(graph, directed=False)[1]
    groups: dict[int, list[int]] = defaultdict(list)
    for klass in np.unique(edges).tolist():
        groups[int(component[klass])].append(klass)
    parents: dict[int, set[int]] = defaultdict(set)
    for block, member in edges.T.tolist():
        parents[member].add(block)
    units, deep, tangles = [], [], []
    for classes in groups.values():
        roots = [c for c in classes if not parents[c]]
        if any(len(parents[c]) > 1 for c in classes) or len(roots) != 1:
            tangles.append(classes)
        elif any(parents[p] for c in classes for p in parents[c]):
            deep.append(classes)
        else:
            cells: dict[int, list[int]] = defaultdict(list)
            for c in classes:
                if c != roots[0]:
                    cells[int(kinds[c])].append(c)
            members = tuple((kind, tuple(sorted(items))) for kind, items in sorted(cells.items()))
            units.append(_Unit(roots[0], members))
    return units, deep, tangles


def _partners(solver: _Solver, kinds: Ints) -> list[list[int]]:
    """Pairs of overlapping blocks of which neither overlaps another block of the other's kind: they move as one."""
    parents: dict[int, list[int]] = defaultdict(list)
    for block, member in solver.edges.T.tolist():
        if block not in solver.pinned and member not in solver.pinned:
            parents[member].append(block)
    overlaps: dict[tuple[int, int], set[int]] = defaultdict(set)
    for blocks in parents.values():
        for a in blocks:
            for b in blocks:
                if a != b:
                    overlaps[a, int(kinds[b])].add(b)
    pairs = []
    for (a, _), others in overlaps.items():
        if len(others) == 1:
            (b,) = others
            if a < b and overlaps[b, int(kinds[a])] == {a}:
                pairs.append([a, b])
    return pairs


def _untangle(solver: _Solver, kinds: Ints, tangles: list[list[int]]) -> None:
    """Give up one of several blockings across each other: the kind with the most blocks keeps its places."""
    partners = _partners(solver, kinds)
    if partners:
        solver.merge(partners)
        return
    blocks = set(solver.edges[0].tolist())
    for classes in tangles:
        tally = Counter(int(kinds[c]) for c in classes if c in blocks)
        size = {k: -n for k, n in tally.items()}
        kind = min(size, key=lambda k: (size[k], k))
        why = ("it lies in several blockings across each other", "fixed")
        for c in classes:
            if c in blocks and int(kinds[c]) == kind:
                solver.pins.setdefault(solver.label_of(c), why)
    solver.settle()


def solve(labelling: Labelling, nodes: Collection[str] | None = None, *, pinned: dict[int, str] | None = None) -> FeatureSpaces:
    """The feature spaces of the part of the graph made of `nodes` (all if None).

    `pinned` maps further labels to a reason to leave them alone.
    """
    chosen = [name for name in labelling.facts if nodes is None or name in nodes]
    facts = [labelling.facts[name] for name in chosen]
    params = {param for name in chosen for param in labelling.touches[name]}
    pins = {label: (why, "fixed") for label, why in (pinned or {}).items()}
    for kind in ("output", "barrier", "fixed"):
        for fact in facts:
            for pin in fact.pins:
                if pin.kind == kind:
                    pins.update(dict.fromkeys(set(pin.labels.tolist()) - pins.keys(), (pin.reason, pin.kind)))
    equal = [pairs.numpy() for fact in facts for pairs in fact.equal]
    blocks = torch.cat([torch.zeros(2, 0, dtype=torch.int64), *(b for fact in facts for b in fact.blocks)], 1).numpy()
    solver = _Solver(labelling.size, equal, blocks, pins)
    while True:
        kinds = _kinds(labelling, solver, chosen, params)
        units, deep, tangles = _units(solver, kinds)
        rigid = [[u.root, *(c for _, items in u.members for c in items)] for u in units if _is_rigid(u)]
        if tangles:
            _untangle(solver, kinds, tangles)
        elif rigid or deep:
            solver.merge(rigid + deep)
        else:
            break
    return _assemble(labelling, solver, kinds, units, facts, params)


def _is_rigid(unit: _Unit) -> bool:
    return all(len(items) == 1 for _, items in unit.members)


def _assemble(
    labelling: Labelling, solver: _Solver, kinds: Ints, units: list[_Unit], facts: list, params: Collection[str]
) -> FeatureSpaces:
    """Group classes and units of one kind into spaces."""
    consumed_labels = _union([labels for fact in facts for labels in fact.consumed])
    dual = {int(c) for fact in facts for how, labels in fact.touched if how == "dual" for c in solver.klass[labels.numpy()]}
    first_param: dict[int, str] = {}
    consumed = set()
    for name in labelling.params:
        if name not in params:
            continue
        for place, labels in enumerate(labelling.params[name].fields):
            flat = labels.reshape(-1)
            if bool(torch.isin(flat, consumed_labels).any()):
                consumed.add((name, place))
            else:
                for c in np.unique(solver.klass[flat[flat > 0].numpy()]).tolist():
                    first_param.setdefault(c, name)
    count = int(solver.klass.max()) + 1
    space_of, feature_of = torch.full((count,), -1), torch.full((count,), -1)
    spaces: list[FeatureSpace] = []

    def add(classes: list[int], legality: str, reason: str, tie: int | None, blocks: Tensor | None) -> None:
        named = next((first_param[c] for c in classes if c in first_param), None)
        if named is None:
            return
        index = torch.tensor(classes)
        space_of[index], feature_of[index] = len(spaces), torch.arange(len(classes))
        spaces.append(FeatureSpace(named, index, legality, reason, tie, blocks))

    in_units = {c for unit in units for c in (unit.root, *(c for _, items in unit.members for c in items))}
    singles: dict[int, list[int]] = defaultdict(list)
    for c in sorted(first_param):
        if c not in in_units and c not in solver.pinned:
            singles[int(kinds[c])].append(c)
    for classes in singles.values():
        legality = "relabel only" if dual & set(classes) else "free"
        add(classes, legality, _DUAL if legality != "free" else "", None, None)
    families: dict[tuple, list[_Unit]] = defaultdict(list)
    for unit in units:
        families[(int(kinds[unit.root]), *unit.kind)].append(unit)
    for tie, family in enumerate(families.values()):
        family.sort(key=lambda unit: unit.members[0][1])
        for cell in range(len(family[0].members)):
            rows = [list(unit.members[cell][1]) for unit in family]
            flat = [c for row in rows for c in row]
            order = np.argsort(flat)
            classes = [flat[i] for i in order]
            place = np.empty(len(flat), np.int64)
            place[order] = np.arange(len(flat))
            relabel = bool(dual & set(classes))
            add(classes, "relabel only" if relabel else "blockwise", _DUAL if relabel else _TIED, tie,
                torch.from_numpy(place.reshape(len(rows), -1)))  # fmt: skip
        roots = [unit.root for unit in family]
        add(roots, "blockwise", _TIED, tie, torch.arange(len(roots))[:, None])
    klass = torch.from_numpy(solver.klass)
    return FeatureSpaces(labelling, tuple(spaces), klass, space_of, feature_of, dict(solver.pinned), frozenset(consumed))


_DUAL = "two activations are multiplied and summed over it: both sides share one map"
_TIED = "its features move in whole blocks"


def _union(tensors: list[Tensor]) -> Tensor:
    return torch.unique(torch.cat([torch.zeros(0, dtype=torch.int64), *tensors]))

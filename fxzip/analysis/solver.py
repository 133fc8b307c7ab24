"""From constraints to classes and units: union-find with blocks, all of it on flat integer arrays.

Labels made equal fall into classes. A block is its set of members: blocks with the same members are one, a block with
one member is that member, and a block with a pinned member is pinned. Classes that are tied in blocks form units; what
is no flat tree is simplified until it is one (see `spaces`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .rules.constraint_store import PinKind

Ints = NDArray[np.int64]
Why = tuple[str, PinKind]
"""Reason and kind of a pin."""


def unique_pairs(pairs: Ints, size: int) -> Ints:
    """The distinct columns of [2, E], entries below `size`."""
    keys = np.sort(pairs[0] * size + pairs[1])
    keys = keys[np.append(True, keys[1:] != keys[:-1])] if keys.size else keys
    return np.stack([keys // size, keys % size])


def components(pairs: Ints, size: int) -> Ints:
    """For each of `size` numbers, its component of the undirected graph with these edges."""
    graph = coo_matrix((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


@dataclass
class Solver:
    """Classes under construction. Constraints are kept by label, results (`klass`, `edges`, `pinned`) by class.

    `pins` holds one number per label, 0 if free, else an index into `reasons`. `stated` is `klass` as the constraints
    alone make it, before anything was merged to simplify.
    """

    size: int
    equal: Ints
    blocks: Ints
    pins: Ints
    reasons: list[Why]
    klass: Ints = field(init=False)
    stated: Ints = field(init=False)
    edges: Ints = field(init=False)  # [2, R]: block, member
    pinned: Ints = field(init=False)  # class -> index into `reasons`

    def __post_init__(self) -> None:
        self.blocks = unique_pairs(self.blocks, self.size)
        self.settle()
        self.stated = self.klass

    @property
    def count(self) -> int:
        return len(self.pinned)

    def _union(self) -> None:
        self.klass = components(self.equal, self.size)
        count = int(self.klass.max()) + 1
        edges = self.klass[self.blocks]
        self.edges = unique_pairs(edges[:, edges[0] != edges[1]], count)
        self.pinned = np.zeros(count, np.int64)
        labels = np.flatnonzero(self.pins)[::-1]  # of several reasons the first label's stays
        self.pinned[self.klass[labels]] = self.pins[labels]

        while True:  # a block with a pinned member is pinned
            block, member = self.edges[:, (self.pinned[self.edges[0]] == 0) & (self.pinned[self.edges[1]] > 0)]
            if not block.size:
                return
            self.pinned[block] = self.pinned[member]

    def settle(self) -> None:
        """Union, then identify blocks by their members, until nothing changes."""
        while True:
            self._union()
            salt = np.random.default_rng(1).integers(1, 2**63, self.count, dtype=np.uint64)
            digest, degree = np.zeros(self.count, np.uint64), np.zeros(self.count, np.int64)
            np.add.at(digest, self.edges[0], salt[self.edges[1]])
            np.add.at(degree, self.edges[0], 1)
            single = self.edges[:, degree[self.edges[0]] == 1]
            several = np.flatnonzero(degree > 1)
            _, first, inverse = np.unique(digest[several], return_index=True, return_inverse=True)
            twins = np.stack([several, several[first[inverse]]]) if several.size else np.zeros((2, 0), np.int64)
            same = np.concatenate([single, twins[:, twins[0] != twins[1]]], axis=1)
            if not same.size:
                return
            self._identify(same)

    def _identify(self, pairs: Ints) -> None:
        """Make classes equal, through one label of each."""
        self.equal = np.concatenate([self.equal, self.labels_of()[pairs]], axis=1)

    def labels_of(self) -> Ints:
        """The first label of each class."""
        first = np.empty(self.count, np.int64)
        first[self.klass[::-1]] = np.arange(self.size - 1, -1, -1)
        return first

    def merge(self, groups: Iterable[Sequence[int]]) -> None:
        """Make all classes of each group one."""
        pairs = [(group[0], other) for group in groups for other in group[1:]]
        self._identify(np.asarray(pairs, np.int64).reshape(-1, 2).T)
        self.settle()

    def pin(self, classes: Sequence[int], why: Why) -> None:
        """Pin further classes."""
        if why not in self.reasons:
            self.reasons.append(why)
        labels = self.labels_of()[np.asarray(classes, np.int64)]
        self.pins[labels] = np.where(self.pins[labels] > 0, self.pins[labels], self.reasons.index(why))
        self.settle()

    def free_edges(self) -> Ints:
        """Edges between classes that may both move."""
        return self.edges[:, (self.pinned[self.edges] == 0).all(0)]


@dataclass(frozen=True)
class Unit:
    """A block with what it holds: root class, members by kind (each sorted)."""

    root: int
    members: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def kind(self) -> tuple[tuple[int, int], ...]:
        return tuple((kind, len(items)) for kind, items in self.members)

    @property
    def classes(self) -> list[int]:
        return [self.root, *(c for _, items in self.members for c in items)]

    @property
    def is_rigid(self) -> bool:
        """No two members may change places."""
        return all(len(items) == 1 for _, items in self.members)


def units_of(solver: Solver, fingerprints: Ints) -> tuple[list[Unit], list[list[int]], list[list[int]]]:
    """Split what is tied in blocks into units that are flat trees, deep trees (to be made rigid), and tangles."""
    edges = solver.free_edges()
    if not edges.size:
        return [], [], []

    component = components(edges, solver.count)
    parents = np.bincount(edges[1], minlength=solver.count)  # in how many blocks a class lies
    classes = np.unique(edges)
    count = int(component.max()) + 1
    tangled = np.bincount(component[classes[parents[classes] == 0]], minlength=count) != 1  # other than one root
    tangled[component[classes[parents[classes] > 1]]] = True
    nested = np.zeros(count, bool)
    nested[component[edges[0][parents[edges[0]] > 0]]] = True
    deep, tangles = (
        [part.tolist() for part in _runs(classes[which[component[classes]]], component)]
        for which in (nested & ~tangled, tangled)
    )
    flat = classes[~(nested | tangled)[component[classes]]]
    cells: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)

    for part in _runs(flat[parents[flat] == 1], component, fingerprints):
        cells[int(component[part[0]])].append((int(fingerprints[part[0]]), tuple(part.tolist())))

    roots = _runs(flat[parents[flat] == 0], component)
    units = [Unit(int(root[0]), tuple(cells[int(component[root[0]])])) for root in roots]
    return units, deep, tangles


def _runs(classes: Ints, *keys: Ints) -> list[Ints]:
    """The classes (sorted) grouped by keys of theirs; groups in the order of the keys."""
    if not classes.size:
        return []
    classes = classes[np.lexsort([classes, *(key[classes] for key in reversed(keys))])]
    changes = np.zeros(len(classes) - 1, bool)
    for key in keys:
        changes |= key[classes[1:]] != key[classes[:-1]]
    return np.split(classes, np.flatnonzero(changes) + 1)


def _partners(solver: Solver, fingerprints: Ints) -> list[list[int]]:
    """Pairs of overlapping blocks of two kinds of which neither overlaps another of the other's kind: they move as one.

    What lies in one of the two only is still told apart by its kind.
    """
    edges = solver.free_edges()
    edges = edges[:, np.argsort(edges[1], kind="stable")]
    times = np.bincount(edges[1], minlength=solver.count)[edges[1]]
    overlaps: dict[tuple[int, int], set[int]] = defaultdict(set)

    for several in np.unique(times[times > 1]).tolist():
        for blocks in np.unique(edges[0, times == several].reshape(-1, several), axis=0).tolist():
            for a in blocks:
                for b in blocks:
                    if fingerprints[a] != fingerprints[b]:
                        overlaps[a, int(fingerprints[b])].add(b)

    pairs = []
    for (a, _), others in overlaps.items():
        if len(others) == 1:
            (b,) = others
            if a < b and overlaps[b, int(fingerprints[a])] == {a}:
                pairs.append([a, b])

    return pairs


def hold_unique(solver: Solver, fingerprints: Ints, groups: list[list[int]]) -> bool:
    """Pin blocks that are the only ones of their kind, so that what they hold may move on its own; whether any was."""
    alone = np.unique(fingerprints, return_counts=True)
    once = set(alone[0][alone[1] == 1].tolist())
    blocks = set(np.unique(solver.free_edges()[0]).tolist())
    held = [c for classes in groups for c in classes if c in blocks and int(fingerprints[c]) in once]
    if held:
        solver.pin(held, ("it is the only block of its kind", "fixed"))
    return bool(held)


def untangle(solver: Solver, fingerprints: Ints, tangles: list[list[int]]) -> None:
    """Give up one of several blockings across each other: the kind with the fewest blocks keeps its places.

    Blocks of the other kinds then move along inside these: of heads and places inside a head, where the same parameters
    serve all heads, the places may move, in all heads alike. Of kinds with equally many blocks it is the one whose
    labels come first, whatever else there is in the network: its trunk alone is simplified alike.
    """
    partners = _partners(solver, fingerprints)
    if partners:
        solver.merge(partners)
        return

    blocks = set(np.unique(solver.edges[0]).tolist())

    first = solver.labels_of()
    held: list[int] = []
    for classes in tangles:
        tally = Counter(int(fingerprints[c]) for c in classes if c in blocks)
        earliest = {int(fingerprints[c]): int(first[c]) for c in sorted(classes, key=lambda c: -first[c])}
        kind = min(tally, key=lambda k: (tally[k], earliest[k]))
        held += [c for c in classes if c in blocks and int(fingerprints[c]) == kind]

    solver.pin(held, ("it lies in several blockings across each other", "fixed"))

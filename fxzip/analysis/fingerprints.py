"""Fingerprints of classes: two classes with one fingerprint, of one kind, may change places.

A fingerprint holds all that a relabelling has to respect and that is known without the other classes: in which fields
of the graph a class occurs and how often; where several of its labels meet in one field, in which order (the first,
second, ... occurrence of one class goes to the place of the first, second, ... of the other, and that must be the same
correspondence in every field); in which pinned blocks it lies; and, refined until nothing new shows (colours of
Weisfeiler and Leman), the fingerprints of its blocks and of its members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .solver import Ints, Solver

Marks = NDArray[np.uint64]

_OCCURRENCE, _RANK = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True)
class Runs:
    """The labels of every field of the graph, flattened, with what of them does not depend on the classes.

    `marks`: for each label a random linear function, mod 2**64, of how often it occurs in each field. `labels` and
    `number`: the distinct labels of each run, all in one array, and the number of their run.
    """

    runs: tuple[Ints, ...]
    salts: Marks
    marks: Marks
    labels: Ints
    number: Ints

    @classmethod
    def of(cls, fields: Sequence[Ints], size: int) -> Runs:
        known = {run.tobytes(): run for run in (run[run > 0] for run in fields)}  # a copy would tell nothing new
        runs = tuple(known.values())
        salts = np.random.default_rng(0).integers(1, 2**63, len(runs), dtype=np.uint64)
        marks = np.zeros(size, np.uint64)

        distinct = []
        for run, salt in zip(runs, salts, strict=True):
            if run.size > size:
                times = np.bincount(run, minlength=size)
                marks += times.astype(np.uint64) * salt
                distinct.append(np.flatnonzero(times))
            else:
                np.add.at(marks, run, salt)
                distinct.append(_distinct(run))

        number = np.repeat(np.arange(len(runs)), [len(labels) for labels in distinct])
        return cls(runs, salts, marks, np.concatenate([np.zeros(0, np.int64), *distinct]), number)


def fingerprints_of(solver: Solver, runs: Runs, more: Marks) -> Ints:
    """A 64-bit fingerprint per class; `more` is added to what the fields say, by label."""
    fingerprints = np.zeros(solver.count, np.uint64)
    np.add.at(fingerprints, solver.klass, runs.marks + more)
    rank = _add_orders(fingerprints, solver, runs)
    block, member, twist = _edges(solver, rank)
    _add_held(fingerprints, solver, rank)

    distinct = 0
    while member.size and (found := len(_distinct(fingerprints))) > distinct:
        distinct = found
        up, down = _scrambled(fingerprints[block] + twist), _scrambled(~fingerprints[member] + twist)
        np.add.at(fingerprints, member, up)
        np.add.at(fingerprints, block, down)
        fingerprints = _scrambled(fingerprints)

    return fingerprints.view(np.int64)


def _edges(solver: Solver, rank: Ints | None) -> tuple[Ints, Ints, Marks]:
    """Block, member, and a number that says by which of their labels they are tied, where that matters."""
    if rank is None:
        return solver.edges[0], solver.edges[1], np.zeros(solver.edges.shape[1], np.uint64)
    ends = solver.klass[solver.blocks]
    return _ties(solver.blocks[:, ends[0] != ends[1]], solver.klass, solver.klass, rank)


def _add_held(fingerprints: Marks, solver: Solver, rank: Ints | None) -> None:
    """Add in which pinned blocks a class lies.

    Blocks that were merged to simplify, and are pinned since, keep each its own place: they are told apart as stated.
    """
    ends = solver.klass[solver.blocks]
    labels = solver.blocks[:, (ends[0] != ends[1]) & (solver.pinned[ends[0]] > 0)]
    block, member, twist = _ties(labels, solver.stated, solver.klass, np.zeros(solver.size) if rank is None else rank)
    salts = np.random.default_rng(2).integers(1, 2**63, solver.size, dtype=np.uint64)
    np.add.at(fingerprints, member, _scrambled(salts[block] + twist))


def _ties(labels: Ints, block_of: Ints, member_of: Ints, rank: NDArray) -> tuple[Ints, Ints, Marks]:
    """Distinct (block, member, twist) of pairs of labels; the twist tells by which of their labels they are tied."""
    twist = _scrambled(rank[labels[0]].astype(np.uint64) * _OCCURRENCE + rank[labels[1]].astype(np.uint64) * _RANK)
    block, member = block_of[labels[0]], member_of[labels[1]]
    keys = _scrambled(block.astype(np.uint64)) * _RANK + member.astype(np.uint64)
    _, first = np.unique(keys + twist, return_index=True)
    return block[first], member[first], twist[first]


def _add_orders(fingerprints: Marks, solver: Solver, runs: Runs) -> Ints | None:
    """Add the order of labels in every run where several labels of one class meet.

    Returns the rank of each label in its class if that is one of these, else 0; None if there are none.
    """
    keys = np.sort(runs.number * solver.count + solver.klass[runs.labels])
    shared = _distinct(keys[1:][keys[1:] == keys[:-1]])
    if not shared.size:
        return None

    rank = _occurrences(solver.klass)  # of each label in its class
    several = np.zeros(solver.count, bool)

    for number in _distinct(shared // solver.count).tolist():
        mine = shared[shared // solver.count == number] % solver.count
        several[mine] = True
        run = runs.runs[number]
        run = run[several[solver.klass[run]]]
        classes = solver.klass[run]
        places = _occurrences(classes).astype(np.uint64) * _OCCURRENCE + rank[run].astype(np.uint64) * _RANK
        np.add.at(fingerprints, classes, _scrambled(runs.salts[number] + places))
        several[mine] = False

    several[shared % solver.count] = True
    return np.where(several[solver.klass], rank, 0)


def _occurrences(values: Ints) -> Ints:
    """For each place, how many earlier places hold the same value."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    places = np.arange(len(values))
    start = np.append(True, ranked[1:] != ranked[:-1])[: len(values)]
    result = np.empty(len(values), np.int64)
    result[order] = places - np.maximum.accumulate(np.where(start, places, 0))
    return result


def _distinct(values: NDArray) -> NDArray:
    """The distinct values, sorted; `np.unique` is several times slower."""
    values = np.sort(values)
    return np.asarray(values[np.append(True, values[1:] != values[:-1])[: len(values)]])


def _scrambled(values: Marks) -> Marks:
    """A bijection of 64-bit numbers without structure (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))

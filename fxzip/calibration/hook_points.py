"""Where features can be observed: per space where they are read, else where they arise.

Features are read where weights are summed over with them, and where the trunk hands them over to the heads: what is
merged there is what the heads get.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..analysis.labelling import Site
from ..analysis.rules import across, varying
from ..analysis.spaces import slots
from ..partition.region import Trunk

Spot = tuple[str, int]
"""A call inside a node: its name, and which of the calls of that name it is."""

VALUE: Spot = ("", -1)
"""No call: the value of the node."""


@dataclass(frozen=True, eq=False)
class Watch:
    """One place where features of a space can be seen in all models: argument `arg` (-1: the result) of an ATen call
    inside a node, or the value of the node (call `VALUE`).

    `index[k]` has shape [occurrences, n_k]: where the features sit along the run made of `axes`. Axes that other
    features of the models lie along, in orders of their own, are `pooled`: averaged out. Where axis 0 holds both these
    and the batch, the former are `period` places next to one another; 0: there is no such period, or no need of one.
    `crossed`: such features lie along the run itself; all places of a feature are averaged then.
    """

    space: int
    node: tuple[str, ...]
    call: Spot
    arg: int
    axes: tuple[int, ...]
    pooled: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    index: tuple[Tensor, ...]
    period: int = 0
    crossed: bool = False
    sample: bool = False  # taken as it is, not for the moments

    @property
    def identity(self) -> tuple[Any, ...]:
        """What is seen, whatever the number of the space: watches of two trunks that agree in it see the same."""
        runs = tuple(index.numpy().tobytes() for index in self.index)
        return (
            self.node,
            self.call,
            self.arg,
            self.axes,
            self.pooled,
            self.period,
            self.sizes,
            runs,
            self.crossed,
            self.sample,
        )

    @cached_property
    def in_order(self) -> tuple[bool, ...]:
        """For each model whether the run is its features, once and in order: nothing is to be gathered then."""
        runs = zip(self.index, self.sizes, strict=True)
        return tuple(index.equal(torch.arange(math.prod(sizes), device="cpu")[None]) for index, sizes in runs)


def watches(trunk: Trunk) -> list[Watch]:
    """Where to look: per space where its features are read, else where they arise."""
    found: dict[int, list[tuple[bool, Watch]]] = defaultdict(list)
    names = [trunk.names(k) for k in range(len(trunk.spaces))]
    sites = [_by_place(label.sites) for label in trunk.labellings]
    beside: dict[tuple[str, Spot, int], list[Tensor]] = defaultdict(list)  # all fields there
    for (node, call, arg, _, _), site in sites[0].items():
        beside[node, call, arg].append(site.labels)
    for node, call, arg, axes, number in sites[0]:
        twins = tuple(own.get(node, "") for own in names)
        keys = [(twin, call, arg, axes, number) for twin in twins]
        if all(key in own for key, own in zip(keys, sites, strict=True)):
            here = [own[key] for key, own in zip(keys, sites, strict=True)]
            fields = beside[node, call, arg]
            pooled = _pooled(trunk, set().union(*map(varying, fields)) - set(axes))
            others = sites[0].get((node, call, arg, (0,), 0)) if 0 in pooled else None
            period = 0 if others is None else _period(others.labels.reshape(-1))
            for watch in _watches_at(trunk, here, twins, axes, pooled, period):
                crossed = _crossed(trunk, here[0].labels, fields)
                found[watch.space].append((here[0].consumed, replace(watch, crossed=crossed)))
    for watch in _handed_over(trunk):
        found[watch.space].append((True, watch))
    return [watch for candidates in found.values() for watch in _chosen(candidates)]


def _handed_over(trunk: Trunk) -> Iterator[Watch]:
    """The values that the heads take from the trunk. What is written over later is not what they take."""
    inside = set(trunk.nodes)
    program = trunk.alignment.programs[0]
    written = program.memory.written_by(inside)
    for node in program.module.graph.nodes:
        if node.name not in inside or node.op == "placeholder" or inside.issuperset(user.name for user in node.users):
            continue
        if written & program.memory.values.get(node.name, frozenset()):
            continue
        twins = trunk.alignment.pairs[node.name]
        fields = [label.fields.get(twin, ()) for label, twin in zip(trunk.labellings, twins, strict=True)]
        runs = [[tuple(sorted(varying(labels))) for labels in own] for own in fields]
        if any(own != runs[0] for own in runs):
            continue
        labelled = set().union(*runs[0])
        for axes, same in zip(runs[0], zip(*fields, strict=True), strict=True):
            shapes = [program.shapes[twin] for program, twin in zip(trunk.alignment.programs, twins, strict=True)]
            here = [Site(t, -1, -1, f, shape, True, *VALUE) for t, f, shape in zip(twins, same, shapes, strict=True)]
            crossed = _crossed(trunk, same[0], fields[0])
            for watch in _watches_at(trunk, here, twins, axes, _pooled(trunk, labelled - set(axes))):
                yield replace(watch, crossed=crossed)


def _by_place(sites: Iterable[Site]) -> dict[tuple[str, Spot, int, tuple[int, ...], int], Site]:
    """Sites by node, call, argument and axes; of several that agree in these, by their number."""
    found: dict[tuple[str, Spot, int, tuple[int, ...], int], Site] = {}
    seen: Counter[tuple[str, Spot, int, tuple[int, ...]]] = Counter()
    for site in sites:
        place = site.node, (site.name, site.nth), site.arg, tuple(sorted(varying(site.labels)))
        key = (*place, seen[place])
        found[key] = site
        seen[place] += 1
    return found


def _crossed(trunk: Trunk, labels: Tensor, fields: Iterable[Tensor]) -> bool:
    """Whether other features that may move lie along the axes of a field, across it."""
    if len(trunk.spaces) == 1:  # its features are in one order
        return False
    moving = (other for other in fields if bool((trunk.spaces[0].layout(other).space >= 0).any()))
    return any(across(labels, other) for other in moving)


def _pooled(trunk: Trunk, axes: set[int]) -> tuple[int, ...]:
    """Of a model by itself nothing has to be: its features are in one order."""
    return tuple(sorted(axes)) if len(trunk.spaces) > 1 else ()


def _period(labels: Tensor) -> int:
    """The length of the pattern that labels repeat; 0 if they repeat none.

    >>> _period(torch.tensor([3, 4, 5, 3, 4, 5])), _period(torch.tensor([3, 4, 5]))
    (3, 0)
    """
    again = (labels == labels[0]).nonzero().flatten()
    period = int(again[1]) if len(again) > 1 else 0
    whole = period and len(labels) % period == 0
    return period if whole and bool((labels.reshape(-1, period) == labels[:period]).all()) else 0


def _chosen(candidates: list[tuple[bool, Watch]]) -> list[Watch]:
    """Of the places where a space can be seen those that tell most.

    Not where another labelled axis must be averaged out, nor where the run takes in the batch, if there are others.
    """

    def rank(watch: Watch) -> tuple[bool, bool, int]:
        return bool(watch.pooled) or watch.crossed, 0 in watch.axes, len(watch.axes)

    best = min(rank(watch) for _, watch in candidates)
    own = [(consumed, watch) for consumed, watch in candidates if rank(watch) == best]
    read = [watch for consumed, watch in own if consumed]
    before = [replace(watch, sample=True) for consumed, watch in own if read and not consumed and watch.arg < 0]
    return (read or [watch for _, watch in own]) + before[:1]


def _watches_at(
    trunk: Trunk,
    here: list[Site],
    twins: tuple[str, ...],
    axes: tuple[int, ...],
    pooled: tuple[int, ...],
    period: int = 0,
) -> Iterator[Watch]:
    """A watch for every space all of whose features sit at this site in all models."""
    layouts = [own.layout(site.labels) for own, site in zip(trunk.spaces, here, strict=True)]
    sizes = tuple(tuple(site.shape[a] for a in axes) for site in here)
    for space in layouts[0].space[layouts[0].space >= 0].unique().tolist():
        if all(bool((layout.space == space).any()) for layout in layouts):
            index = tuple(slots(layout, space) for layout in layouts)
            if tuple(run.shape[1] for run in index) == trunk.sizes(space):
                spot = here[0].name, here[0].nth
                yield Watch(space, twins, spot, here[0].arg, axes, pooled, sizes, index, period)

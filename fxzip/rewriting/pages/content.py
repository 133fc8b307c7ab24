"""What a page shows, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .grouping import Group


@dataclass(frozen=True)
class Costs:
    """FLOPs, or parameters, of a zip and of the networks it was made of; of heads and stems one number per task."""

    name: str
    stems: tuple[int, ...]
    trunk: int
    heads: tuple[int, ...]
    originals: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.stems) + self.trunk + sum(self.heads)

    @property
    def side_by_side(self) -> int:
        return sum(self.originals)


@dataclass(frozen=True)
class Stop:
    """Why a node is not shared: the kinds are those of a report's nodes."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Node:
    """A node of the graph.

    Attributes:
        name: in the zip.
        title, label: two lines, what it is called and what it does.
        role: "call", "input", "output", "value" (a parameter or table), "unmerge", "merge", "check".
        part: "trunk", "merge", "head 0", "stem 0", ...; "batched": all heads in one call.
        path: of the module that it is in, or that it calls.
        group: the number of its group, -1 for none.
        inputs: numbers of the nodes it reads.
        sources: the nodes it stands for.
        shape: on the sample, None if it gives no tensor.
        flops, parameters: of it.
        spaces: numbers of the page's spaces whose features it carries.
        minor: whether it only has to do with sizes and numbers; such nodes are not drawn at first.
        stop: None, or why it is not shared.
        begins: whether a head begins with it: sharing stops in front of it.
    """

    name: str
    title: str
    label: str
    role: str
    part: str
    path: str
    group: int
    inputs: tuple[int, ...]
    sources: tuple[str, ...]
    shape: tuple[int, ...] | None
    flops: int
    parameters: int
    spaces: tuple[int, ...] = ()
    minor: bool = False
    stop: Stop | None = None
    begins: bool = False


@dataclass(frozen=True)
class Space:
    """A feature space: `sizes` and `errors` one per model, of a head's space one. `head`: None for the trunk's."""

    name: str
    sizes: tuple[int, ...]
    kept: int
    legality: str = ""
    reason: str = ""
    correlation: float | None = None
    errors: tuple[float | None, ...] | None = None
    folded: tuple[bool, ...] = ()
    head: int | None = None


@dataclass(frozen=True)
class Task:
    """A row of the table of tasks.

    Attributes:
        original, own: FLOPs of its network, and of those in the zip what it does not share.
        parameters: that it does not share.
        unmerges, mixed: how many values are given back to it, and how many of these by a matrix product.
        agreement: the share of held-out inputs on which it gives the class that its original gives, None if unknown.
        error: where it gives no classes, how far it is off its original, ‖z - y‖ / ‖y‖.
        held_out: how many inputs these were.
        stops: why sharing stops.
    """

    name: str
    original: int
    own: int
    parameters: int
    unmerges: int
    mixed: int
    agreement: float | None = None
    error: float | None = None
    held_out: int = 0
    stops: tuple[Stop, ...] = ()


@dataclass(frozen=True)
class Point:
    """A zip in the plot of cost against agreement. `line`: those of one name are joined; "" for the bound of all."""

    line: str
    label: str
    cost: float
    value: float
    chosen: bool = False


@dataclass(frozen=True)
class Page:
    """All that is on the page of a zipped network. `latency`: seconds of the zip, of the first network, and of all."""

    title: str
    headline: str
    costs: tuple[Costs, ...]
    tasks: tuple[Task, ...]
    nodes: tuple[Node, ...]
    groups: tuple[Group, ...]
    spaces: tuple[Space, ...]
    notes: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    measure: str = "agreement"
    text: str = ""
    latency: tuple[float, float, float] | None = None
    version: str = ""


@dataclass(frozen=True)
class TablePage:
    """The page of a table of zips.

    Attributes:
        measure: what the points are of, for the axis.
        points: the rows that have it.
        head, rows: names of the columns; for each row its "cells", texts, and its "error", None or why it has none.
        texts: how many columns, from the left, are text and not numbers.
    """

    title: str
    measure: str
    points: tuple[Point, ...]
    head: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    texts: int
    notes: Sequence[str] = ()
    version: str = ""

"""Stages of a graph: nodes in groups by the path of the module they are in, so that a large network can be looked at.

A group with a single group inside is one with it, a group of one node is that node, and where many lie side by side
they are taken together in runs. Groups are open or closed at first such that some twenty boxes are seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

MOST_SIDE_BY_SIDE = 40
SEEN_AT_FIRST = 18
MOST_AT_FIRST = 34


@dataclass(frozen=True)
class Group:
    """A stage, as the page draws it.

    Attributes:
        label, path: its name, and the path of the module.
        part: the part of the network it belongs to.
        parent: the number of the group it is in, -1 for none.
        role: "stage"; "part" for a whole head or stem; or what its nodes do together: "unmerge", "merge", "checks".
        open: whether its contents are seen at first.
    """

    label: str
    path: str
    part: str
    parent: int
    role: str
    open: bool = False


@dataclass(frozen=True)
class Placed:
    """Where a node is to be put.

    Attributes:
        number: of the node.
        name: of the node.
        part: the part of the network it belongs to.
        top: the label of the group that holds the part, "" for none.
        path: the names of the modules around it, outermost first.
        bundle: a number that all nodes have which do one thing together, with what that is called, or None.
        role: of the bundle.
        minor: whether it is not drawn at first.
    """

    number: int
    name: str
    part: str
    top: str = ""
    path: tuple[str, ...] = ()
    bundle: str | None = None
    role: str = "stage"
    minor: bool = False


@dataclass
class _Stage:
    """A group under way: nodes by their numbers, and groups."""

    label: str
    path: str
    part: str
    role: str = "stage"
    items: list[Placed | _Stage] = field(default_factory=list)
    named: dict[object, _Stage] = field(default_factory=dict)
    open: bool = False

    def inner(self, key: object, label: str, path: str, part: str, role: str = "stage") -> _Stage:
        """The group of that key inside."""
        if key not in self.named:
            self.named[key] = _Stage(label, path, part, role)
            self.items.append(self.named[key])
        return self.named[key]

    @property
    def stages(self) -> list[_Stage]:
        return [item for item in self.items if isinstance(item, _Stage)]

    @property
    def minor(self) -> bool:
        """Whether nothing in it is drawn at first."""
        return all(item.minor for item in self.items)

    @property
    def drawn(self) -> int:
        """How many things in it are drawn at first."""
        return sum(not item.minor for item in self.items)


def grouped(nodes: Iterable[Placed]) -> tuple[list[Group], dict[int, int]]:
    """The groups, each behind the one it is in, and for each node the number of its group, -1 for none.

    >>> a, b = (Placed(n, f"node {n}", "trunk", path=("a", "b")) for n in (0, 1))
    >>> groups, places = grouped([a, b, Placed(2, "add", "trunk")])
    >>> [group.label for group in groups], places
    (['a.b'], {0: 0, 1: 0, 2: -1})
    """
    root = _Stage("", "", "")
    for node in nodes:
        stage = root
        if node.bundle is not None:
            stage = root.inner((node.part, node.bundle), node.bundle, "", node.part, node.role)
        else:
            if node.top:
                stage = root.inner((node.part,), node.top, "", node.part, "part")
            for depth, name in enumerate(node.path):
                key = (node.part, name) if stage is root else name
                stage = stage.inner(key, name, ".".join(node.path[: depth + 1]), node.part)
        stage.items.append(node)
    _simplify(root, whole=True)
    _open(root)
    groups: list[Group] = []
    places: dict[int, int] = {}
    _listed(root, -1, groups, places)
    return groups, dict(sorted(places.items()))


def _simplify(stage: _Stage, *, whole: bool = False) -> None:
    """Groups of one are what they hold, and long rows become runs. In place."""
    for inner in stage.stages:
        _simplify(inner)
    stage.items = [
        item.items[0]
        if isinstance(item, _Stage) and len(item.items) == 1 and isinstance(item.items[0], Placed)
        else item
        for item in stage.items
    ]
    if stage.role == "stage" and not whole and len(stage.items) == 1 and isinstance(only := stage.items[0], _Stage):
        stage.label = f"{stage.label}.{only.label}" if only.path else stage.label
        stage.path, stage.items = only.path, only.items
    if len(stage.items) > MOST_SIDE_BY_SIDE:
        stage.items = list(_runs(stage))


def _runs(stage: _Stage) -> Iterator[Placed | _Stage]:
    """Long rows of one part, cut into runs of some √n."""
    length = max(round(math.sqrt(len(stage.items))), 2)
    row = [item for item in stage.items if isinstance(item, Placed) or item.role == "stage"]
    for start in range(0, len(row), length):
        run = row[start : start + length]
        label = " … ".join(item.name if isinstance(item, Placed) else item.label for item in (run[0], run[-1]))
        yield run[0] if len(run) == 1 else _Stage(label, stage.path, run[0].part, items=run)
    for item in stage.items:
        if isinstance(item, _Stage) and item.role != "stage":
            yield item


def _open(root: _Stage) -> None:
    """Open groups, a level at a time, while all that is seen is little enough. In place."""
    seen = root.drawn
    level = root.stages
    while level:
        shared = [stage for stage in level if stage.part == "trunk"]
        following: list[_Stage] = []
        for stages in (shared, [stage for stage in level if stage.part != "trunk"]):
            chosen = [stage for stage in stages if stage.role in ("stage", "part")]
            more = sum(stage.drawn - 1 for stage in chosen)
            little = len(level) == len(root.stages) and seen <= SEEN_AT_FIRST / 2
            if chosen and seen + more <= (MOST_AT_FIRST if little else SEEN_AT_FIRST):
                seen += more
                for stage in chosen:
                    stage.open = True
                    following += stage.stages
        level = following


def _listed(stage: _Stage, number: int, groups: list[Group], places: dict[int, int]) -> None:
    for item in stage.items:
        if isinstance(item, Placed):
            places[item.number] = number
        else:
            groups.append(Group(item.label, item.path, item.part, number, item.role, item.open))
            _listed(item, len(groups) - 1, groups, places)


def common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest path that all begin with.

    >>> common([("a", "b", "c"), ("a", "b", "d")])
    ('a', 'b')
    """
    result = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        result.append(names[0])
    return tuple(result)

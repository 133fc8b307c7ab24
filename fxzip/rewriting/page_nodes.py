"""The graph of a zipped network as a page shows it: its nodes, and the parts, stages and bundles that they are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from ..ops import merge, mix, require, unmerge
from ..partition.alignment import attribute
from .module import EmittedModule, is_unmerge, part_of, sources_of
from .node_facts import path_of
from .pages import Node, Placed, Stop
from .pages.grouping import common

_GIVEN_BACK: Mapping[Any, str] = {unmerge: "gather", mix: "matrix product", merge: "weighted means"}
_NONE: Mapping[str, Any] = {
    "path": "",
    "shape": None,
    "plain": False,
    "flops": 0,
    "spaces": [],
    "narrowed": [],
    "stop": None,
}


class Places:
    """In which part, stage and bundle the nodes of a graph are. `facts`: what the report says of nodes; `names`: of the
    tasks."""

    def __init__(self, zipped: EmittedModule, facts: Mapping[str, Any], names: Sequence[str]) -> None:
        self.order = list(zipped.graph.nodes)
        self.names, self.facts = names, facts
        self.paths = {node: self._path(node, facts.get(node.name, _NONE)["path"]) for node in self.order}
        for node in reversed(self.order):
            if not self.paths[node] and not node.all_input_nodes and node.op != "placeholder":
                users = [self.paths[user] for user in node.users if part_of(user) == part_of(node)]
                self.paths[node] = common(users)
        self.bundles = self._unmerges() | self._merges() | self._checks()

    def placed(self) -> list[Placed]:
        """All nodes, in order."""
        return [self._placed(number, node) for number, node in enumerate(self.order)]

    def _placed(self, number: int, node: fx.Node) -> Placed:
        part = part_of(node)
        kind, _, k = part.partition(" ")
        apart = node.op in ("placeholder", "output")
        top = "all heads" if part == "batched" else "" if not k or apart else self._called(kind, int(k))
        role, bundle = self.bundles.get(node, ("stage", None))
        path = () if apart else self.paths[node]
        minor = _minor(node, self.facts.get(node.name, _NONE))
        return Placed(number, node.name, part, top, path, bundle, role, minor)

    def _called(self, kind: str, k: int) -> str:
        """The name of the group of a head or stem."""
        name = self.names[k]
        return name if kind == "head" else f"{kind} {k}" if name == f"head {k}" else f"{kind} of {name}"

    def _path(self, node: fx.Node, known: str) -> tuple[str, ...]:
        """Names of the modules around a node."""
        if node.op in ("call_module", "get_attr"):
            return tuple(str(node.target).split(".")[1:-1])
        path = known or path_of(node)
        return tuple(path.split(".")) if path else ()

    def _unmerges(self) -> dict[fx.Node, tuple[str, str]]:
        """Nodes that together give a head its own features."""
        found: dict[fx.Node, tuple[str, str]] = {}
        for node in self.order:
            if is_unmerge(node):
                beside = [*node.all_input_nodes, *node.users]
                same = [n for n in beside if part_of(n) == part_of(node) and sources_of(n) == sources_of(node)]
                found |= dict.fromkeys([node, *same], ("unmerge", f"unmerge {node.name}"))
        return found

    def _merges(self) -> dict[fx.Node, tuple[str, str]]:
        return {
            node: ("merge", f"merge {', '.join(sources_of(node)[:1])}")
            for node in self.order
            if part_of(node) == "merge"
        }

    def _checks(self) -> dict[fx.Node, tuple[str, str]]:
        """What is taken for granted of the inputs, and what is computed for that alone."""
        found: dict[fx.Node, tuple[str, str]] = {}
        for node in reversed(self.order):
            only = node.users and all(user in found for user in node.users) and node.op != "placeholder"
            if node.target is require or only:
                found[node] = ("checks", "checks of the input")
        return found


class Nodes:
    """Nodes as the page shows them.

    `facts`: what the report says of nodes; `first`: for each head the number of the first space of its own; `groups`:
    for each node, by its number, that of its group.
    """

    def __init__(
        self, zipped: EmittedModule, facts: Mapping[str, Any], first: Sequence[int], places: Places,
        groups: Mapping[int, int],
    ) -> None:  # fmt: skip
        self.zipped, self.facts, self.first, self.places, self.groups = zipped, facts, first, places, groups
        self.order = places.order
        self.numbers = {node: number for number, node in enumerate(self.order)}

    def nodes(self) -> tuple[Node, ...]:
        """All of them, in order."""
        return tuple(self._node(node) for node in self.order)

    def _node(self, node: fx.Node) -> Node:
        known = self.facts.get(node.name, _NONE)
        part = part_of(node)
        first = self.first[int(part.split()[1])] if part.startswith("head ") and self.first else 0
        title, label, parameters = self._said(node)
        stop = known["stop"]
        return Node(
            name=node.name, title=title, label=label, role=_role(node), part=part,
            path=".".join(str(node.target).split(".")[1:]) if node.op in ("call_module", "get_attr") else known["path"],
            group=self.groups[self.numbers[node]],
            inputs=tuple(self.numbers[source] for source in node.all_input_nodes),
            sources=sources_of(node), shape=None if known["shape"] is None else tuple(known["shape"]),
            flops=known["flops"], parameters=parameters, minor=_minor(node, known),
            spaces=(*known["spaces"], *(first + own for own in known["narrowed"])),
            stop=None if stop is None else Stop(stop["kind"], stop["reason"]), begins=self._begins(node),
        )  # fmt: skip

    def _said(self, node: fx.Node) -> tuple[str, str, int]:
        """What a node is called, what it does, and how many parameters it has."""
        last = _last(str(node.target))
        if node.op == "call_module":
            called: nn.Module = attribute(self.zipped, str(node.target))
            return last, type(called).__name__, sum(p.numel() for p in called.parameters())
        if node.op == "get_attr":
            value = attribute(self.zipped, str(node.target))
            trained = isinstance(value, nn.Parameter)
            return last, "parameter" if trained else "constant", value.numel() if trained else 0
        if node.op == "call_function":
            return node.name, _GIVEN_BACK.get(node.target) or str(getattr(node.target, "__name__", node.target)), 0
        return node.name, {"placeholder": "input", "output": "output"}.get(node.op, str(node.target)), 0

    def _begins(self, node: fx.Node) -> bool:
        """Whether a head begins with a node: it computes with a value of another part, or one given back to it."""
        bundles = self.places.bundles
        part = part_of(node)
        if not part.startswith("head ") or node.op in ("output", "get_attr") or node in bundles:
            return False
        return any(part_of(source) != part or source in bundles for source in node.all_input_nodes)


def _minor(node: fx.Node, known: Mapping[str, Any]) -> bool:
    """Whether a node only has to do with sizes and numbers."""
    return bool(known["plain"]) and node.op not in ("placeholder", "output")


def _last(target: str) -> str:
    """The last name of a path; where that is a number, the last two.

    >>> _last("trunk.layer1.0.conv1"), _last("trunk.layer1.0")
    ('conv1', 'layer1.0')
    """
    *above, last = target.split(".")
    return f"{above[-1]}.{last}" if last.isdigit() and len(above) > 1 else last


def _role(node: fx.Node) -> str:
    if is_unmerge(node):
        return "unmerge"
    if node.op in ("placeholder", "output", "get_attr"):
        return {"placeholder": "input", "output": "output"}.get(node.op, "value")
    return "merge" if node.target is merge else "check" if node.target is require else "call"

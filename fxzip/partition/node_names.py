"""How places in a program are named: by node, or by the module inside which nodes were recorded."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import fx

from ..errors import CutError

_NO_MODULE = "_empty_nn_module_stack"  # how torch.export fills in where a node was made outside of all modules


def module_path(node: fx.Node) -> str:
    """Path of the module inside which a node was recorded, its own for a module call; "" at the top."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for value in stack.values() if not (path := str(value[0])).startswith(_NO_MODULE)]
    return paths[-1].removeprefix("L['self'].") if paths else ""


def cut_names(program_nodes: Sequence[fx.Node]) -> list[str]:
    """All names that `until` takes: node names and module paths, in order."""
    names: dict[str, None] = {}
    for node in program_nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        path = module_path(node)
        parts = path.split(".") if path else []
        for end in range(1, len(parts) + 1):
            names.setdefault(".".join(parts[:end]))
        names.setdefault(node.name)
    return list(names)


def named(order: Sequence[fx.Node], name: str, *, what: str = "until", of: str = "the first model") -> list[fx.Node]:
    """The nodes that `name` stands for: one node, or all nodes of a module.

    Raises:
        CutError: there is no such node; the message speaks of the argument `what`.
    """
    inside = [n for n in order if module_path(n) == name or module_path(n).startswith(name + ".")]
    found = inside or [n for n in order if n.name == name]
    if not found:
        names = cut_names(order)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[-3:]
        raise CutError(
            f"`{what}` must name a module or a node of {of}; found {name!r}. "
            f"The nearest valid names are {', '.join(repr(name) for name in near)}."
        )
    return found

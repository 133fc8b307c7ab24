"""Tuples that one call gives and another takes as they are: their items become values of their own.

`lstm(x, state)` reads `(state[0], state[1])` then, with a node for each item. So an item can be followed, and given
back to a head, whatever it came in. Only plain containers, with nothing in them but tensors and None, are taken apart:
of what else is in one it is not known that it is always the same.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from .structure import Structure


def unpacked(module: fx.GraphModule, structures: Mapping[str, Structure]) -> fx.GraphModule | None:
    """The graph with such items, on the same parameters; None if nothing is to be done.

    >>> import torch
    >>> from .containers import flatten
    >>> class Passing(torch.nn.Module):
    ...     def forward(self, x):
    ...         return torch.cat(x.chunk(2))
    >>> module = fx.symbolic_trace(Passing())
    >>> found = unpacked(module, {"chunk": flatten(torch.ones(4).chunk(2))[1]})
    >>> [node.name for node in found.graph.nodes]
    ['x', 'chunk', 'getitem_1', 'getitem', 'cat', 'output']

    Args:
        structures: of values that are no tensors, by node.
    """
    graph = copy.deepcopy(module.graph)
    changed = False
    for node in list(graph.nodes):
        structure = structures.get(node.name)
        readers = [user for user in node.users if not _takes_apart(user, node)]
        if structure is None or node.op == "placeholder" or not readers or not _is_plain(structure):
            continue
        whole = structure.build(_items(graph, node, structure))
        for reader in readers:
            _hand(reader, node, whole)
        changed = True
    if not changed:
        return None
    graph.lint()
    return fx.GraphModule(module, graph, "GraphModule").eval()


def _hand(reader: fx.Node, node: fx.Node, whole: Any) -> None:
    """Let a call read something else in place of a node."""

    def other(own: fx.Node) -> Any:
        return whole if own is node else own

    reader.args, reader.kwargs = fx.node.map_arg((reader.args, reader.kwargs), other)


def _takes_apart(user: fx.Node, node: fx.Node) -> bool:
    """Whether a call asks a container for something, and does not take it as it is."""
    asks = user.op == "call_method" or user.target in (operator.getitem, getattr, len)
    return asks and user.args[:1] == (node,)


def _is_plain(structure: Structure) -> bool:
    if structure.kind is None or structure.is_constant:
        return structure.kind is None or structure.constant is None
    return structure.recipe is None and _holds_what_it_is_given(structure.kind) and all(map(_is_plain, structure.parts))


def _holds_what_it_is_given(kind: type) -> bool:
    """Whether making such a container asks nothing of its items: `PackedSequence`, a named tuple, asks for a device."""
    if not issubclass(kind, tuple):
        return True
    made_by = next(own for own in kind.__mro__ if "__new__" in vars(own))
    return made_by is tuple or "_fields" in vars(made_by)


def _items(graph: fx.Graph, node: fx.Node, structure: Structure) -> list[fx.Node]:
    """The tensors in a container, by the numbers of the leaves, each taken out right behind the call that gives it."""
    found: dict[int, fx.Node] = {}

    def take(held: fx.Node, own: Structure) -> None:
        if own.kind is None:
            found[own.place] = held
        elif not own.is_constant:
            keys = own.keys if own.kind is dict else range(len(own.parts))
            for key, part in reversed(list(zip(keys, own.parts, strict=True))):
                if not part.is_constant:
                    take(_item(graph, held, key), part)

    take(node, structure)
    return [found[place] for place in sorted(found)]


def _item(graph: fx.Graph, held: fx.Node, key: Any) -> fx.Node:
    """The node that takes out an item, behind what holds it; the one that is there, if there is one."""
    there = [user for user in held.users if user.target is operator.getitem and user.args == (held, key)]
    if there:
        held.append(there[0])
        return there[0]
    with graph.inserting_after(held):
        return graph.call_function(operator.getitem, (held, key))

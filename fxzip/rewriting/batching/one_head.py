"""One head out of a network whose heads run together: the same calls for one head, with its part of the parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from ...ops import batch_of_heads, join_heads, mix, part_heads, turn_heads, unmerge
from ...partition.alignment import attribute
from ...tracing.provenance import provenance_of
from .emit import PART, put
from .stacking import with_tensors


def alone(graph: fx.Graph, root: nn.Module, k: int, heads: int) -> None:
    """Let a graph make the calls of all heads for head k only, and `root` hold what it then names. In place; modules in
    `root` stay as they are.

    Parts of stacked parameters are parameters that lie in the memory of the whole.
    """
    own = [node for node in graph.nodes if provenance_of(node).part == PART]
    named = [node for node in own if node.op == "get_attr" or _holds(node, root)]
    found = {}
    for node in named:
        whole = attribute(root, str(node.target))
        found[str(node.target)] = (
            _part(whole, k, heads) if isinstance(whole, Tensor) else _module(node, whole, k, heads)
        )
    for node in own:
        _for_one(node, k, heads)
    root.add_module(PART, nn.Module())
    for path, value in found.items():
        put(root, path, value)


def _holds(node: fx.Node, root: nn.Module) -> bool:
    module = attribute(root, str(node.target)) if node.op == "call_module" else None
    return module is not None and bool([*module.parameters(), *module.buffers()])


def _for_one(node: fx.Node, k: int, heads: int) -> None:
    if node.target is join_heads:
        node.replace_all_uses_with(node.args[0][k])  # type: ignore[arg-type, index]
    elif node.target is part_heads:
        for own in list(node.users):  # other heads' too: sizes are read of the first
            own.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    elif node.target in (turn_heads, batch_of_heads):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    elif node.target in (unmerge, mix):
        *before, sizes = node.args
        node.args = (*before, tuple(size // heads for size in sizes))  # type: ignore[union-attr, operator]


def _part(whole: Tensor, k: int, heads: int) -> Tensor:
    own = whole.detach().tensor_split(heads)[k] if whole.ndim else whole
    return nn.Parameter(own, whole.requires_grad) if isinstance(whole, nn.Parameter) else own


def _module(node: fx.Node, whole: nn.Module, k: int, heads: int) -> Any:
    """A module of one head; a convolution that reads one value for all heads has the inputs of one."""
    made: Any = with_tensors(whole, lambda own: own.tensor_split(heads)[k] if own.ndim else own, [whole])
    grouped = provenance_of(node.all_input_nodes[0]).part == PART
    for name in ("out_channels", "num_features", "num_channels", "num_groups"):
        if hasattr(made, name):
            setattr(made, name, getattr(made, name) // heads)
    for name in ("in_channels", "groups") if grouped else ():
        if hasattr(made, name):
            setattr(made, name, getattr(made, name) // heads)
    return made

"""Copies of what a program's graph module holds, without its graph, and without memory for what is not needed."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from ..partition.alignment import attribute

Tensors = Sequence[Mapping[str, Tensor]]
"""For each model its parameters and buffers by name."""

_GRAPH = frozenset(["_graph", "_code", "_tracer_cls", "_tracer_extras", "_graphmodule_cls_name", "meta", "_lineno_map"])


def parts(module: fx.GraphModule, values: Mapping[str, Tensor], kept: Collection[str]) -> nn.Module:
    """A copy of what a graph module holds, without its graph. Of tensors that are not kept only the shapes."""
    held: dict[int, Any] = {}
    tensors = [(*pair, True) for pair in module.named_parameters()]
    for name, own, trained in (*tensors, *((*pair, False) for pair in module.named_buffers())):
        value = values[name].detach()
        value = value.clone() if name in kept else value.new_zeros(()).expand(own.shape)
        held[id(own)] = nn.Parameter(value, own.requires_grad) if trained else value
    root = nn.Module()
    vars(root).update(copy.deepcopy({k: v for k, v in vars(module).items() if k not in _GRAPH}, held))
    return root


def held_by(module: fx.GraphModule, read: Collection[str], nodes: Collection[str]) -> set[str]:
    """Tensors that these nodes read, the others of the modules that they call, and constants of the graph."""
    called = [str(node.target) for node in module.graph.nodes if node.op == "call_module" and node.name in nodes]
    alias = {id(t): name for name, t in (*module.named_parameters(), *module.named_buffers())}
    owned = [t for name in called for own in [attribute(module, name)] for t in (*own.parameters(), *own.buffers())]
    taken = [attribute(module, str(node.target)) for node in module.graph.nodes if node.op == "get_attr"]
    constants = [value for value in taken if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)]
    return {*read, *(alias[id(t)] for t in (*owned, *constants) if id(t) in alias)}

"""The last rung: `torch.export` with a dynamic batch, brought to the form that the other rungs give.

That is: one placeholder for each argument, the model's own parameters under their own names, the output in its own
structure, no guards.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from ..inputs import Call, batch_size, leaves
from .symbolic import bind, is_built, structure_arg

_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Position of the submodule among the arguments."""


def trace_export(root: nn.Module, call: Call, *, dynamic: bool) -> fx.GraphModule:
    """The exported graph of the root; `call` should have a batch of at least 2, because export fixes sizes of 1.

    >>> module = trace_export(nn.Linear(3, 4), Call((torch.ones(2, 3),), {}), dynamic=True)
    >>> module(torch.ones(5, 3)).shape
    torch.Size([5, 4])
    """
    shapes = None
    if dynamic:
        shapes = torch.export.ShapesCollection()
        for value in leaves(call):
            if value.ndim and value.shape[0] == batch_size(call):
                shapes[value] = {0: torch.export.Dim.AUTO}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(root, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)
    module = exported.module(check_guards=False)
    graph = module.graph
    inline_regions(module, graph)
    _own_placeholders(root, graph, call)
    _own_output(graph, exported.call_spec.out_spec)
    graph.set_codegen(CodeGen())
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    attributes = {
        str(node.target): _attribute(root, module, str(node.target)) for node in graph.nodes if node.op == "get_attr"
    }
    return fx.GraphModule(attributes, graph, class_name="GraphModule")


def _attribute(root: nn.Module, module: nn.Module, target: str) -> Any:
    """The root's own tensor if it has one of that name: the same object as before, tied if it was tied."""
    for owner in (root, module):
        try:
            value = operator.attrgetter(target)(owner)
        except AttributeError:
            continue
        if isinstance(value, Tensor) or owner is module:
            return value
    raise AttributeError(target)


def inline_regions(module: nn.Module, graph: fx.Graph) -> None:
    """Copy the body of regions without gradient, or with autocast off, into the graph: they change nothing here."""
    for node in list(graph.nodes):
        position = _REGIONS.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
        if position is None or (position == 4 and node.args[2] is not False):
            continue
        holder = node.args[position]
        body = getattr(module, holder.target)
        inline_regions(body, body.graph)
        inputs = iter(node.args[position + 1 :])
        env: dict[fx.Node, Any] = {}
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "placeholder":
                    env[inner] = next(inputs)
                elif inner.op != "output":
                    env[inner] = graph.node_copy(inner, env.__getitem__)
                    if inner.op == "get_attr":
                        env[inner].target = f"{holder.target}.{inner.target}"
        results = fx.node.map_arg(body.graph.output_node().args[0], env.__getitem__)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not holder.users:
            graph.erase_node(holder)


def _own_placeholders(root: nn.Module, graph: fx.Graph, call: Call) -> None:
    """One placeholder for each argument, by its name, in the order of the signature."""
    flat = iter([node for node in graph.nodes if node.op == "placeholder"])
    first = next(iter(graph.nodes))
    named = bind(root, call)[1]
    given = dict(zip(named, call.args, strict=False)) | call.kwargs  # in the order in which they were flattened
    pieces = {name: [next(flat) for _ in pytree.tree_leaves(value)] for name, value in given.items()}
    with graph.inserting_before(first):
        wholes = {name: graph.placeholder(name) for name in named}
    for name, value in given.items():
        paths = [path for path, _ in pytree.tree_flatten_with_path(value)[0]]
        for path, piece in zip(paths, pieces[name], strict=True):
            last = wholes[name]
            with graph.inserting_before(piece):
                for step in path:
                    index = step.key if isinstance(step, pytree.MappingKey) else step.idx  # type: ignore[attr-defined]
                    last = graph.call_function(operator.getitem, (last, index))
            piece.replace_all_uses_with(last)
            graph.erase_node(piece)


def _own_output(graph: fx.Graph, structure: pytree.TreeSpec) -> None:
    output = graph.output_node()
    flat = list(pytree.tree_leaves(output.args[0], is_leaf=lambda item: isinstance(item, fx.Node) or item is None))

    def create(kind: type, kwargs: dict[str, Any]) -> fx.Node:
        with graph.inserting_before(output):
            return graph.call_function(kind, (), kwargs)

    def arg(value: Any) -> Any:
        if is_built(value):
            return structure_arg(create, value, arg)
        if isinstance(value, dict):
            return {key: arg(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            items = [arg(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    output.args = (arg(pytree.tree_unflatten(flat, structure)),)

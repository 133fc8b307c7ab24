"""In-place calls become ordinary ones: `y = f_(x)` turns into `y = f(x)`, and what reads x afterwards reads y.

That is right if nothing else that is read later lies in the memory of x: no view of it made before the call, no value
that x is a view of, no parameter or buffer. `memory` says so; a call for which it is not is left as it is.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .aliasing import Memory
from .calls import Call

_OPERATORS = {
    getattr(operator, "i" + name): getattr(operator, name)
    for name in [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and_",
        "or_",
        "xor",
        "lshift",
        "rshift",
    ]
    if hasattr(operator, "i" + name)
} | {operator.iand: operator.and_, operator.ior: operator.or_}


def out_of_place(module: fx.GraphModule, calls: Sequence[Call]) -> tuple[fx.GraphModule, list[nn.Module]] | None:
    """A graph with ordinary calls for in-place ones, on the same parameters, and the leaf modules whose flag `inplace`
    has to be cleared for it; None when there is nothing to do. `calls`: inputs to run the graph on.

    >>> model, call = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)), Call((torch.ones(1, 2),), {})
    >>> changed = out_of_place(fx.symbolic_trace(model), [call])
    >>> changed[1]
    [ReLU(inplace=True)]
    """
    graph = copy.deepcopy(module.graph)
    writers = _writers(module, graph)
    if not writers:
        return None
    runs = [Memory(module, call) for call in calls]
    originals = dict(zip(graph.nodes, module.graph.nodes, strict=True))
    chosen, before = set(writers), 0
    while len(chosen) != before:
        before = len(chosen)
        chosen = {node for node in chosen if not _is_seen_elsewhere(node, chosen, originals, runs)}
        stuck = {leaf for node, leaf in writers.items() if node not in chosen and leaf is not None}
        chosen = {node for node in chosen if writers[node] not in stuck}  # a module writes at all its calls or at none
    if not chosen:
        return None
    for node in writers:
        if node in chosen:
            if (twin := _twin(node)) is not None:
                node.target, node.args, node.kwargs = twin
            _read_result_instead(node)
    graph.lint()
    cleared = dict.fromkeys(leaf for node, leaf in writers.items() if node in chosen and leaf is not None)
    return fx.GraphModule(module, graph), list(cleared)


def _writers(module: fx.GraphModule, graph: fx.Graph) -> dict[fx.Node, nn.Module | None]:
    """Nodes with an in-place call, in order, and the leaf modules that make it."""
    found: dict[fx.Node, nn.Module | None] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            leaf = module.get_submodule(str(node.target))
            if getattr(leaf, "inplace", False) is True:
                found[node] = leaf
        elif _twin(node) is not None:
            found[node] = None
    return found


def _given(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _is_seen_elsewhere(
    node: fx.Node, chosen: set[fx.Node], originals: dict[fx.Node, fx.Node], runs: Sequence[Memory]
) -> bool:
    """Whether what the node writes is read through a value whose readers would not read the result instead."""
    given = _given(node)
    if not isinstance(given, fx.Node):
        return True
    redirected = {node, given}
    while given in chosen:  # who reads x after y = f_(x) reads y
        given = _given(given)
        redirected.add(given)
    order = list(originals)
    later = {originals[other] for other in order[order.index(node) + 1 :]}
    if _only_reshapes(node) and given.op != "get_attr":  # the twin is a view: it hides no write, and needs but be read
        alike = [other for other in order if _twin(other) is not None and other not in chosen]
        return any(_given(other) in redirected and any(node < user for user in other.users) for other in alike)
    written = originals[_given(node)]
    return any(run.seen_elsewhere(written, {originals[other] for other in redirected}, later) for run in runs)


def _only_reshapes(node: fx.Node) -> bool:
    """Whether the call changes the shape of its input, and none of its values (`squeeze_`, `t_`)."""
    packet = getattr(torch.ops.aten, str(node.target), None) if node.op == "call_method" else None
    overloads = [node.target] if packet is None else [getattr(packet, name) for name in packet.overloads()]
    if "resize" in str(node.target):
        return False
    return any(torch.Tag.inplace_view in getattr(overload, "tags", ()) for overload in overloads)


Twin = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _twin(node: fx.Node) -> Twin | None:
    """Target and arguments of the ordinary call for an in-place one; None if the node is none."""
    target: Any = node.target
    if node.op == "call_method":
        twin = str(target)[:-1]
        if not str(target).endswith("_") or str(target).endswith("__") or not callable(getattr(Tensor, twin, None)):
            return None
        if twin in ("requires_grad", "share_memory", "apply", "map", "set"):
            return None
        return twin, node.args, node.kwargs
    if node.op != "call_function":
        return None
    if target in _OPERATORS:
        return _OPERATORS[target], node.args, node.kwargs
    return _function_twin(node, target)


def _function_twin(node: fx.Node, target: Any) -> Twin | None:
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None) if name.endswith("_") else None
        if packet is None or target._overloadname not in packet.overloads():
            return None
        return getattr(packet, target._overloadname), node.args, node.kwargs
    name = getattr(target, "__name__", "")
    if name.endswith("_") and not name.startswith("_") and not name.endswith("__"):
        for place in (torch, torch.nn.functional):
            if getattr(place, name, None) is target and callable(getattr(place, name[:-1], None)):
                return getattr(place, name[:-1]), node.args, node.kwargs
    try:
        signature = inspect.signature(target)
        bound = signature.bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    if bound.arguments.get("inplace") is not True:
        return None
    if "inplace" in node.kwargs:
        return target, node.args, {**node.kwargs, "inplace": False}
    position = list(signature.parameters).index("inplace")
    return target, (*node.args[:position], False, *node.args[position + 1 :]), node.kwargs


def _read_result_instead(node: fx.Node) -> None:
    given = _given(node)
    for user in list(given.users):
        if user is not node and node < user:
            user.replace_input_with(given, node)

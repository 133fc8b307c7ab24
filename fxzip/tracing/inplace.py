"""In-place calls become ordinary ones: `y = f_(x)` turns into `y = f(x)`, and what reads x afterwards reads y.

That is right unless another view of x is read later; so the caller compares the outputs and keeps the original graph
when they differ.
"""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

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


def out_of_place(module: fx.GraphModule) -> tuple[fx.GraphModule, list[nn.Module]] | None:
    """A graph with ordinary calls for in-place ones, on the same parameters, and the leaf modules whose flag `inplace`
    has to be cleared for it; None when there is nothing to do.

    >>> changed = out_of_place(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))))
    >>> changed[1]
    [ReLU(inplace=True)]
    """
    graph = copy.deepcopy(module.graph)
    flagged = [m for m in module.modules() if getattr(m, "inplace", False) is True]
    changed = bool(flagged)
    for node in list(graph.nodes):
        if node.op == "call_module":
            mutates = module.get_submodule(str(node.target)) in flagged
        else:
            mutates = _rewritten(node)
        if mutates:
            changed = True
            _read_result_instead(node)
    if not changed:
        return None
    graph.lint()
    return fx.GraphModule(module, graph), flagged


def _rewritten(node: fx.Node) -> bool:
    """Replace the call of the node by its ordinary twin; whether it was an in-place call."""
    target: Any = node.target
    if node.op == "call_method":
        twin = str(target)[:-1]
        if not str(target).endswith("_") or str(target).endswith("__") or not callable(getattr(Tensor, twin, None)):
            return False
        if twin in ("requires_grad", "share_memory", "apply", "map", "set"):
            return False
        node.target = twin
        return True
    if node.op != "call_function":
        return False
    if target in _OPERATORS:
        node.target = _OPERATORS[target]
        return True
    return _function_rewritten(node, target)


def _function_rewritten(node: fx.Node, target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None) if name.endswith("_") else None
        if packet is None or target._overloadname not in packet.overloads():
            return False
        node.target = getattr(packet, target._overloadname)
        return True
    name = getattr(target, "__name__", "")
    if name.endswith("_") and not name.startswith("_") and not name.endswith("__"):
        for place in (torch, torch.nn.functional):
            if getattr(place, name, None) is target and callable(getattr(place, name[:-1], None)):
                node.target = getattr(place, name[:-1])
                return True
    try:
        signature = inspect.signature(target)
        bound = signature.bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return False
    if bound.arguments.get("inplace") is not True:
        return False
    position = list(signature.parameters).index("inplace")
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
    else:
        node.args = (*node.args[:position], False, *node.args[position + 1 :])
    return True


def _read_result_instead(node: fx.Node) -> None:
    given = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(given, fx.Node):
        return
    for user in list(given.users):
        if user is not node and node < user:
            user.replace_input_with(given, node)

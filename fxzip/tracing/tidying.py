"""Nodes that only ask questions and whose answers nobody reads are taken out of a fresh trace.

Not `eliminate_dead_code`: that also drops in-place calls. Here a node goes only if its target is known to be pure.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

_ASSERTIONS = frozenset(
    [
        "_assert",
        "_assert_scalar",
        "_assert_async",
        "_assert_tensor_metadata",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_check",
        "_assert_is_none",
    ]
)
_QUESTIONS = frozenset(
    ["size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex"]
)
_PURE = frozenset(
    getattr(operator, name)
    for name in [
        "eq",
        "ne",
        "lt",
        "gt",
        "le",
        "ge",
        "pos",
        "neg",
        "invert",
        "add",
        "sub",
        "mul",
        "floordiv",
        "truediv",
        "mod",
        "pow",
        "and_",
        "or_",
        "xor",
        "getitem",
        "truth",
    ]
) | {getattr, len, int, math.sqrt, math.ceil, math.floor, torch.ops.aten.sym_size.int, torch.numel, torch.arange}


def tidied(module: fx.GraphModule) -> fx.GraphModule:
    """The module itself, without assertions, unread questions about sizes, and type annotations.

    >>> module = fx.symbolic_trace(lambda x: (x.shape, x.relu())[1])
    >>> [node.name for node in tidied(module).graph.nodes]
    ['x', 'relu', 'output']
    """
    graph = module.graph
    for node in reversed(list(graph.nodes)):
        node.type = None
        if node.name == "self":  # in the code that torch.fx writes this is the module
            node._rename("self_")
        if node.users:
            continue
        name = getattr(node.target, "__name__", "").split(".")[0]
        asserts = node.op == "call_function" and name in _ASSERTIONS
        pure = node.op == "call_function" and node.target in _PURE
        asks = node.op == "call_method" and node.target in _QUESTIONS
        if asserts or pure or asks or node.op == "get_attr":
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    return module

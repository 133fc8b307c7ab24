"""Nodes of whose values nobody reads more than the shape, the dtype or the device.

`w[0].numel()` takes one row out of a weight and looks at none of its numbers. What such a node does to features does
not matter, so it says nothing of labels. What a layer gives is never among these nodes, nor anything in front of it: a
network whose outputs are but zeros in the shape of its logits still has features, and they are checked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..tracing import Program
from ..tracing.questions import SHAPE_FUNCTIONS, SHAPE_METHODS

_ITSELF = frozenset(["type_as", "expand_as", "view_as", "reshape_as"])
"""Calls that take no more than shape, dtype or device of their second operand."""
_FILLED = ("zeros", "ones", "full", "empty")
_LIKE = frozenset(
    [f"new_{name}" for name in _FILLED]
    + [f"{name}_like" for name in (*_FILLED, "rand", "randn", "randint")]
    + ["sym_size", "sym_numel", "sym_stride", "len"]
)
"""Calls that take no more of their first operand."""
_ATTRIBUTES = frozenset(
    ["shape", "ndim", "dtype", "device", "layout", "is_cuda", "itemsize", "nbytes", "requires_grad"],
)


def unread(program: Program) -> frozenset[str]:
    """The nodes of a program that give a tensor, or several, of which no value is read.

    >>> import torch
    >>> from torch import nn
    >>> from fxzip.tracing import trace
    >>> class Scaled(nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x) * self.weight[0].numel() ** -0.5
    >>> unread(trace(Scaled(3, 4), torch.ones(2, 3)))
    frozenset({'getitem'})
    """
    found: set[str] = set()
    layers = _layers(program)
    writing = program.mutators | program.memory.writes.keys()
    for node in reversed(program.module.graph.nodes):
        if node.op == "placeholder" or node in layers:
            continue
        if not node.users or node.name in writing:  # may be there for what it does
            continue
        asked = node.name in program.shapes  # else a tuple, of which items are taken
        if all(user.name in found or (asked and _asks(user, node)) for user in node.users):
            found.add(node.name)
    return frozenset(found)


def _layers(program: Program) -> set[fx.Node]:
    """The calls in which parameters, or what is made of them, meet what depends on the input."""
    holding = {name.rpartition(".")[0] for name, _ in program.module.named_parameters()}
    given, made, layers = set[fx.Node](), set[fx.Node](), set[fx.Node]()
    for node in program.module.graph.nodes:
        sources = set(node.all_input_nodes)
        if node.op == "placeholder" or sources & given:
            given.add(node)
        own = node.op == "call_module" and any(f"{name}.".startswith(f"{node.target}.") for name in holding)
        if node.op == "get_attr" or own or sources & made:
            (layers if node in given else made).add(node)
    return layers


def _asks(user: fx.Node, node: fx.Node) -> bool:
    """Whether a call on a value takes nothing of it but its shape, dtype or device."""
    if user.op == "call_method" and user.target in SHAPE_METHODS and user.target != "type":  # that may be a copy
        return user.args[:1] == (node,)
    if user.op == "call_function" and user.target in SHAPE_FUNCTIONS:
        return user.target is not getattr or user.args[1] in _ATTRIBUTES
    if user.op != "call_method" and not (user.op == "call_function" and _is_told_by_its_name(user.target)):
        return False
    name = getattr(user.target, "__name__", str(user.target)).split(".")[0]
    place = 1 if name in _ITSELF else 0 if name in _LIKE else None
    return place is not None and [n for n, value in enumerate(user.args) if value is node] == [place]


def _is_told_by_its_name(function: Any) -> bool:
    """Whether a function is PyTorch's or Python's of its name, and no other that is called so."""
    if isinstance(function, torch._ops.OpOverload):
        return function.namespace == "aten"
    return function is len or getattr(torch, getattr(function, "__name__", ""), None) is function

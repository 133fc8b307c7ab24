"""Elementwise calls: labels at the same place of two operands become equal, or blocks of one another."""

from __future__ import annotations

from torch import Tensor

from .axis_labels import AxisLabels
from .invocation import Invocation
from .meeting import meet, note_blocks


def elementwise(call: Invocation) -> AxisLabels:
    """add, mul, relu, where, ... with broadcasting from the right."""
    ndim = call.out.ndim
    placed = [x.place(range(ndim - x.ndim, ndim), ndim) for x in call.operands()]
    note_blocks(call, list(zip(call.tensors(), placed, strict=True)))
    return meet(call.store, placed, f"`{call.name}`")


def gated(call: Invocation) -> AxisLabels:
    """glu: the two halves of an axis are multiplied, so their features are one."""
    x = call.operand(call.args[0])
    dim = call.arg(1, "dim", -1) % x.ndim

    result = []
    for labels in x.fields:
        if labels.shape[dim] == 1:
            result.append(labels)
            continue
        first, second = labels.chunk(2, dim)
        result.append(call.store.agree(first, second))

    return tuple(result)


def first_operand(call: Invocation) -> AxisLabels:
    """Calls whose result has the features of their first operand unchanged."""
    first = next(iter(call.tensors()))
    return call.operand(first).fields


def unlabelled(call: Invocation) -> AxisLabels | list[AxisLabels]:
    """Factories and `*_like` calls: nothing of the operands' features is in the result."""
    if isinstance(call.out, Tensor):
        return ()
    return [() for _ in call.out] if isinstance(call.out, (tuple, list)) else ()

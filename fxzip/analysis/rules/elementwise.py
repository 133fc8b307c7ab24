"""Elementwise calls: labels at the same place of two operands become equal, or blocks of one another."""

from __future__ import annotations

from torch import Tensor

from .axis_labels import AxisLabels, varying
from .invocation import Invocation, names
from .meeting import meet, note_blocks


def elementwise(call: Invocation) -> AxisLabels:
    """add, mul, relu, where, ... with broadcasting from the right."""
    ndim = call.out.ndim
    placed = [x.place(range(ndim - x.ndim, ndim), ndim) for x in call.operands()]
    note_blocks(call, list(zip(call.tensors(), placed, strict=True)))
    return meet(call.store, placed, f"`{call.name}`")


_SUMS = names("add sub rsub neg positive clone detach alias _to_copy to copy real imag dropout tril triu")
_PRODUCTS = names("mul div")


def bent(call: Invocation) -> AxisLabels:
    """Fields of operands in which an elementwise call is no linear function: f(w₁ + w₂) is not f(w₁) + f(w₂).

    A product with what does not vary along a field's axes is linear in it.
    """
    if call.name in _SUMS or not isinstance(call.out, Tensor):
        return ()

    ndim = call.out.ndim
    operands = call.operands()
    if call.name not in _PRODUCTS or len(operands) < 2:
        single = call.name in _PRODUCTS and isinstance(call.args[0], Tensor)  # by a number
        return () if single else tuple(labels for x in operands for labels in x.fields)

    pairs = list(zip(operands, [x.place(range(ndim - x.ndim, ndim), ndim) for x in operands], strict=True))
    result = []
    for number, (x, placed) in enumerate(pairs):
        others = [other.fields for _, other in pairs[:number] + pairs[number + 1 :]]
        axes = frozenset(axis for fields in others for labels in fields for axis in varying(labels))
        divisor = call.name == "div" and number > 0
        result += [f for f, at in zip(x.fields, placed.fields, strict=True) if divisor or varying(at) & axes]

    return tuple(result)


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

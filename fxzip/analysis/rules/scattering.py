"""Calls that put values at places of another tensor: index_add, scatter, index_put, slice_scatter."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .axis_labels import AxisLabels, Operand, varying
from .invocation import Invocation
from .joining import joined
from .meeting import meet


def _without(call: Invocation, operand: Operand, axes: frozenset[int]) -> Operand:
    """The operand with places, not features, along `axes`."""
    fields = []
    for labels in operand.fields:
        call.store.fix(labels, axes, f"`{call.name}` puts it at places by number")
        rest = call.store.project(labels, varying(labels) - axes)
        if rest is not None:
            fields.append(rest)
    return replace(operand, fields=tuple(fields), loose=operand.loose - axes)


def scatter(call: Invocation) -> AxisLabels:
    """index_add(x, dim, index, source), scatter(x, dim, index, source or number): places along `dim` are numbers."""
    x, index = call.operand(call.args[0]), call.operand(call.args[2])
    axes = frozenset({call.args[1] % max(x.ndim, 1)})
    axes |= index.loose if index.ndim == x.ndim else frozenset()
    parts = [x] + [call.operand(value) for value in call.args[3:4] if isinstance(value, Tensor)]
    return meet(call.store, [_without(call, part, axes) for part in parts], f"`{call.name}`")


def index_put(call: Invocation) -> AxisLabels | None:
    """index_put(x, indices, values): indices on adjacent axes; the values' last axes are those of x behind them."""
    x, values, items = call.operand(call.args[0]), call.operand(call.args[2]), call.args[1]
    spans = [i for i, item in enumerate(items) if item is not None]
    if spans != list(range(spans[0], spans[-1] + 1)):
        return None
    if len(spans) == 1 and _mask(items[spans[0]]) and values.tensor.numel() == 1:
        return _put_where(call, x, call.operand(items[spans[0]]), values, spans[0])

    for item in (items[i] for i in spans):
        for labels in call.operand(item).fields:
            call.store.pin(labels, f"`{call.name}` takes it for a position")

    first, last = spans[0], spans[-1] + 1 + sum(items[i].ndim - 1 for i in spans if _mask(items[i]))
    x = _without(call, x, frozenset(range(first, last)))
    tail = x.ndim - last
    rest = [a for a in range(values.ndim) if a < values.ndim - tail]
    values = _without(call, values, frozenset(rest))
    if values.ndim > tail and first:
        return None if values.fields else x.fields

    fields = tuple(labels.reshape(labels.shape[len(rest) :]) for labels in values.fields)
    loose = frozenset(a - len(rest) for a in values.loose)
    inner = values.tensor.flatten(0, len(rest) - 1)[0] if rest and values.tensor.numel() else values.tensor
    part = Operand(inner, fields, values.static, loose, values.learned)

    return meet(call.store, [x, part.place(range(x.ndim - inner.ndim, x.ndim), x.ndim)], f"`{call.name}`")


def _mask(item: Tensor) -> bool:
    return item.dtype in (torch.bool, torch.uint8)


def _put_where(call: Invocation, x: Operand, mask: Operand, value: Operand, first: int) -> AxisLabels:
    """One value wherever a mask is true: `where(mask, value, x)`, the mask's axes those of x from `first` on."""
    placed = mask.place(range(first, first + mask.ndim), x.ndim)
    one = Operand(value.tensor.reshape(()), (), value.static, frozenset(), value.learned)
    return meet(call.store, [x, placed, one.place((), x.ndim)], f"`{call.name}`")


def slice_scatter(call: Invocation) -> AxisLabels | None:
    """slice_scatter(x, source, dim, start, end, step): x before, the source, x after."""
    x, source = call.operand(call.args[0]), call.operand(call.args[1])
    dim = call.arg(2, "dim", 0) % x.ndim
    if call.arg(5, "step", 1) != 1:
        return None
    start, stop, _ = slice(call.arg(3, "start"), call.arg(4, "end")).indices(x.tensor.shape[dim])
    return _replaced(call, x, source, dim, start, stop)


def select_scatter(call: Invocation) -> AxisLabels:
    """select_scatter(x, source, dim, index)."""
    x, source = call.operand(call.args[0]), call.operand(call.args[1])
    dim = call.args[2] % x.ndim
    start = call.args[3] % x.tensor.shape[dim]
    fields = tuple(labels.unsqueeze(dim) for labels in source.fields)
    loose = frozenset(a + (a >= dim) for a in source.loose)
    row = Operand(source.tensor.unsqueeze(dim), fields, source.static, loose, source.learned, source.known)
    return _replaced(call, x, row, dim, start, start + 1)


def _replaced(call: Invocation, x: Operand, source: Operand, dim: int, start: int, stop: int) -> AxisLabels:
    size = x.tensor.shape[dim]
    parts = [_narrow(x, dim, 0, start), source, _narrow(x, dim, stop, size - stop)]
    return joined(call, [part for part in parts if part.tensor.shape[dim]], dim)


def _narrow(x: Operand, dim: int, start: int, length: int) -> Operand:
    fields = tuple(labels.narrow(dim, start, length) if labels.shape[dim] > 1 else labels for labels in x.fields)
    return Operand(x.tensor.narrow(dim, start, length), fields, x.static, x.loose, x.learned, x.known)

"""Calls that only move elements: the same call is run on the label field. One rule for all of them."""

from __future__ import annotations

import operator
from bisect import bisect
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .fields import FIXED, VOID, Fields, Operand, compress, varying
from .invocation import Invocation

_COPIES = ("clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy")
_VIEWS = ("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten")
_KEEP_SIZES_OF_ONE = ("permute", "transpose", "t", "flip", "repeat", "unsqueeze", "movedim", "swapaxes", "rot90")


def _replay(call: Invocation, labels: Tensor, shape: torch.Size) -> Any:
    """The call on a field. Axes along which it does not vary stay at size 1 wherever that gives the same."""
    if call.name in _COPIES:
        return labels
    if call.name in _VIEWS and isinstance(call.out, Tensor) and call.out.numel():
        return reshaped(labels, shape, call.out.shape)
    kwargs = {k: v for k, v in call.kwargs.items() if k not in ("dtype", "memory_format", "device", "layout")}
    if call.name in _KEEP_SIZES_OF_ONE:
        return call.func(labels, *call.args[1:], **kwargs)
    if call.name == "index":
        kept = [a for a in range(len(shape)) if a >= len(call.args[1]) or call.args[1][a] is None]
        shape = torch.Size([1 if a in kept and labels.shape[a] == 1 else n for a, n in enumerate(shape)])
    full = labels.expand(shape)
    if call.name == "as_strided":
        full = full.contiguous()
    return call.func(full, *call.args[1:], **kwargs)


def reshaped(labels: Tensor, old: torch.Size, new: torch.Size) -> Tensor:
    """The field of a tensor of shape `old` after a view as `new`; only axes that a varying one is mixed with grow.

    >>> reshaped(torch.arange(6).reshape(1, 6, 1), torch.Size([4, 6, 5]), torch.Size([4, 2, 3, 5])).shape
    torch.Size([1, 2, 3, 1])
    """
    before, after = ([1, *accumulate(shape, operator.mul)] for shape in (old, new))
    common = sorted(set(before) & set(after))  # between two of these, axes of both are mixed with one another

    def sizes(shape: torch.Size, starts: list[int]) -> list[int]:
        return [n if bisect(common, start) in varied else 1 for n, start in zip(shape, starts, strict=False)]

    varied = {bisect(common, before[axis]) for axis in varying(labels)}
    return labels.expand(sizes(old, before)).reshape(sizes(new, after))


def move(call: Invocation) -> Fields | list[Fields]:
    """view, permute, expand, slice, select, split, flip, roll, pixel_shuffle, unfold ..."""
    source = call.operand(call.args[0])
    shape = source.tensor.shape
    moved = [_replay(call, labels, shape) for labels in source.fields]
    if isinstance(call.out, Tensor):
        return _live(moved)
    return [_live([parts[i] for parts in moved]) for i in range(len(call.out))]


def _live(fields: list[Tensor]) -> Fields:
    return tuple(map(compress, fields))


def index(call: Invocation) -> Fields | None:
    """index, index_select, gather: movement along fixed indices; indices computed from the input fix those axes."""
    source = call.operand(call.args[0])
    if call.name == "index":
        axes = frozenset(axis for axis, item in enumerate(call.args[1]) if item is not None)
        chosen = [item for item in call.args[1] if item is not None]
    else:
        axes = frozenset({call.args[1] % max(source.ndim, 1)})
        chosen = [call.args[2]]
    for item in map(call.operand, chosen):
        for labels in item.fields:
            call.ledger.pin(labels, f"`{call.name}` takes it for a position")
        if not item.static:
            if item.learned and source.static and source.learned:
                call.ledger.refuse(
                    f"`{call.name}` reads places of learned values by numbers that the model has computed"
                )
            for labels in source.fields:
                call.ledger.fix(labels, axes, f"`{call.name}` picks it by indices that depend on the input")
    return move(call)  # type: ignore[return-value]


def copy(call: Invocation) -> Fields:
    """copy(x, source): the source, broadcast to the shape of x, whose own values are gone."""
    ndim, source = call.out.ndim, call.operand(call.args[1])
    return source.place(range(ndim - source.ndim, ndim), ndim).fields


def embedding(call: Invocation) -> Fields:
    """embedding(weight, indices): rows are read by number, so they stay; the features of a row go on."""
    weight = call.operand(call.args[0])
    indices = call.args[1]
    numbers = call.operand(indices)
    if weight.learned and numbers.learned and not numbers.static:
        call.ledger.refuse(f"`{call.name}` reads rows of a learned table by numbers that the model has computed")
    result = []
    for labels in weight.fields:
        if 0 in varying(labels):
            call.ledger.fix(labels, frozenset({0}), "`embedding` reads its rows by number")
        if 1 in varying(labels):
            call.ledger.touch("param", labels)
            call.ledger.touch("written", labels)
        if varying(labels) == {1}:
            result.append(labels.reshape([1] * indices.ndim + [-1]))
    return tuple(result)


def pad(call: Invocation) -> Fields:
    """constant_pad_nd: new places along a labelled axis hold no feature."""
    source = call.operand(call.args[0])
    amounts = list(call.args[1])
    result = []
    for labels in source.fields:
        widths: list[int] = []
        for place in range(len(amounts) // 2):
            axis = source.ndim - 1 - place
            widths += amounts[2 * place : 2 * place + 2] if labels.shape[axis] > 1 else [0, 0]
        result.append(torch.constant_pad_nd(labels, widths, VOID))
    return tuple(result)


def _filler(operand: Operand, dim: int) -> int:
    """What an operand without labels along `dim` puts there: nothing, if its values are the same everywhere."""
    return FIXED if dim in operand.loose or not operand.static else VOID


def cat(call: Invocation) -> Fields:
    """cat: labels are concatenated along `dim`; features along other axes are the same in all parts."""
    parts = [call.operand(part) for part in call.args[0] if part.numel()]  # what is empty says nothing
    if not parts:
        return ()
    dim = call.arg(1, "dim", 0) % parts[0].ndim
    return joined(call, parts, dim)


def stack(call: Invocation) -> Fields:
    """stack: cat along a new axis."""
    dim = call.arg(1, "dim", 0) % call.out.ndim
    parts = []
    for tensor in call.args[0]:
        part = call.operand(tensor)
        fields = tuple(labels.unsqueeze(dim) for labels in part.fields)
        loose = frozenset(axis + (axis >= dim) for axis in part.loose)
        parts.append(Operand(tensor.unsqueeze(dim), fields, part.static, loose))
    return joined(call, parts, dim)


def joined(call: Invocation, parts: list[Operand], dim: int) -> Fields:
    """Fields of operands that follow one another along `dim`."""
    keys = {varying(labels) - {dim} for part in parts for labels in part.fields}
    result: list[Tensor] = []
    for key in sorted(keys, key=sorted):
        found = [[labels for labels in part.fields if varying(labels) - {dim} == key] for part in parts]
        for part, several in zip(parts, found, strict=True):
            for extra in several[1:]:
                call.ledger.pin(extra, f"`{call.name}` joins axes with several kinds of features")
            if not several:
                for other in found:
                    for labels in other[:1]:
                        call.ledger.fix(labels, key & part.loose, f"`{call.name}` joins it with unlabelled values")
        first = [several[0] if several else None for several in found]
        if key and all(labels is None or labels.shape[dim] == 1 for labels in first):
            present = [labels for labels in first if labels is not None]
            for labels in present[1:]:
                call.ledger.equal(present[0], labels)
            result.append(present[0])
            continue
        result.append(_concatenate(parts, first, key, dim))
    return tuple(labels for labels in result if varying(labels))


def _concatenate(parts: list[Operand], fields: list[Tensor | None], key: frozenset[int], dim: int) -> Tensor:
    pieces = []
    for part, labels in zip(parts, fields, strict=True):
        shape = [size if axis == dim or axis in key else 1 for axis, size in enumerate(part.tensor.shape)]
        if labels is None:
            pieces.append(torch.full(shape, _filler(part, dim)))
        else:
            pieces.append(labels.expand(shape))
    return torch.cat(pieces, dim)


def weight_norm(call: Invocation) -> list[Fields]:
    """_weight_norm_interface(v, g, dim): v scaled by g / ‖v‖ over all axes but `dim`."""
    v, g = call.operand(call.args[0]), call.operand(call.args[1])
    axes = frozenset(range(v.ndim)) - {call.arg(2, "dim", 0)}
    for labels in v.fields:
        call.ledger.mix(labels, axes)
    for f in v.fields:
        for h in g.fields:
            call.ledger.relate(f, h)
    return [v.fields, ()]

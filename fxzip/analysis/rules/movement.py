"""Calls that only move elements: the same call is run on the label field. One rule for all of them."""

from __future__ import annotations

import operator
from bisect import bisect
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, combinations
from typing import Any

import torch
from torch import Tensor

from .axis_labels import FIXED, VOID, AxisLabels, Operand, compress, varying
from .invocation import Invocation, axes_of, names
from .label_patterns import across

MOVES = names(
    """view _unsafe_view reshape _reshape_alias permute transpose t expand slice select unbind split split_with_sizes
    split_copy unsafe_split unsafe_split_with_sizes unsafe_chunk chunk squeeze unsqueeze clone contiguous detach alias
    as_strided unfold flip roll rot90 repeat repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle
    native_channel_shuffle diagonal movedim swapaxes narrow lift_fresh lift_fresh_copy narrow_copy unflatten
    _conj _conj_physical conj_physical resolve_conj _neg_view resolve_neg"""
)
_COPIES = (
    "clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy",
    "_conj", "_conj_physical", "conj_physical", "resolve_conj", "_neg_view", "resolve_neg",
)  # fmt: skip
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


def move(call: Invocation) -> AxisLabels | list[AxisLabels]:
    """view, permute, expand, slice, select, split, flip, roll, pixel_shuffle, unfold ..."""
    return replay(call, call.operand(call.args[0]))


def replay(call: Invocation, source: Operand) -> AxisLabels | list[AxisLabels]:
    """The call on the fields of its first operand, given as `source`."""
    shape = source.tensor.shape
    moved = [_replay(call, labels, shape) for labels in source.fields]
    if isinstance(call.out, Tensor):
        fields = _live(moved)
        call.store.crossed += [(f, g) for f, g in combinations(fields, 2) if across(f, g)]
        return fields
    return [_live([parts[i] for parts in moved]) for i in range(len(call.out))]


def _live(fields: list[Tensor]) -> AxisLabels:
    return tuple(map(compress, fields))


def turn(call: Invocation) -> AxisLabels | list[AxisLabels]:
    """flip, roll, rot90: movement of positions; along features it depends on their order."""
    x = call.operand(call.args[0])
    dims = call.arg(2, "dims", [0, 1]) if call.name != "flip" else call.arg(1, "dims")
    if call.name == "roll":
        dims = call.arg(2, "dims", [])

    for labels in x.fields:
        call.store.fix(labels, axes_of(dims, x.ndim), f"`{call.name}` depends on the order of features")
        if axes_of(dims, x.ndim) & varying(labels):
            call.store.refuse(f"`{call.name}` depends on the order of features")

    return move(call)


def triangle(call: Invocation) -> AxisLabels:
    """tril, triu: which places become zero depends on the order along the last two axes."""
    x = call.operand(call.args[0])
    axes = frozenset({x.ndim - 2, x.ndim - 1})
    for labels in x.fields:
        call.store.fix(labels, axes, f"`{call.name}` depends on the order of features")
        if axes & varying(labels):
            call.store.refuse(f"`{call.name}` depends on the order of features")
    return x.fields


def as_pairs(call: Invocation) -> AxisLabels:
    """view_as_real: a new last axis of real and imaginary parts."""
    return tuple(labels.unsqueeze(-1) for labels in call.operand(call.args[0]).fields)


def as_complex(call: Invocation) -> AxisLabels:
    """view_as_complex: the last axis holds real and imaginary parts, which stay what they are."""
    x = call.operand(call.args[0])
    result = []
    for labels in x.fields:
        call.store.fix(labels, frozenset({x.ndim - 1}), f"`{call.name}` takes it for a real or imaginary part")
        rest = call.store.project(labels, varying(labels) - {x.ndim - 1})
        if rest is not None:
            result.append(rest.squeeze(-1))
    return tuple(result)


def index(call: Invocation) -> AxisLabels | None:
    """index, index_select: movement along fixed indices; indices computed from the input fix those axes."""
    source = call.operand(call.args[0])
    if call.name.endswith("index"):
        chosen = [item for item in call.args[1] if item is not None]
        items = places(call.args[1])
        axes = frozenset(axis for axis, item in enumerate(items) if item is not None)
        moved = replace(call, args=(call.args[0], items))
    else:
        axes, chosen, moved = frozenset({call.args[1] % max(source.ndim, 1)}), [call.args[2]], call

    for item in map(call.operand, chosen):
        for labels in item.fields:
            call.store.pin(labels, f"`{call.name}` takes it for a position")
        if not item.static:
            if item.learned and source.static and source.learned:
                call.store.refuse(
                    f"`{call.name}` reads places of learned values by numbers that the model has computed"
                )
            for labels in source.fields:
                call.store.fix(labels, axes, f"`{call.name}` picks it by indices that depend on the input")

    return move(moved)  # type: ignore[return-value]


def places(items: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with masks as the places where they are true, one index for each axis of a mask.

    >>> places([None, torch.tensor([[True, False], [False, True]])])
    [None, tensor([0, 1]), tensor([0, 1])]
    """
    result: list[Tensor | None] = []
    for item in items:
        mask = item is not None and item.dtype in (torch.bool, torch.uint8)
        result += item.nonzero().unbind(1) if mask and item is not None else [item]
    return result


def gather(call: Invocation) -> AxisLabels:
    """gather(x, dim, index): at each place of the other axes, an element along `dim` is picked by number."""
    x, item = call.operand(call.args[0]), call.operand(call.args[2])
    dim = frozenset({call.args[1] % max(x.ndim, 1)})

    for labels in item.fields:
        call.store.fix(labels, dim, f"`{call.name}` takes it for a position")
        for other in x.fields:
            call.store.relate(labels.narrow(min(dim), 0, 1), other.narrow(min(dim), 0, 1))

    for labels in x.fields:
        call.store.fix(labels, item.loose - dim, f"`{call.name}` picks it by indices of its own at every place")
        if not item.static:
            call.store.fix(labels, dim, f"`{call.name}` picks it by indices that depend on the input")

    fields = move(call)
    assert isinstance(fields, tuple)
    return fields


def copy(call: Invocation) -> AxisLabels:
    """copy(x, source): the source, broadcast to the shape of x, whose own values are gone."""
    ndim, source = call.out.ndim, call.operand(call.args[1])
    return source.place(range(ndim - source.ndim, ndim), ndim).fields


def embedding(call: Invocation) -> AxisLabels:
    """embedding(weight, indices): rows are read by number, so they stay; the features of a row go on."""
    weight = call.operand(call.args[0])
    indices = call.args[1]
    numbers = call.operand(indices)
    if weight.learned and numbers.learned and not numbers.static:
        call.store.refuse(f"`{call.name}` reads rows of a learned table by numbers that the model has computed")

    result = []
    for labels in weight.fields:
        if 0 in varying(labels):
            call.store.fix(labels, frozenset({0}), "`embedding` reads its rows by number")
        if 1 in varying(labels):
            call.store.touch("param", labels)
            call.store.touch("written", labels)
        if varying(labels) == {1}:
            result.append(labels.reshape([1] * indices.ndim + [-1]))

    return tuple(result)


def embedding_bag(call: Invocation) -> list[AxisLabels]:
    """_embedding_bag(weight, indices, ...): rows are read by number, and summed; features of a row go on."""
    weight, numbers = call.operand(call.args[0]), call.operand(call.args[1])
    if weight.learned and numbers.learned and not numbers.static:
        call.store.refuse(f"`{call.name}` reads rows of a learned table by numbers that the model has computed")

    result = []
    for labels in weight.fields:
        call.store.fix(labels, frozenset({0}), f"`{call.name}` reads its rows by number")
        if 1 in varying(labels):
            call.store.touch("param", labels)
            call.store.touch("written", labels)
            if 0 not in varying(labels):
                result.append(labels)

    return [tuple(result), *[() for _ in call.out[1:]]]


def pad(call: Invocation) -> AxisLabels:
    """constant_pad_nd: new places along a labelled axis hold no feature. Of places that hold nothing already, with
    what value nobody knows, those are fixed."""
    source = call.operand(call.args[0])
    amounts = list(call.args[1])

    result = []
    for labels in source.fields:
        widths: list[int] = []
        for place in range(len(amounts) // 2):
            axis = source.ndim - 1 - place
            widths += amounts[2 * place : 2 * place + 2] if labels.shape[axis] > 1 else [0, 0]
        if any(widths):
            labels = torch.where(labels == VOID, FIXED, labels)
        result.append(torch.constant_pad_nd(labels, widths, VOID))

    return tuple(result)


def padded(call: Invocation) -> AxisLabels:
    """reflection_pad, replication_pad: movement along the last axes; features there are repeated."""
    x = call.operand(call.args[0])
    count = len(call.args[1]) // 2
    ends = frozenset(range(x.ndim - count, x.ndim))

    result = []
    for labels in x.fields:
        if varying(labels) & ends:
            shape = [x.tensor.shape[axis] if axis in ends else n for axis, n in enumerate(labels.shape)]
            labels = call.func(labels.expand(shape).double(), *call.args[1:]).long()  # exact below 2**53
        result.append(labels)

    return _live(result)


def weight_norm(call: Invocation) -> list[AxisLabels]:
    """_weight_norm_interface(v, g, dim): v scaled by g / ‖v‖ over all axes but `dim`."""
    v, g = call.operand(call.args[0]), call.operand(call.args[1])
    axes = frozenset(range(v.ndim)) - {call.arg(2, "dim", 0)}
    for labels in v.fields:
        call.store.mix(labels, axes)
    for f in v.fields:
        for h in g.fields:
            call.store.relate(f, h)
    return [v.fields, ()]

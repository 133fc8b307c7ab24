"""Calls that only move elements: the same call is run on the label field. One rule for all of them."""

from __future__ import annotations

import operator
from bisect import bisect
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .fields import FIXED, VOID, Fields, Operand, compress, varying
from .invocation import Invocation, axes_of, names

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


def move(call: Invocation) -> Fields | list[Fields]:
    """view, permute, expand, slice, select, split, flip, roll, pixel_shuffle, unfold ..."""
    return replay(call, call.operand(call.args[0]))


def replay(call: Invocation, source: Operand) -> Fields | list[Fields]:
    """The call on the fields of its first operand, given as `source`."""
    shape = source.tensor.shape
    moved = [_replay(call, labels, shape) for labels in source.fields]
    if isinstance(call.out, Tensor):
        return _live(moved)
    return [_live([parts[i] for parts in moved]) for i in range(len(call.out))]


def _live(fields: list[Tensor]) -> Fields:
    return tuple(map(compress, fields))


def turn(call: Invocation) -> Fields | list[Fields]:
    """flip, roll, rot90: movement of positions; along features it depends on their order."""
    x = call.operand(call.args[0])
    dims = call.arg(2, "dims", [0, 1]) if call.name != "flip" else call.arg(1, "dims")
    if call.name == "roll":
        dims = call.arg(2, "dims", [])
    for labels in x.fields:
        call.ledger.fix(labels, axes_of(dims, x.ndim), f"`{call.name}` depends on the order of features")
    return move(call)


def as_pairs(call: Invocation) -> Fields:
    """view_as_real: a new last axis of real and imaginary parts."""
    return tuple(labels.unsqueeze(-1) for labels in call.operand(call.args[0]).fields)


def as_complex(call: Invocation) -> Fields:
    """view_as_complex: the last axis holds real and imaginary parts, which stay what they are."""
    x = call.operand(call.args[0])
    result = []
    for labels in x.fields:
        call.ledger.fix(labels, frozenset({x.ndim - 1}), f"`{call.name}` takes it for a real or imaginary part")
        rest = call.ledger.project(labels, varying(labels) - {x.ndim - 1})
        if rest is not None:
            result.append(rest.squeeze(-1))
    return tuple(result)


def index(call: Invocation) -> Fields | None:
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
            call.ledger.pin(labels, f"`{call.name}` takes it for a position")
        if not item.static:
            if item.learned and source.static and source.learned:
                call.ledger.refuse(
                    f"`{call.name}` reads places of learned values by numbers that the model has computed"
                )
            for labels in source.fields:
                call.ledger.fix(labels, axes, f"`{call.name}` picks it by indices that depend on the input")
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


def gather(call: Invocation) -> Fields:
    """gather(x, dim, index): at each place of the other axes, an element along `dim` is picked by number."""
    x, item = call.operand(call.args[0]), call.operand(call.args[2])
    dim = frozenset({call.args[1] % max(x.ndim, 1)})
    for labels in item.fields:
        call.ledger.fix(labels, dim, f"`{call.name}` takes it for a position")
        for other in x.fields:
            call.ledger.relate(labels.narrow(min(dim), 0, 1), other.narrow(min(dim), 0, 1))
    for labels in x.fields:
        call.ledger.fix(labels, item.loose - dim, f"`{call.name}` picks it by indices of its own at every place")
        if not item.static:
            call.ledger.fix(labels, dim, f"`{call.name}` picks it by indices that depend on the input")
    fields = move(call)
    assert isinstance(fields, tuple)
    return fields


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


def padded(call: Invocation) -> Fields:
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


def filler(operand: Operand, axes: frozenset[int], others: Sequence[Operand] = ()) -> int:
    """What an operand without labels along `axes` puts there: nothing, if its values are the same everywhere.

    Nothing has one value: beside `others` that put nothing there it does so only if they are the same constant.
    """
    if axes & operand.loose.union(*map(varying, operand.fields)):
        return FIXED
    alike = all(_constant(operand) is not None and _constant(operand) == _constant(other) for other in others)
    return VOID if alike else FIXED


def _constant(operand: Operand) -> float | complex | bool | None:
    """The one value that an operand has everywhere, if that is known."""
    if not operand.known or operand.loose or operand.fields or not operand.tensor.numel():
        return None
    value: float | complex | bool = operand.tensor[(0,) * operand.ndim].item()
    return value


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
        parts.append(Operand(tensor.unsqueeze(dim), fields, part.static, loose, part.known))
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
            whole, *present = [labels for labels in first if labels is not None]
            for labels in present:
                whole = call.ledger.agree(whole, labels)
            result.append(whole)
            continue
        result.append(_concatenate(parts, first, key, dim))
    return tuple(labels for labels in result if varying(labels))


def _concatenate(parts: list[Operand], fields: list[Tensor | None], key: frozenset[int], dim: int) -> Tensor:
    pieces: list[Tensor] = []
    empty: list[Operand] = []  # what put VOID in so far
    for part, labels in zip(parts, fields, strict=True):
        shape = [size if axis == dim or axis in key else 1 for axis, size in enumerate(part.tensor.shape)]
        if labels is None:
            piece = torch.full(shape, filler(part, frozenset({dim}), empty))
        else:
            piece = torch.where(labels == VOID, FIXED, labels) if empty else labels
            piece = piece.expand(shape)
        if bool((piece == VOID).any()):
            empty.append(part)
        pieces.append(piece)
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

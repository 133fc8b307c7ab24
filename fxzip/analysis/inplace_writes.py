"""In-place calls: what is written into a part of a tensor is labelled as if it had been concatenated.

`out[:, 2:5] = x` runs as a view of `out` and a `copy_` into that view. The view's axes are found again in the base by
their strides; the labels written are laid into the base's, and every view of that memory gets its labels from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .label_state import Barrier, Entry, State, tensors
from .rules import FIXED, VOID, AxisLabels, ConstraintStore, Invocation, Operand, compress, is_random, varying
from .rules.joining import filler
from .rules.uniform import FACTORIES, uniform_axes


@dataclass(frozen=True)
class Window:
    """A view as a part of its base: for each axis of the base the view's axis (None: one place), and the places."""

    axes: tuple[int | None, ...]
    places: tuple[slice, ...]
    partial: frozenset[int]  # axes of the base that the view covers in part


def window(view: Tensor, base: Tensor) -> Window | None:
    """The view as slices of the base, or None if it is more than that."""
    if view.storage_offset() < base.storage_offset() or 0 in base.stride() or not base.numel():
        return None

    order = sorted((a for a, n in enumerate(base.shape) if n > 1), key=base.stride, reverse=True)
    offset = int(view.storage_offset() - base.storage_offset())
    axes: list[int | None] = [None] * base.ndim
    places = [slice(0, 1)] * base.ndim
    left = [a for a, n in enumerate(view.shape) if n > 1]

    for axis in order:
        unit, size = base.stride(axis), base.shape[axis]
        start, offset = divmod(offset, unit)
        mine = [a for a in left if view.stride(a) % unit == 0 and view.stride(a) // unit * (view.shape[a] - 1) < size]
        if mine:
            own = max(mine, key=lambda a: view.stride(a))
            step = view.stride(own) // unit
            stop = start + step * (view.shape[own] - 1) + 1
            axes[axis], places[axis] = own, slice(start, stop, step)
            left.remove(own)
        else:
            stop = start + 1
            places[axis] = slice(start, stop)
        if start >= size or stop > size:
            return None

    if left or offset:
        return None

    marks = base.new_empty(0).set_(base.untyped_storage(), base.storage_offset(), base.shape, base.stride())
    part = marks[tuple(places)]
    if part.storage_offset() != view.storage_offset() or part.numel() != view.numel():
        return None

    partial = frozenset(a for a, n in enumerate(base.shape) if part.shape[a] < n)
    return Window(tuple(axes), tuple(places), partial)


def _placed(operand: Operand, where: Window) -> Operand:
    """An operand over the view, in the axes of the base."""
    fields = []
    for labels in operand.fields:
        kept = [own for own in where.axes if own is not None]
        rest = [a for a in range(labels.ndim) if a not in kept]
        moved = labels.permute(*kept, *rest).reshape([labels.shape[own] for own in kept])
        shape = [1 if own is None else labels.shape[own] for own in where.axes]
        fields.append(moved.reshape(shape))

    loose = frozenset(a for a, own in enumerate(where.axes) if own is not None and own in operand.loose)
    return replace(operand, fields=tuple(fields), loose=loose)


def write(store: ConstraintStore, base: Operand, value: Operand, where: Window, what: str) -> AxisLabels:
    """Axis labels of the base after `value`, an operand over the view, was written into its window."""
    value = _placed(value, where)
    if not where.partial:
        return tuple(labels for labels in value.fields if varying(labels))

    result: list[Tensor] = []
    left = list(base.fields)

    for new in value.fields:
        key = varying(new) - where.partial
        old = next((labels for labels in left if varying(labels) - where.partial == key), None)
        if old is None:  # parts of an axis that have been written at other places
            old = next((labels for labels in left if varying(labels) & varying(new) & where.partial), None)
        if old is not None:
            left = [labels for labels in left if labels is not old]
        if varying(new) == key and (old is None or varying(old) == key):
            if old is not None:
                new = store.agree(old, new)
            else:
                store.fix(new, base.loose, f"{what} writes it beside values that carry no feature")
            result.append(new)
        else:
            result.append(_assembled(base, old, value, new, where))

    for old in left:
        if varying(old) & where.partial:
            result.append(_assembled(base, old, value, None, where))
        else:
            store.fix(old, value.loose, f"{what} writes values beside it that carry no feature")
            result.append(old)

    return tuple(labels for labels in map(compress, result) if varying(labels))


def _assembled(base: Operand, old: Tensor | None, value: Operand, new: Tensor | None, where: Window) -> Tensor:
    varied = (varying(old) if old is not None else frozenset()) | (varying(new) if new is not None else frozenset())
    varied |= where.partial
    shape = [n if a in varied else 1 for a, n in enumerate(base.tensor.shape)]
    full = torch.full(shape, filler(base, varied), device="cpu") if old is None else old.expand(shape).clone()
    part = full[tuple(place if a in varied else slice(None) for a, place in enumerate(where.places))]
    part.fill_(FIXED)
    empty = bool((full == VOID).any())  # what is written is then no such place, unless it is the same constant
    if new is not None:
        part.copy_(torch.where(new == VOID, FIXED, new) if empty else new)
    elif not empty or old is None:
        part.fill_(filler(value, varied, [base] if empty else []))

    return full


def seen_through(view: Tensor, base: Tensor, fields: AxisLabels) -> AxisLabels | bool:
    """The fields of the base as another view of the same memory sees them; False if it sees nothing of the base, True
    if it sees only a part."""
    where = window(view, base)
    if where is not None:
        return tuple(part for labels in fields if varying(part := _part(labels, where, view.ndim)))

    size = max(base.untyped_storage().nbytes() // base.element_size(), 1)
    memory = torch.zeros(size, dtype=torch.int64, device="cpu")
    inside = memory.as_strided(base.shape, base.stride(), base.storage_offset())
    outside = memory.as_strided(view.shape, view.stride(), view.storage_offset())
    inside.fill_(1)
    if not bool(outside.all()):
        return bool(outside.any())

    result = []
    for labels in fields:
        inside.copy_(labels.expand(base.shape))
        own = compress(outside)
        if varying(own):
            result.append(own.clone())

    return tuple(result)


def _part(labels: Tensor, where: Window, ndim: int) -> Tensor:
    """The part of a field of the base that lies in the window, in the axes of the view."""
    part = labels[tuple(place if n > 1 else slice(None) for n, place in zip(labels.shape, where.places, strict=True))]
    order = sorted(range(part.ndim), key=lambda a: -1 if (own := where.axes[a]) is None else own)
    shape = [1] * ndim
    for axis, own in enumerate(where.axes):
        if own is not None:
            shape[own] = part.shape[axis]
    return compress(part.permute(order).reshape(shape))


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that the call writes in place."""
    result: list[Tensor] = []
    if not func._schema.is_mutable:
        return result
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            result += list(tensors(value))
    return result


@dataclass(frozen=True)
class Earlier:
    """What was known before a call that writes: of its operands, and of what else lies in the memory written."""

    operands: Mapping[int, Operand]
    uniform: Mapping[int, frozenset[int]]

    @classmethod
    def of(cls, state: State, inputs: Sequence[Tensor], written: Sequence[Tensor]) -> Earlier:
        storages = {_storage(tensor) for tensor in written}
        there = [entry.tensor for entry in _entries(state) if _storage(entry.tensor) in storages]
        found = {id(tensor): tensor for tensor in (*inputs, *there)}
        operands = {key: state.operand(tensor) for key, tensor in found.items()}
        return cls(operands, {key: state.uniform(tensor) for key, tensor in found.items()})


def write_in_place(
    state: State, call: Invocation, written: list[Tensor], result: Any, dynamic: bool, earlier: Earlier
) -> None:
    """In-place calls: label the whole memory anew, and what other tensors see of it."""
    for tensor in written:
        entries = [e for e in _entries(state) if _storage(e.tensor) == _storage(tensor)]
        entries.sort(key=lambda e: -e.tensor.numel())
        base, where = next((e, w) for e in entries if (w := window(tensor, e.tensor)) or e.tensor is tensor)
        value, uniform = _written(state, call, tensor, result, dynamic, earlier)
        labelled = bool(value.fields) or any(e.fields for e in entries)
        views: dict[int, AxisLabels | bool] = {}
        for entry in entries:
            entry.learned = entry.learned or any(state.entry(t).learned for t in call.tensors())
        if labelled and where is not None:
            before = earlier.operands[id(base.tensor)]
            base.fields = write(state.store, before, value, where, f"`{call.name}_`")
            views |= {id(e): seen_through(e.tensor, base.tensor, base.fields) for e in entries if e is not base}
        else:
            views = {id(e): labelled for e in entries if e is not base}
        if (id(base.tensor) in state.names and labelled) or any(view is True for view in views.values()):
            _refuse(state, call, [*value.fields, *(f for e in entries for f in e.fields)])
            views = {id(e): () for e in entries}
        for entry in entries:
            view = views.get(id(entry), False)
            entry.fields = view if isinstance(view, tuple) else entry.fields
            untouched = labelled and view is False and entry is not base
            entry.static = entry.static and (not dynamic or untouched)
            if not untouched:
                whole = entry is base and where is not None and not where.partial
                entry.known = value.known and (whole or entry.known)
                entry.uniform = _uniform(entry, where, uniform) if entry is base and where is not None else frozenset()
        state.seen.update((id(f), f) for f in base.fields)


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have no storage
        return id(tensor)


def _uniform(base: Entry, where: Window, uniform: frozenset[int]) -> frozenset[int]:
    """Axes of the base along which its values are the same everywhere after something was written that is so."""
    axes = frozenset(a for a, own in enumerate(where.axes) if own in uniform) - where.partial
    return axes & base.uniform if where.partial else axes


def _written(
    state: State, call: Invocation, tensor: Tensor, result: Any, dynamic: bool, earlier: Earlier
) -> tuple[Operand, frozenset[int]]:
    """The values written, as an operand over the tensor that they are written into, and their uniform axes."""
    ndim = tensor.ndim
    if call.name == "copy":
        value, uniform = call.operand(call.args[1]), earlier.uniform[id(call.args[1])]
        axes = range(ndim - value.ndim, ndim)
        return value.place(axes, ndim), frozenset(axes[a] for a in uniform) | set(range(ndim - value.ndim))

    uniform = uniform_axes(replace(call, out=tensor), lambda t: earlier.uniform.get(id(t), frozenset()))[0]
    known = not is_random(call.func) and all(
        earlier.operands[id(t)].known for t in call.tensors() if call.name not in FACTORIES or t is not tensor
    )
    fields: AxisLabels = result if isinstance(result, tuple) else ()
    covered = frozenset(a for labels in fields for a in varying(labels))
    loose = frozenset(a for a, n in enumerate(tensor.shape) if n > 1) - covered - uniform

    return Operand(tensor, fields, not dynamic, loose, known=known), uniform


def _entries(state: State) -> Iterator[Entry]:
    yield from state.held.values()
    yield from state.entries.values()


def _refuse(state: State, call: Invocation, labels: list[Tensor]) -> None:
    reason = f"`{call.name}_` ({state.where}) writes it into a part of another tensor"
    state.barriers.append(Barrier(state.node, call.name + "_", reason))
    for run in labels:
        state.store.pin(run, reason, "barrier")

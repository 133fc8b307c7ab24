"""The tensors of a network: which of them share memory, and what a file holds of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoadError, SaveError
from .json_values import fields

_Geometry = tuple[tuple[int, ...], tuple[int, ...], int]


class TensorTable:
    """Tensors by number, each once.

    >>> table = TensorTable()
    >>> table.number(torch.ones(2), "a"), table.number(torch.ones(2), "b")
    (0, 1)
    """

    def __init__(self) -> None:
        self._tensors: list[tuple[str, Tensor]] = []
        self._numbers: dict[int, int] = {}

    def number(self, tensor: Tensor, name: str) -> int:
        """The number of a tensor; `name`: where it is.

        Raises:
            SaveError: it is of a class or layout that a file cannot hold.
        """
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise SaveError(f"a `{type(tensor).__name__}` cannot be stored; make it a plain tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise SaveError("a tensor that is sparse, quantised or without values cannot be stored")
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self._tensors)
            self._tensors.append((name, tensor))
        return self._numbers[id(tensor)]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, by number."""
        return [tensor for _, tensor in self._tensors]

    def contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the file of tensors holds, by key, and what must be known beside it.

        Tensors that overlap in memory are one entry, in which each is a view.
        """
        data: dict[str, Tensor] = {}
        entries: list[Any] = [None] * len(self._tensors)
        notes: dict[str, Any] = {}
        for members in _overlapping(self.tensors):
            name, first = self._tensors[members[0]]
            places = {number: _geometry(self._tensors[number][1]) for number in members}
            note: dict[str, Any] = {"complex": first.is_complex(), "stride": None}
            if len(set(places.values())) == 1:
                stored = first.detach()
                if _is_dense(stored.shape, stored.stride()) and stored.stride() != _default(stored.shape):
                    note["stride"] = list(stored.stride())
            else:
                start = min(place[2] for place in places.values())
                length = max(place[2] + _extent(place) for place in places.values()) - start
                stored = first.detach().as_strided((length,), (1,), start)
            data[name], notes[name] = _plain(stored), note
            for number, (shape, stride, offset) in places.items():
                own = self._tensors[number][1]
                view = None if len(set(places.values())) == 1 else [list(shape), list(stride), offset - start]
                entries[number] = {
                    "key": name, "parameter": isinstance(own, nn.Parameter), "requires_grad": own.requires_grad,
                    "view": view,
                }  # fmt: skip
        return data, {"data": notes, "tensors": entries}


def tensors_again(stored: Mapping[str, Tensor], notes: Any) -> list[Tensor]:
    """The tensors, by number.

    Raises:
        LoadError: the notes do not fit what is stored.
    """
    data, entries = fields(notes, data=dict, tensors=list)
    if set(data) != set(stored):
        raise LoadError("its tensors are not those of `model.safetensors`")
    held: dict[str, Tensor] = {}
    for key, note in data.items():
        is_complex, stride = fields(note, complex=bool, stride=(list, type(None)))
        value = torch.view_as_complex(stored[key]) if is_complex else stored[key]
        if stride is not None:
            if not _are_sizes(stride) or len(stride) != value.ndim or not _is_dense(value.shape, stride):
                raise LoadError(f"the strides of {key!r} are none of a tensor of that shape")
            value = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)
        held[key] = value
    result = [_tensor(held, entry) for entry in entries]
    if {entry["key"] for entry in entries} != set(held):
        raise LoadError("it does not use all tensors of `model.safetensors`")
    return result


def _tensor(held: Mapping[str, Tensor], entry: Any) -> Tensor:
    key, is_parameter, trained, view = fields(
        entry, key=str, parameter=bool, requires_grad=bool, view=(list, type(None))
    )
    if key not in held:
        raise LoadError(f"there is no tensor {key!r}")
    value = held[key]
    if view is not None:
        if len(view) != 3 or not (_are_sizes(view[0]) and _are_sizes(view[1]) and _are_sizes([view[2]])):
            raise LoadError(f"a view of {key!r} has no shape")
        shape, stride, offset = view
        end = offset + _extent((shape, stride, 0)) if len(shape) == len(stride) else math.inf
        if value.ndim != 1 or max(end, math.prod(shape)) > value.numel():
            raise LoadError(f"a view of {key!r} is larger than the tensor")
        value = value.as_strided(shape, stride, offset)
    return nn.Parameter(value, trained) if is_parameter else value.detach().requires_grad_(trained)


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**62 for number in numbers)


def _overlapping(tensors: list[Tensor]) -> list[list[int]]:
    """Numbers of tensors in groups that overlap in memory, in the order of the first of each."""
    places: dict[Any, list[tuple[int, int, int]]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        repeats = tensor.numel() > _extent(_geometry(tensor))  # one place of memory for several elements
        alone = not tensor.numel() or repeats or tensor.is_conj() or tensor.is_neg()
        memory = number if alone else (tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.device)
        start = int(tensor.storage_offset())
        places[memory].append((start, start + _extent(_geometry(tensor)), number))
    groups: list[list[int]] = []
    for spans in places.values():
        reached = -1
        for start, end, number in sorted(spans):
            if start >= reached:
                groups.append([])
            groups[-1].append(number)
            reached = max(reached, end)
    return sorted(map(sorted, groups))


def _geometry(tensor: Tensor) -> _Geometry:
    return tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


def _extent(place: Any) -> int:
    """How many places of memory lie between the first and the last element."""
    shape, stride, _ = place
    return 0 if 0 in shape else 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _default(shape: Any) -> tuple[int, ...]:
    return torch.empty(tuple(shape), device="meta").stride()


def _is_dense(shape: Any, stride: Any) -> bool:
    """Whether each place of memory from the first to the last is that of one element."""
    expected = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return 0 not in shape


def _plain(tensor: Tensor) -> Tensor:
    """The values as safetensors takes them: in memory of their own, in order, real."""
    value = tensor.resolve_conj().resolve_neg()
    if value.is_complex():
        value = torch.view_as_real(value.contiguous())
    value = value.to("cpu").contiguous()
    alone = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if alone else value.clone()

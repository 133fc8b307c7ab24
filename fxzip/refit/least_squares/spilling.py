"""Tensors on a file: what does not fit into memory lies there, and comes back as it was, to the bit.

There is one file for a fit, without a name from the moment it is opened where the system allows that: it is gone as
soon as it is closed, or the process ends, however it ends.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...tracing.containers import flatten, leaves
from ...tracing.structure import Structure

Env = dict[Any, Any]
"""Values of a network on one batch, by node."""

_SMALL = 4096  # bytes below which nothing is gained
_PAGE = 4096
_SPARE = 0.1  # share of the free room on the disk that is left to others


@dataclass(frozen=True)
class Extent:
    """A part of the file, in bytes; `size` of it are used."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """Where the next one may begin."""
        return self.start + -(-self.size // _PAGE) * _PAGE


class SpillFile:
    """A temporary file that tensors are written to, used as a context manager. It is made when it is first needed.

    >>> with SpillFile() as file:
    ...     place = file.write(torch.arange(3))
    ...     file.read(place, torch.device("cpu")).view(torch.int64)
    tensor([0, 1, 2])
    """

    def __init__(self) -> None:
        self._file: Any = None
        self._free: list[tuple[int, int]] = []  # start and end, in order
        self._end = 0

    def __enter__(self) -> SpillFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._free, self._end = None, [], 0

    @property
    def size(self) -> int:
        """How long the file has become, in bytes."""
        return self._end

    def write(self, value: Tensor) -> Extent:
        """The bytes of a contiguous tensor.

        Raises:
            OSError: there is no room for them.
        """
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="fxzip-", buffering=0)  # noqa: SIM115
        extent = self._room(value.nbytes)
        try:
            self._file.seek(extent.start)
            rest = _bytes(value.detach().cpu())
            while len(rest):
                rest = rest[self._file.write(rest) :]
        except OSError:
            self.free(extent)
            raise
        return extent

    def read(self, extent: Extent, device: torch.device) -> Tensor:
        """The bytes again, uint8."""
        value = torch.empty(extent.size, dtype=torch.uint8, device="cpu")
        self._file.seek(extent.start)
        rest = _bytes(value)
        while len(rest):
            found = self._file.readinto(rest)
            if not found:
                raise OSError("A temporary file is shorter than what was written to it.")
            rest = rest[found:]
        return value.to(device)

    def free(self, extent: Extent) -> None:
        """This part may be written over."""
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self._free, (extent.start, extent.end)]):
            if merged and merged[-1][1] == start:
                merged[-1] = merged[-1][0], end
            else:
                merged.append((start, end))
        self._free = merged

    def _room(self, size: int) -> Extent:
        """The smallest part that is free and large enough, else one at the end."""
        length = Extent(0, size).end
        fitting = [(end - start, start, end) for start, end in self._free if end - start >= length]
        if not fitting:
            self._end += length
            return Extent(self._end - length, size)
        _, start, end = min(fitting)
        self._free.remove((start, end))
        if end - start > length:
            self._free = sorted([*self._free, (start + length, end)])
        return Extent(start, size)


@dataclass(frozen=True, eq=False)
class Page:
    """A tensor on the file, contiguous when it comes back; its place there is free again when the page is forgotten."""

    file: SpillFile
    extent: Extent
    like: Tensor  # of the same dtype, on the same device, without elements
    shape: torch.Size

    @classmethod
    def of(cls, file: SpillFile, value: Tensor) -> Page | Tensor:
        """Write it. Without room on the file it stays as it is."""
        try:
            page = cls(file, file.write(value.contiguous()), value.new_empty(0), value.shape)
        except OSError:
            return value
        weakref.finalize(page, file.free, page.extent)
        return page

    def read(self) -> Tensor:
        """The tensor again."""
        return self.file.read(self.extent, self.like.device).view(self.like.dtype).reshape(self.shape)


def fetched(value: Tensor | Page) -> Tensor:
    """A tensor that lies on the file, or in memory."""
    return value.read() if isinstance(value, Page) else value


def free_on_disk() -> float:
    """Bytes that temporary files may take."""
    return (1 - _SPARE) * shutil.disk_usage(tempfile.gettempdir()).free


def _bytes(value: Tensor) -> memoryview:
    return value.reshape(-1).view(torch.uint8).numpy().data.cast("B")


@dataclass
class _Storage:
    """A storage on the file. In memory: a tensor over all of it, and the version of that when it was read."""

    extent: Extent
    device: torch.device
    base: Tensor | None = None
    version: int = 0

    def changed(self) -> bool:
        """Whether it was written into since it was read."""
        return self.base is not None and self.base._version != self.version


@dataclass(frozen=True)
class _View:
    """A tensor over a storage."""

    storage: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def over(self, base: Tensor) -> Tensor:
        """The tensor again. Views of one base know of one another's writes, as they did before."""
        whole = base[: len(base) // self.dtype.itemsize * self.dtype.itemsize]
        return whole.view(self.dtype).as_strided(self.size, self.stride, self.offset)


class Shelf:
    """The values of one network's nodes on one batch, which lie on the file while nobody needs them.

    What shares memory shares it again, and what was one tensor is one again. Some stay where they are: parameters and
    constants of the network and what lies in their memory, for whoever fits them writes into them; and containers other
    than tuples, for others may hold the very same.
    """

    def __init__(self, file: SpillFile) -> None:
        self._file = file
        self._storages: dict[int, _Storage] = {}
        self._leaves: list[Tensor | _View] = []
        self._values: dict[Any, tuple[Structure, list[int]]] = {}
        self._kept: Env = {}
        self._next = 0

    def put(self, env: Env, module: nn.Module) -> None:
        """Write what is not on the file yet, or was changed since it was read. `module`: whose values they are.

        Raises:
            OSError: there is no room for it; then the shelf is empty.
        """
        self._kept = {key: value for key, value in env.items() if _is_constant(key) or not _is_plain(value)}
        stay = (*module.parameters(), *module.buffers(), *leaves(list(self._kept.values())))
        held = {address(value) for value in stay}
        known = {address(own.base): number for number, own in self._storages.items() if own.base is not None}
        numbers: dict[int, int] = {}
        found: list[Tensor] = []
        self._values = {}
        for node, value in env.items():
            if node in self._kept:
                continue
            own, structure = flatten(value)
            for leaf in own:
                if id(leaf) not in numbers:
                    numbers[id(leaf)] = len(found)
                    found.append(leaf)
            self._values[node] = structure, [numbers[id(leaf)] for leaf in own]

        held |= {address(leaf) for leaf in found if not _fits(leaf)}
        try:
            self._leaves = [leaf if address(leaf) in held else self._shelved(leaf, known) for leaf in found]
        except OSError:
            self.clear()
            raise
        used = {own.storage for own in self._leaves if isinstance(own, _View)}
        for number in self._storages.keys() - used:
            self._file.free(self._storages.pop(number).extent)
        for storage in self._storages.values():
            storage.base = None

    def _shelved(self, leaf: Tensor, known: dict[int, int]) -> _View:
        """Where a tensor lies on the file; it is written unless that was done."""
        place = address(leaf)
        old = self._storages.get(known.get(place, -1))
        if old is not None and old.changed():
            self._file.free(self._storages.pop(known.pop(place)).extent)
        if place not in known:
            base = torch.empty(0, dtype=torch.uint8, device=leaf.device).set_(leaf.untyped_storage())
            self._next += 1
            known[place] = self._next
            self._storages[self._next] = _Storage(self._file.write(base), leaf.device)
        return _View(known[place], leaf.dtype, leaf.shape, leaf.stride(), int(leaf.storage_offset()))

    def get(self) -> Env:
        """All values, in memory."""
        for own in self._storages.values():
            own.base = self._file.read(own.extent, own.device)
            own.version = own.base._version
        whole = [self._unshelved(own) for own in self._leaves]
        env = {key: own.build([whole[number] for number in places]) for key, (own, places) in self._values.items()}
        return env | self._kept

    def _unshelved(self, leaf: Tensor | _View) -> Tensor:
        if not isinstance(leaf, _View):
            return leaf
        base = self._storages[leaf.storage].base
        assert base is not None
        return leaf.over(base)

    def taken(self) -> Env:
        """The values, for somebody who does not put them back."""
        env = self.get()
        for own in self._storages.values():
            own.base = None
        return env

    def clear(self) -> None:
        """Forget everything."""
        for own in self._storages.values():
            self._file.free(own.extent)
        self._storages, self._values, self._leaves, self._kept = {}, {}, [], {}


def address(value: Tensor | None) -> int:
    """Of the memory that a tensor lies in; 0 where that is not to be told."""
    if value is None or value.layout != torch.strided or value.device.type == "meta":
        return 0
    return value.untyped_storage().data_ptr()


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor, or a tuple of what is, other values besides: nothing that could be changed in place
    but tensors."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (Tensor, int, float, complex, str, bool, torch.dtype, torch.device, type(None)))


def _is_constant(key: Any) -> bool:
    return isinstance(key, fx.Node) and key.op == "get_attr"


def _fits(leaf: Tensor) -> bool:
    """Whether the file can hold a tensor as it is."""
    usual = type(leaf) is Tensor and leaf.layout == torch.strided and not leaf.is_quantized
    if not usual or leaf.is_conj() or leaf.is_neg() or leaf.is_inference() or leaf.requires_grad:
        return False
    return leaf.device.type != "meta" and leaf.untyped_storage().nbytes() >= _SMALL

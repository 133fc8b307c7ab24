"""Values of networks that lie on a file while nobody needs them, and share memory again when they are back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...tracing.containers import flatten, leaves
from ...tracing.structure import Structure
from .spill_file import Extent, SpillFile

Env = dict[Any, Any]
"""Values of a network on one batch, by node."""

_SMALL = 4096  # bytes below which nothing is gained


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

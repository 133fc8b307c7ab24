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
from torch import Tensor

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

    def __len__(self) -> int:
        return self.shape[0]

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

"""How much memory a fit may take, what it is going to take, and what it took."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from ...tracing.calls import Call, leaves

SHARE = 1 / 3
"""Of the memory that is free: what a fit takes unless it is told."""

_UNKNOWN = 4 << 30  # where the system does not say what is free
_VALUES = 0.75  # of the memory for values of nodes; the rest is for what calls inside a node make
_SAMPLES = 0.5  # of the memory for the samples of a regression


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; in main memory those of the control group if that has fewer."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available(), _left_to_the_group())


def limit_of(memory: float | None, call: Call) -> float:
    """The bound that somebody asked for; None: a share of what is free where a call's tensors are."""
    device = next((value.device for value in leaves(call)), torch.device("cpu"))
    return SHARE * free_memory(device) if memory is None else memory


def _available() -> int:
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(AttributeError, OSError, ValueError):  # not told on Windows
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return _UNKNOWN


def _left_to_the_group() -> int:
    """What the limit of a container leaves (version 2 of control groups)."""
    with suppress(OSError, ValueError):
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        return max(int(limit) - int(used), 0)
    return sys.maxsize


def peak_memory() -> int:
    """The most that this process has taken so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def taken_memory() -> int:
    """What this process takes at present, in bytes; 0 where the system does not say."""
    with suppress(OSError, ValueError, AttributeError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def give_back() -> None:
    """Let the C library return what is free to the system: glibc keeps it, in pieces between what is in use, and values
    of many batches that come and go would take half as much again as they hold."""
    trim = _trimming()
    if trim is not None:
        trim(0)


@cache
def _trimming() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError, AttributeError):  # another C library
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        return found
    return None


@dataclass(frozen=True)
class Bound:
    """What may be in memory at a time.

    Attributes:
        limit: bytes in all.
        per_row: what an input takes in a walk.
        samples: what the samples of the largest regression take.
        gram: what its Gram matrix takes, beside the bound where that is smaller.
    """

    limit: float
    per_row: float
    samples: float
    gram: float

    @property
    def samples_on_file(self) -> bool:
        """Whether the samples are too large for their share."""
        return self.samples > _SAMPLES * self.limit

    def rows(self, largest: int) -> int:
        """Inputs whose values may stay in memory, beside those of a batch of this size."""
        room = _VALUES * (self.limit - min(self.samples, _SAMPLES * self.limit) - self.gram)
        return max(int(room / max(self.per_row, 1.0)) - largest, 0)

    def expected(self, kept: int, largest: int, batches: int) -> float:
        """The peak in bytes: the values of so many inputs and of a batch at work, and the largest regression."""
        samples = self.samples / max(batches, 1) if self.samples_on_file else self.samples
        return (kept + largest) * self.per_row / _VALUES + samples + self.gram


@dataclass(frozen=True)
class Usage:
    """What a fit takes, in bytes, beside what is there before it.

    Attributes:
        limit: the bound.
        expected: the peak, as computed before the work starts.
        spilled: of all values at their peak, what does not stay in memory.
        on_file: whether that lies in a temporary file; else it is computed anew each time.
        measured: by how much this process grew, at the peak; None: that is not known yet.
    """

    limit: float
    expected: float
    spilled: float
    on_file: bool
    measured: float | None = None

    def __str__(self) -> str:
        text = f"{size(self.expected)} expected at the peak, of at most {size(self.limit)}"
        where = f"in a file in {tempfile.gettempdir()}" if self.on_file else "computed anew each time"
        text += f", {size(self.spilled)} of values {where}" if self.spilled else ""
        return text + ("" if self.measured is None else f"; {size(self.measured)} measured")


@dataclass
class Meter:
    """Measures what is taken beyond what was there when it was made."""

    start: int = field(default_factory=taken_memory)
    before: int = field(default_factory=peak_memory)
    most: int = 0

    def look(self) -> None:
        """Note what is taken at present."""
        self.most = max(self.most, taken_memory())

    def on(self, usage: Usage) -> Usage:
        """The usage with what was measured; a peak between two looks counts where it is the process's highest."""
        self.look()
        peak = peak_memory()
        most = max(self.most, peak if peak > self.before else 0)
        return replace(usage, measured=float(max(most - self.start, 0)))


def size(count: float) -> str:
    """Bytes in words.

    >>> size(3 << 29), size(2000)
    ('1.5 GiB', '0.0 GiB')
    """
    return f"{count / (1 << 30):.1f} GiB"

"""How much memory a fit may take, what it is going to take, and what it took."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

import torch

from ...tracing.calls import Call
from .footprint import MOST, RegressionSize

SHARE, MOST_UNASKED = 1 / 3, 3 << 30
"""Of the memory that is free, and bytes of main memory: what a fit takes at most unless it is told. What is beyond lies
in a file, which the system keeps in memory, too, as long as nobody else needs it."""

_UNKNOWN = 4 << 30  # where the system does not say what is free
_VALUES = 0.6  # of the memory for values of nodes; the rest is for what calls inside a node make
_AT_WORK = 2  # times its values that a batch takes while its nodes run, and its samples are drawn
_PULSE = 0.01  # seconds
_SAMPLES = 0.5  # of what is planned for, for the samples of a regression
_PLANNED = 0.9  # of the bound; the rest is for what is too small to be counted, and for a machine's own choices


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; in main memory those of the control group if that has fewer."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available(), _left_to_the_group())


def limit_of(memory: float | None, call: Call) -> float:
    """The bound that somebody asked for; None: a share of what is free where a call's tensors are."""
    if memory is not None:
        return memory
    share = SHARE * free_memory(call.device)
    return share if call.device.type == "cuda" else min(share, MOST_UNASKED)


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


def taken_memory(device: torch.device) -> int:
    """What this process takes at present, in bytes, on a device; 0 where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
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
        copy: what the network takes that is written to.
        regressions: their sizes.
        wished: positions of a regression, per input and at least.
        scarce: positions for each input, below which a ridge is chosen by trying.
    """

    limit: float
    per_row: float
    copy: float = 0.0
    regressions: tuple[RegressionSize, ...] = ()
    wished: tuple[int, int] = (1, 1)
    scarce: float = 0.0

    @property
    def _for_samples(self) -> float:
        return _SAMPLES * (_PLANNED * self.limit)

    def samples(self, rows: float = math.inf) -> float:
        """What the samples of the largest regression on so many inputs take."""
        return max((own.drawn(own.positions(self.wished, rows)) for own in self.regressions), default=0.0)

    def samples_on_file(self, rows: float) -> bool:
        """Whether the samples are too large for their share."""
        return self.samples(rows) > self._for_samples

    def regression(self, rows: float, batches: int, *, on_file: bool) -> float:
        """What the largest regression takes, samples and all."""
        most = 0.0
        for own in self.regressions:
            positions = own.positions(self.wished, rows)
            kept = own.drawn(positions) / (max(batches, 1) if on_file else 1)
            beside = max(own.work(positions, self.scarce, on_file=on_file), own.drawing(positions, batches))
            most = max(most, kept + beside)
        return most

    def rows(self, largest: int) -> int:
        """Inputs whose values may stay in memory, beside those of a batch of this size."""
        samples = min(self.samples(), self._for_samples)
        square = max((24.0 * min(own.inputs + 1, MOST / own.itemsize) ** 2 for own in self.regressions), default=0.0)
        room = _VALUES * (_PLANNED * self.limit - samples - min(square, self._for_samples) - self.copy)
        return max(int(room / max(self.per_row, 1.0)) - _AT_WORK * largest, 0)

    def expected(self, kept: int, largest: int, rows: int, batches: int) -> float:
        """The peak in bytes: the values of so many inputs and of a batch at work, and the largest regression."""
        beside = self.regression(rows, batches, on_file=self.samples_on_file(rows))
        values = (min(kept + largest, rows) + (_AT_WORK - 1) * largest) * self.per_row
        return self.copy + values + beside


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


class Meter(threading.Thread):
    """Measures what is taken beyond what was there before; used as a context manager. It draws no random numbers.

    What the C library holds that is free goes back to the system first: it would be used again, and not seen.
    """

    leaves_random_state = True

    def __init__(self, device: torch.device | None = None) -> None:
        """`device`: whose memory is looked at; None: the CPU."""
        super().__init__(name="fxzip memory", daemon=True)
        give_back()
        self._device = device or torch.device("cpu")
        self._over = threading.Event()
        self._start, self._before = taken_memory(self._device), peak_memory()
        self._most = self._start

    def __enter__(self) -> Meter:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(_PULSE):
            self._most = max(self._most, taken_memory(self._device))

    @property
    def grown(self) -> int:
        """Bytes at the peak; one between two looks counts where it is the process's highest."""
        peak = peak_memory() if self._device.type == "cpu" else 0
        self._most = max(self._most, taken_memory(self._device), peak if peak > self._before else 0)
        return self._most - self._start


def size(count: float) -> str:
    """Bytes in words.

    >>> size(3 << 29), size(5 << 20)
    ('1.5 GiB', '5 MiB')
    """
    return f"{count / (1 << 20):.0f} MiB" if count < 1000 << 20 else f"{count / (1 << 30):.1f} GiB"

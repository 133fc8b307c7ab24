"""Sums and messages over processes: under any initialised `torch.distributed` group every rank has its own part of the
data, and all end with the same numbers. Without a group, or in one of one process, nothing here does anything.

Sums are taken in the order of the ranks, so that they are the same on every rank, to the bit, and in every run. Before
each exchange the ranks tell one another where they are: if one has failed, or has gone another way, all of them raise a
`ProcessError` there; none waits for what will not come. What breaks the connection does so too, at the latest after the
timeout of the group.

This is the only module that knows of `torch.distributed`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ProcessError

T = TypeVar("T")

_CHUNK = 1 << 20  # entries that are exchanged at a time: what is received takes so much per process

_APART: ContextVar[bool] = ContextVar("apart", default=False)
_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)


def count() -> int:
    """How many processes work together."""
    if _APART.get() or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def rank() -> int:
    """The number of this one."""
    return dist.get_rank() if count() > 1 else 0


@contextmanager
def apart() -> Iterator[None]:
    """Inside, this process works by itself: for what one rank does alone though a group is initialised."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


@contextmanager
def together() -> Iterator[None]:
    """A piece of work of all processes: if one fails, the others learn of it, and none leaves before the last is done.

    >>> with together():
    ...     print(count(), rank())
    1 0

    Raises:
        ProcessError: another process has failed.
    """
    if count() == 1 or _INSIDE.get():
        yield
        return
    token = _INSIDE.set(True)
    try:
        yield
    except ProcessError:  # of which all know
        raise
    except BaseException as error:
        with suppress(ProcessError):
            _meet("failed", f"{type(error).__name__}: {error}")
        raise
    else:
        _meet("done")
    finally:
        _INSIDE.reset(token)


def total(value: Tensor) -> Tensor:
    """The sum over all processes, in the order of their ranks."""
    if count() == 1:
        return value
    _meet(f"a sum of {tuple(value.shape)}, {value.dtype}")
    flat = value.detach().to(_device()).contiguous().reshape(-1)
    result = torch.empty_like(flat)
    for start in range(0, len(flat), _CHUNK):
        parts = _all_gather(flat[start : start + _CHUNK])
        own = parts[0]
        for part in parts[1:]:
            own += part
        result[start : start + _CHUNK] = own
    return result.reshape(value.shape).to(value.device)


class ExactSum:
    """A sum of float64 tensors that does not depend on their order, nor on which process has which of them.

    All are rounded to multiples of one power of two, so far below the largest entry of the first tensor that no
    addition rounds, as long as on average none is eight times as large. With n tensors that is 2⁻⁴⁹ n of the entry, far
    less than products in float32 have lost already; but least squares amplifies what is lost from layer to layer, and
    processes that sum in another order would end with other weights.

    >>> sums = ExactSum(3)
    >>> for value in (1.0, 1e-9, -1.0):
    ...     sums.add(torch.tensor([value], dtype=torch.float64))
    >>> bool(abs(sums.total() - 1e-9) < 1e-14)
    True
    """

    def __init__(self, tensors: int) -> None:
        """`tensors`: how many this process is going to add, at least one."""
        self._tensors = tensors
        self._sum: Tensor | None = None
        self._offset = 0.0

    def add(self, value: Tensor) -> None:
        """Take in a float64 tensor, which is written over."""
        if self._sum is None:
            every = everyone((_largest(value), self._tensors))
            tensors = sum(own for _, own in every)
            self._offset = _offset(every[0][0], 3 + math.ceil(math.log2(tensors)))
        value.add_(self._offset).sub_(self._offset)
        self._sum = value if self._sum is None else self._sum.add_(value)

    def total(self) -> Tensor:
        """Of all processes."""
        assert self._sum is not None
        return total(self._sum)


def grid(value: Tensor) -> float:
    """The offset that rounds like `ExactSum` where it is not known how many tensors come: x + offset - offset is a
    multiple of 2⁻⁴⁰ of the largest entry."""
    return _offset(_largest(value), 12)


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _offset(most: float, room: int) -> float:
    """Beside it float64 has no digits below 2^(room - 52) of a number; 0 where that is to round nothing."""
    return math.ldexp(1.5, math.frexp(most)[1] + room) if 0.0 < most < math.inf else 0.0


def gathered(value: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks."""
    if count() == 1:
        return value
    lengths = everyone(len(value))
    own = value.detach().to(_device()).contiguous()
    padded = own.new_zeros(max(lengths), *own.shape[1:])
    padded[: len(own)] = own
    found = _all_gather(padded)
    return torch.cat([part[:length] for part, length in zip(found, lengths, strict=True)]).to(value.device)


def everyone(value: T) -> list[T]:
    """What each process has, by rank; small things that can be pickled."""
    if count() == 1:
        return [value]
    _meet("values of all")
    return _objects(value)


def of_first(make: Callable[[], T]) -> T:
    """What the first process makes; the others do not make it."""
    if count() == 1:
        return make()
    box: list[Any] = [None]
    if rank() == 0:
        with apart():
            box = [make()]
    _meet("a value of the first")
    with _named():
        dist.broadcast_object_list(box, src=0, device=_device())
    found: T = box[0]
    return found


def before(counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each of some counts, what the processes of lower ranks have, and all of them together.

    >>> before([3, 4])
    ([0, 0], [3, 4])
    """
    every = everyone(list(counts))
    lower = [sum(own) for own in zip(*every[: rank()], strict=True)] or [0] * len(counts)
    return lower, [sum(own) for own in zip(*every, strict=True)]


def same(value: Any, what: str) -> None:
    """Whether all processes have the same.

    Raises:
        ProcessError: they have not.
    """
    every = everyone(value)
    odd = [number for number, own in enumerate(every) if own != every[0]]
    if odd:
        raise ProcessError(
            f"All processes must have the same {what}; those of rank {', '.join(map(str, odd))} differ from those of "
            "rank 0. Load them from the same file on every rank; only `data` may differ."
        )


def _meet(place: str, failure: str = "") -> None:
    """Tell one another where this process is.

    Raises:
        ProcessError: another one has failed, or is elsewhere.
    """
    own = torch.tensor([bool(failure), zlib.crc32(place.encode())], dtype=torch.int64, device=_device())
    found = torch.stack(_all_gather(own)).tolist()
    if len({mark for _, mark in found}) == 1 and not any(failed for failed, _ in found):
        return

    said = _objects((failure, place))
    failed = [f"rank {number}: {text}" for number, (text, _) in enumerate(said) if text]
    if failed:
        raise ProcessError(
            f"All processes must come to the end; {len(failed)} of {len(said)} failed. " + " ".join(failed)
        )
    places = ", ".join(f"rank {number} is at {where}" for number, (_, where) in enumerate(said))
    raise ProcessError(
        f"All processes must take the same way; {places}. Call the same function with the same models and options on "
        "every rank; only `data` may differ."
    )


def _all_gather(value: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(count())]
    with _named():
        dist.all_gather(parts, value)
    return parts


def _objects(value: T) -> list[T]:
    found: list[Any] = [None] * count()
    with _named():
        dist.all_gather_object(found, value)
    return found


@contextmanager
def _named() -> Iterator[None]:
    """What breaks an exchange is a `ProcessError`."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ProcessError(
            f"Processes must be able to reach one another; rank {dist.get_rank()} lost the others: {reason} Another "
            "process has ended, or took longer than the timeout of the group (`init_process_group(timeout=...)`)."
        ) from error


def _device() -> torch.device:
    """Where tensors must lie to be exchanged."""
    if "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

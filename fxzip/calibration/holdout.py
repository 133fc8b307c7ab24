"""Inputs that nothing is fitted on, and how far the heads of a zip agree with the originals on them.

A share 1/n of the calibration inputs is held out: counted through all batches of a source, one of every n, at a place
that varies, for inputs of several tasks may come by turns. All stages see the others only. In later passes the inputs
held out are known by a checksum of their content, so that a loader that shuffles does not mix the two up, and nothing
but them has to be kept. A search, which reads the data again and again, keeps all of it. Where a model takes one batch
size only, whole batches are held out.

Head k is compared with model k (see `agreement.py`). Where there is one source of data per model, a head is compared on
the inputs of its own model. That is what to give for models of different tasks: what a head says of inputs of another
task is nearly chance, and agrees much less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..tracing import Program, run_eager
from ..tracing.calls import Call, batch_size, leaves, moved, select_rows
from ..tracing.tensor_bytes import bytes_of
from . import processes
from .agreement import Comparison, HeadAgreement
from .rejections import not_finite, run_on
from .sources import Calibration, as_batch

EVERY_TENTH = 10
EVERY_FIFTH = 5
LEAST = 10


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out calls, and what the originals give on them.

    Attributes:
        calls: the number of the source, and the call.
        expected: per call the tensors of each model's output; None where the model is not asked.
        inputs: number of inputs that each model is compared on.
    """

    calls: tuple[tuple[int, Call], ...]
    expected: tuple[tuple[list[Tensor] | None, ...], ...]
    inputs: tuple[int, ...]

    @classmethod
    def of(
        cls, calls: Sequence[tuple[int, Call]], programs: Sequence[Program], places: Sequence[int] | None = None
    ) -> HeldOut:
        """Run the originals on the calls of this process. `places`: the number of the batch that each is from.

        Raises:
            DataError: a model does not take a call, or gives NaN for the NaN that it holds.
        """
        sources = {source for own in processes.everyone({source for source, _ in calls}) for source in own}
        several = len(sources) == len(programs) > 1
        expected, inputs = [], [0] * len(programs)
        for place, (source, call) in enumerate(calls):
            index = place if places is None else places[place]
            outputs: list[list[Tensor] | None] = []
            broken = _nan(leaves(call))
            for k, program in enumerate(programs):
                if several and source != k:
                    outputs.append(None)
                    continue
                given = leaves([run_on(partial(run_eager, program.module, call), call, index, program.call)])
                if broken and (lost := _nan(given)):
                    raise not_finite(lost, "output", f"model {k}", index, call)
                outputs.append(given)
                inputs[k] += batch_size(call) or 1
            expected.append(tuple(outputs))
        return cls(tuple(calls), tuple(expected), tuple(processes.before(inputs)[1]))

    @property
    def size(self) -> int:
        """Number of inputs, of all processes."""
        return processes.before([sum(batch_size(call) or 1 for _, call in self.calls)])[1][0]

    def compared(self, network: nn.Module) -> tuple[HeadAgreement, ...]:
        """How far each head of a multi-head network, that returns a tuple, agrees with its original."""
        sums = [Comparison() for _ in self.inputs]
        for (_, call), wanted in zip(self.calls, self.expected, strict=True):
            given = run_eager(network, call)
            for own, output, expected in zip(sums, given, wanted, strict=True):
                if expected is not None:
                    own.add(leaves([output]), expected, batch_size(call) or 1)
        every = processes.everyone(sums)
        return tuple(Comparison.joined([theirs[k] for theirs in every]).result() for k in range(len(sums)))

    def agreement(self, network: nn.Module) -> tuple[float, ...]:
        """One score in [0, 1] for each head of a multi-head network."""
        return tuple(head.score for head in self.compared(network))


def hold_out(
    calibration: Calibration, programs: Sequence[Program], *, every: int = EVERY_FIFTH, needed_by: str = ""
) -> tuple[Calibration, HeldOut | None]:
    """The calibration without one input of every n, and these. Whole batches where a model takes one batch size only.

    Args:
        calibration: of all inputs.
        programs: the models.
        every: n, 2 or more.
        needed_by: what cannot do without them, for the error; it needs ten of every source. Otherwise as many as there
            are will do; None is returned where there are none.

    Raises:
        DataError: fewer than ten inputs of a source are held out, and `needed_by` says that they are needed.
    """
    whole = _whole_batches(calibration, programs)
    held: list[tuple[int, Call]] = []
    places: list[int] = []
    rows, out = [Counter[int]() for _ in calibration.sources], [0] * len(calibration.sources)
    seen, total = _counted_before(calibration, whole=whole), [0] * len(out)
    last: dict[int, tuple[int, Call]] = {}

    for index, (source, call) in enumerate(calibration.unmoved("holding out").by_source()):
        size = batch_size(call) or 1
        mine = one_of(_numbers(size, seen[source], whole=whole), every, every - 1)
        seen[source] += 1 if whole else size
        total[source] += size
        last[source] = index, call
        if bool(mine.any()):
            places.append(index)
            _take(held, rows, out, source, call if whole else _chosen(call, mine), whole=whole)

    everywhere, counts = processes.before(out)[1], processes.everyone(seen)
    for source, (index, call) in last.items():
        latest = max(range(len(counts)), key=lambda number: (counts[number][source], number))
        if whole and not everywhere[source] and seen[source] > 1 and latest == processes.rank():
            places.append(index)
            _take(held, rows, out, source, call, whole=True)  # at least one batch, if that leaves another
    out, total = processes.before(out)[1], processes.before(total)[1]
    for found, number in zip(out, total, strict=True):
        if needed_by and found < LEAST:
            raise DataError(
                f"{needed_by} holds out one of every {every} inputs of `data` and measures "
                f"agreement on at least {LEAST}; found {found} of {number}{' in whole batches' if whole else ''}. Pass "
                f"at least {every * LEAST} inputs."
            )
    if not all(out):
        return calibration, None
    held = [(source, moved(call, calibration.sample)) for source, call in held]
    rest = replace(calibration, without=Without(tuple(rows), whole))
    return (_kept(rest) if needed_by else rest), HeldOut.of(held, programs, places)


def thinned(calibration: Calibration, programs: Sequence[Program], *, every: int) -> Calibration:
    """The calibration with one of every n of its inputs only, kept in memory; where a model takes one batch size only,
    one of every n batches of each source."""
    whole = _whole_batches(calibration, programs)
    seen, kept = _counted_before(calibration, whole=whole), [list[Any]() for _ in calibration.sources]
    for source, call in calibration("thinning").by_source():
        size = batch_size(call) or 1
        mine = one_of(_numbers(size, seen[source], whole=whole), every, 0)
        seen[source] += 1 if whole else size
        if bool(mine.any()):
            kept[source].append(as_batch(call if whole else _chosen(call, mine)))
    return replace(calibration, sources=tuple(kept), without=None, counts=[])


def _whole_batches(calibration: Calibration, programs: Sequence[Program]) -> bool:
    """Whether batches have to stay whole: a model takes one size only, or rows cannot be chosen."""
    dense = all(value.layout == torch.strided for value in leaves(calibration.sample))
    return not dense or any(not program.batch_axes for program in programs)


def _numbers(size: int, first: int, *, whole: bool) -> Tensor:
    """Of the inputs of a batch, from the first on; all have that of the batch where it stays whole."""
    return torch.full((size,), first, device="cpu") if whole else torch.arange(size, device="cpu") + first


def one_of(numbers: Tensor, every: int, first: int) -> Tensor:
    """Which numbers are chosen: one of every n, `first` among the first n, and anywhere among later ones.

    >>> one_of(torch.arange(20), 5, 4).nonzero().flatten().tolist()
    [4, 7, 11, 15]
    """
    groups = (numbers // every).tolist()
    place = {group: (first + (crc32(str(group).encode()) if group else 0)) % every for group in set(groups)}
    return numbers % every == torch.tensor([place[group] for group in groups], device="cpu")


def _kept(calibration: Calibration) -> Calibration:
    """The calibration with its batches in memory, for what reads them again and again."""
    kept: list[list[Any]] = [[] for _ in calibration.sources]
    for source, call in calibration("holding out").by_source():
        kept[source].append(as_batch(call))
    return replace(calibration, sources=tuple(kept), without=None)


def _counted_before(calibration: Calibration, *, whole: bool) -> list[int]:
    """How many inputs of each source the processes of lower ranks have; `whole`: how many batches."""
    counts = [0] * len(calibration.sources)
    if processes.count() > 1:
        for source, call in calibration.unmoved("counting").by_source():
            counts[source] += 1 if whole else batch_size(call) or 1
    return processes.before(counts)[0]


def _nan(values: Sequence[Tensor]) -> int:
    return sum(int(value.isnan().sum()) for value in values)


def _take(
    held: list[tuple[int, Call]], rows: list[Counter[int]], out: list[int], source: int, call: Call, *, whole: bool
) -> None:
    held.append((source, call))
    rows[source].update([checksum(call)] if whole else checksums(call))
    out[source] += batch_size(call) or 1


@dataclass(frozen=True)
class Without:
    """Inputs that are left out of every pass: by source, how often each checksum is; or of whole batches."""

    rows: tuple[Counter[int], ...]
    whole: bool

    def __call__(self, calls: Iterator[tuple[int, Call]]) -> Iterator[tuple[int, Call]]:
        """The calls of one pass without them."""
        left = [counter.copy() for counter in self.rows]
        for source, call in calls:
            mine = [checksum(call)] if self.whole else checksums(call)
            keep = []
            for own in mine:
                keep.append(left[source][own] <= 0)
                left[source][own] -= 1
            if any(keep):  # of a whole batch there is one answer for all rows
                yield source, call if self.whole else _chosen(call, torch.tensor(keep, device="cpu"))


def checksum(call: Call) -> int:
    """Of all tensors of a call.

    >>> checksum(Call((torch.ones(2),), {})) == checksum(Call((torch.ones(2).double(),), {}))
    False
    """
    result = 0
    for value in leaves(call):
        result = crc32(bytes_of(value), result)
    return result


def checksums(call: Call) -> list[int]:
    """Of each row of a call.

    >>> first, second, third = checksums(Call((torch.tensor([[1.0], [2.0], [1.0]]),), {}))
    >>> first == third != second
    True
    """
    size = batch_size(call) or 1
    result = [0] * size
    for value in leaves(call):
        if value.ndim and value.shape[0] == size:
            lines = bytes_of(value)
            step = len(lines) // size
            for row in range(size):
                result[row] = crc32(lines[row * step : (row + 1) * step], result[row])
    return result


def _chosen(call: Call, rows: Tensor) -> Call:
    """The chosen rows of a call."""
    return call if bool(rows.all()) else select_rows(call, rows)

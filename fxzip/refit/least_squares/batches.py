"""The batches of a fit: all of them, in memory or on a temporary file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import fx, nn

from ...calibration import processes
from ...calibration.store import NOTHING, Store
from ...errors import DataError
from ...tracing.calls import Call, batch_size
from ...tracing.containers import flatten
from .lockstep import Lockstep
from .memory import Bound, Usage
from .spill_file import SpillFile, free_on_disk
from .spilling import Shelf

_SPARE = 1.5  # times what the values take: a file has gaps


@dataclass(eq=False)
class Batches:
    """Calls of all sources, of this process.

    Attributes:
        calls: each gives the call: from memory, or from the file.
        source: of each batch, the number of its source.
        numbers: of each batch, its own among those of all processes.
        sources: how many sources there are.
        all: how many batches, of all processes.
        inputs: how many inputs, of all processes.
        kept: how many batches stay in memory, the first ones; None: all.
        file: where the others lie; None: nowhere, their values are computed anew each time.
        samples_file: where the samples of a regression lie; None: in memory.
        usage: what the fit is going to take.
        store: has what was solved before, where a compile is resumed.
    """

    calls: list[Callable[[], Call]]
    source: list[int]
    numbers: list[int]
    sources: int
    all: int
    inputs: int
    kept: int | None = None
    file: SpillFile | None = None
    samples_file: SpillFile | None = None
    usage: Usage | None = None
    store: Store = NOTHING

    @classmethod
    def of(cls, call: Call) -> Batches:
        """A single one."""
        return cls([lambda: call], [0], [0], 1, 1, batch_size(call) or 1)

    @classmethod
    def read(cls, numbered: Iterable[tuple[int, Call]], sources: int, bound: Bound, file: SpillFile) -> Batches:
        """All batches of all sources; those that are too many for the bound go to the file as they come."""
        calls, source, rows = list[Callable[[], Call]](), list[int](), list[int]()
        kept, full = 0, False
        for number, call in numbered:
            source.append(number)
            rows.append(batch_size(call) or 1)
            full = full or sum(rows) > bound.rows(max(rows))
            kept += not full
            calls.append(_on_file(call, file) if full else partial(_same, call))

        short = [number for number, count in enumerate(processes.everyone(len(rows))) if not count]
        if short:
            raise DataError(
                "A fit needs at least one batch that is not held out of every process; rank "
                f"{', '.join(map(str, short))} has none. Give each a part of `data`."
            )
        largest, inside = max(rows, default=0), sum(rows[:kept])
        outside = bound.per_row * (sum(rows) - inside)
        room = free_on_disk()
        usage = Usage(
            bound.limit,
            bound.expected(inside, largest, sum(rows), len(rows)),
            outside,
            on_file=_SPARE * outside <= room,
        )
        numbers, everything = _numbered(source, sources)
        inputs = processes.before([sum(rows)])[1][0]
        return cls(
            calls, source, numbers, sources, everything, inputs, kept,
            file=file if usage.on_file else None,
            samples_file=file if bound.samples_on_file(sum(rows)) and bound.samples() <= room else None,
            usage=usage,
        )  # fmt: skip

    def lockstep(self, module: fx.GraphModule) -> Lockstep:
        """A network on all of them."""
        return Lockstep(module, self.calls, self.kept, self.file)


def _numbered(source: Sequence[int], sources: int) -> tuple[list[int], int]:
    """The number of each batch among those of all processes, source by source, and how many there are."""
    counts = [source.count(number) for number in range(sources)]
    lower, every = processes.before(counts)
    following = [sum(every[:number]) + lower[number] for number in range(sources)]
    numbers = []
    for number in source:
        numbers.append(following[number])
        following[number] += 1
    return numbers, sum(every)


def _same(call: Call) -> Call:
    return call


def _on_file(call: Call, file: SpillFile) -> Callable[[], Call]:
    """Gives a call from the file; from memory if there is no room for it there."""
    found, structure = flatten((call.args, call.kwargs))
    shelf = Shelf(file)
    try:
        shelf.put({"inputs": tuple(found)}, nn.Module())
    except OSError:
        return partial(_same, call)
    return lambda: Call(*structure.build(shelf.taken()["inputs"]))

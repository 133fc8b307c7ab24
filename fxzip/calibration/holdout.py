"""How far the heads of a zip agree with the originals, on inputs that nothing was fitted on.

Every fifth input of the calibration data is held out: counted through all batches of a source, inputs 4, 9, 14, … of
it. Matching and refit see the others only. The data is read once, so that a shuffling loader cannot mix the two up.

Head k is compared with model k output tensor by output tensor, over all held-out inputs:

    [batch, classes ≥ 2], floating point:   the share of inputs with the same argmax
    other floating point:                   1 - ‖z - y‖ / ‖y‖ for output y and the head's z, at least 0
    integers and booleans:                  the share of equal entries

The agreement of a head is the mean over its tensors. Where there is one source of data per model, a head is compared on
the inputs of its own model. That is what to give for models of different tasks: what a head says of inputs of another
task is nearly chance, and agrees much less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..tracing import Program, run_eager
from ..tracing.calls import Call, batch_size, leaves, select_rows
from .sources import Calibration, as_batch

EVERY = 5
LEAST = 10


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out calls, and what the originals give on them.

    Attributes:
        calls: the number of the source, and the call.
        expected: per call the tensors of each model's output; None where the model is not asked.
        size: number of inputs.
    """

    calls: tuple[tuple[int, Call], ...]
    expected: tuple[tuple[list[Tensor] | None, ...], ...]
    size: int

    @classmethod
    def of(cls, calls: Sequence[tuple[int, Call]], programs: Sequence[Program]) -> HeldOut:
        """Run the originals."""
        several = len({source for source, _ in calls}) == len(programs)
        expected = tuple(
            tuple(
                leaves([run_eager(program.module, call)]) if not several or source == k else None
                for k, program in enumerate(programs)
            )
            for source, call in calls
        )
        return cls(tuple(calls), expected, sum(batch_size(call) or 1 for _, call in calls))

    def agreement(self, network: nn.Module) -> tuple[float, ...]:
        """Of each head of a multi-head network."""
        sums: list[list[_Sum]] = [[] for _ in self.expected[0]]
        for (_, call), wanted in zip(self.calls, self.expected, strict=True):
            given = run_eager(network, call)
            for own, output, expected in zip(sums, given, wanted, strict=True):
                if expected is not None:
                    own.extend(_Sum() for _ in expected[len(own) :])
                    for total, found, original in zip(own, leaves([output]), expected, strict=True):
                        total.add(found, original)
        return tuple(sum(total.result() for total in own) / max(len(own), 1) if own else 1.0 for own in sums)


def same_class(found: Tensor, original: Tensor) -> Tensor | None:
    """For each input whether two outputs [batch, classes ≥ 2] name the same class; None for other outputs.

    >>> same_class(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), torch.tensor([[0.0, 2.0], [0.0, 2.0]]))
    tensor([ True, False])
    """
    if original.ndim != 2 or original.shape[1] < 2 or not original.is_floating_point():
        return None
    return (found.argmax(1) == original.argmax(1)) & found.isfinite().all(1)


@dataclass
class _Sum:
    """Agreement of one tensor, under way."""

    hits: float = 0.0
    count: float = 0.0
    error: float = 0.0
    norm: float = 0.0

    def add(self, found: Tensor, original: Tensor) -> None:
        if not original.is_floating_point() and not original.is_complex():
            self.hits += float((found == original).sum())
            self.count += original.numel()
        elif (same := same_class(found, original)) is not None:
            self.hits += float(same.sum())
            self.count += len(original)
        else:
            self.error += float((found - original).abs().double().square().sum())
            self.norm += float(original.abs().double().square().sum())

    def result(self) -> float:
        if self.count:
            return self.hits / self.count
        if self.norm == 0.0:
            return float(self.error == 0.0)
        return max(0.0, 1.0 - (self.error / self.norm) ** 0.5) if self.error < float("inf") else 0.0


def hold_out(
    calibration: Calibration, programs: Sequence[Program], *, name: str = '`until="auto"`'
) -> tuple[Calibration, HeldOut]:
    """The calibration without every fifth input, and these. Whole batches where a model takes one batch size only.

    Raises:
        DataError: fewer than ten inputs of a source are held out; `name` is what asks for them.
    """
    whole = any(not program.batch_axes for program in programs)
    kept: list[list[Any]] = [[] for _ in calibration.sources]
    held: list[tuple[int, Call]] = []
    seen, out = [0] * len(kept), [0] * len(kept)
    rows, batches_seen = [0] * len(kept), [0] * len(kept)
    for source, call in calibration("holding out").labelled():
        size = batch_size(call) or 1
        places = torch.arange(size) + seen[source]
        if whole:
            places = torch.full((size,), batches_seen[source])
        mine = places % EVERY == EVERY - 1
        for chosen, put in ((~mine, kept[source].append), (mine, lambda part, s=source: held.append((s, part)))):
            _put(call, chosen, put)
        seen[source] += size
        batches_seen[source] += 1
        out[source] += int(mine.sum())
        rows[source] += size
    for found, total in zip(out, rows, strict=True):
        if found < LEAST:
            raise DataError(
                f"{name} holds out every fifth input of `data` and measures agreement on at least {LEAST}; found "
                f"{found} of {total}{' in whole batches' if whole else ''}. Pass at least {EVERY * LEAST} inputs."
            )
    sources = tuple([as_batch(call) for call in calls] for calls in kept)
    return replace(calibration, sources=sources), HeldOut.of(held, programs)


def _put(call: Call, chosen: Tensor, put: Callable[[Call], Any]) -> None:
    """Hand over the chosen rows of a batch, if there are any."""
    if bool(chosen.all()):
        put(call)
    elif bool(chosen.any()):
        put(select_rows(call, chosen))

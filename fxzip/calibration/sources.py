"""Calibration data as the stages see it: calls of the sample's form, as often as they ask for them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from ..errors import DataError
from ..tracing.calls import Call, JointCall, batch_size, moved
from . import processes
from .batches import batches
from .data_forms import MAX_BATCHES, PerModel, Source, sources_of
from .joining import joined
from .store import NOTHING, Store

logger = logging.getLogger("fxzip")

__all__ = ["Calibration", "PerModel", "Replay", "as_batch"]


def as_batch(sample: Call) -> Any:
    """A call as a batch of data: what `data` may yield for it."""
    if isinstance(sample, JointCall):
        return tuple(p.kwargs or (p.args[0] if len(p.args) == 1 else p.args) for p in sample.parts)
    return sample.kwargs or sample.args


Watch = Callable[[str, Iterator[tuple[int, Call]], int | None], Iterator[tuple[int, Call]]]
"""Gives the batches of a pass on: name of the stage, the batches, how many there are if that is known."""


@dataclass(frozen=True)
class Calibration:
    """Batches of all sources. Calling it gives a fresh iterable; each stage may iterate as often as it needs.

    Attributes:
        sources: iterables of batches, one, or one per model.
        sample: the form of a batch.
        description: for the report.
        show: a bar for each pass.
        notes: for the report.
        without: drops inputs from the calls of a pass (see `holdout.py`); None: nothing is dropped.
        given: the user gave data; else the sample serves.
        watch: shows each batch of a pass as it comes; None: a bar of its own for each pass, if `show`.
        counts: how many inputs and batches each pass gave that went to its end.
        say: shows a sentence; None: it goes to the log `fxzip`.
        store: has what was found out of the batches before.
        several: whether batches of a single input are put together with others (see `joining.py`).
    """

    sources: tuple[Iterable[Any], ...]
    sample: Call
    description: str
    show: bool
    notes: list[str] = field(default_factory=list)
    without: Callable[[Iterator[tuple[int, Call]]], Iterator[tuple[int, Call]]] | None = None
    given: bool = True
    watch: Watch | None = None
    counts: list[tuple[int, int]] = field(default_factory=list)
    say: Callable[[str], None] | None = None
    store: Store = NOTHING
    several: bool = False

    @classmethod
    def of(
        cls, data: Any, sample: Call, models: int, progress: bool | None, max_batches: int = MAX_BATCHES
    ) -> Calibration:
        """Sort out what `data` is: None, batches, or one iterable of batches per model.

        Raises:
            InputError: `max_batches` is no positive whole number.
            DataError: `data` is none of these.
        """
        show = sys.stderr.isatty() if progress is None else progress
        notes: list[str] = []

        def note(text: str) -> None:
            if text not in notes:
                notes.append(text)

        if data is None:
            sources_of([], sample, models, max_batches, note)
            note("no `data` was given: `sample_input` served as calibration data, which is far too little to match by")
            return cls(([as_batch(sample)],), sample, "calibrated on `sample_input`", show, notes, given=False)
        if isinstance(sample, JointCall):
            if isinstance(data, PerModel):
                raise DataError(
                    "Models with inputs of their own must be calibrated on inputs that belong together; found a "
                    "`PerModel` of sources. Let `data` yield tuples with an input for each model."
                )
            return cls((Source(data, sample, max_batches, note),), sample, "calibrated on `data`", show, notes)
        sources = sources_of(data, sample, models, max_batches, note)
        several = isinstance(data, PerModel) or len(sources) > 1
        how = f"calibrated on {len(sources)} sources of data, one per model" if several else "calibrated on `data`"
        return cls(sources, sample, how, show, notes)

    @classmethod
    def none(cls, sample: Call) -> Calibration:
        """No data at all, for methods and refits that need none.

        >>> list(Calibration.none(Call((1,), {}))("observing"))
        []
        """
        note = (
            "no `data` was given: features are matched by weights alone, variances of merged features estimated from "
            "those stored in BatchNorms, nothing is measured; a few unlabelled batches (`data=...`) allow a refit"
        )
        return cls((), sample, "without data", False, [note], given=False)

    def __call__(self, stage: str) -> Replay:
        """All batches, named `stage` on the bar, where the models are."""
        return self._replay(lambda: ((number, moved(call, self.sample)) for number, call in self._counted(stage)))

    def unmoved(self, stage: str) -> Replay:
        """The same on the device that they come on, for what looks at their bytes."""
        return self._replay(lambda: self._counted(stage))

    def _replay(self, start: Callable[[], Iterator[tuple[int, Call]]]) -> Replay:
        return Replay(start, max(len(self.sources), 1), self.say, self.store)

    @property
    def inputs(self) -> int | None:
        """How many inputs the last pass gave, of all processes; None before one went to its end."""
        return processes.before([self.counts[-1][0]])[1][0] if self.counts else None

    def _counted(self, stage: str) -> Iterator[tuple[int, Call]]:
        inputs = passed = 0
        calls = self._shown(stage)
        if self.without is not None:
            calls = self.without(calls)
        for number, call in joined(calls, len(self.sources)) if self.several else calls:
            inputs += batch_size(call) or 1
            passed += 1
            yield number, call
        self.counts.append((inputs, passed))

    def _shown(self, stage: str) -> Iterator[tuple[int, Call]]:
        if self.watch is not None:
            return self.watch(stage, self._calls(), self.counts[-1][1] if self.counts else None)
        return iter(tqdm(self._calls(), desc=stage, unit="batch", disable=not self.show, leave=False))

    def _calls(self) -> Iterator[tuple[int, Call]]:
        for number, source in enumerate(self.sources):
            for call in batches(source, self.sample):
                yield number, call


@dataclass(frozen=True)
class Replay:
    """Batches of all sources, as often as they are asked for."""

    start: Callable[[], Iterator[tuple[int, Call]]]
    sources: int = 1
    say: Callable[[str], None] | None = None
    store: Store = NOTHING

    def __iter__(self) -> Iterator[Call]:
        return (call for _, call in self.start())

    def by_source(self) -> Iterator[tuple[int, Call]]:
        """Each batch with the number of its source."""
        return self.start()


def tell(data: Iterable[Call], text: str) -> None:
    """Say something to whoever watches a pass over data; what nobody watches goes to the log `fxzip`."""
    say = data.say if isinstance(data, Replay) else None
    if say is None and processes.rank() == 0:
        logger.info("%s", text)
    elif say is not None:
        say(text)


def store_of(data: Iterable[Call]) -> Store:
    """What was found out of the batches before."""
    return data.store if isinstance(data, Replay) else NOTHING


def with_sources(data: Iterable[Call]) -> tuple[Iterator[tuple[int, Call]], int]:
    """Batches with the number of their source, and how many sources there are; what knows of none is one.

    >>> calls, sources = with_sources([Call((1,), {}), Call((2,), {})])
    >>> [number for number, _ in calls], sources
    ([0, 0], 1)
    """
    if isinstance(data, Replay):
        return data.by_source(), data.sources
    return ((0, call) for call in data), 1

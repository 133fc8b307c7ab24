"""Calibration data as the stages see it: calls of the sample's form, as often as they ask for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm import tqdm

from .batches import batches, replayable
from .errors import DataError
from .inputs import Call, JointCall


class PerModel(tuple[Any, ...]):
    """One thing for each model. As `data`: iterables of batches, where a plain list could be taken for batches. As
    `sample_input`: inputs, where models take inputs of their own.

    >>> len(PerModel(["batches of a"], ["batches of b"]))
    2
    """

    def __new__(cls, *sources: Any) -> PerModel:
        return super().__new__(cls, sources)


def _is_batch(item: Any) -> bool:
    """A tensor, a dict, or a tuple or list that starts with one (or with a tuple of tensors)."""
    if isinstance(item, (Tensor, Mapping)):
        return True
    if not isinstance(item, (tuple, list)) or not item:
        return False
    first = item[0]
    return isinstance(first, Tensor) or (
        isinstance(first, (tuple, list)) and bool(first) and isinstance(first[0], Tensor)
    )


def _as_batch(sample: Call) -> Any:
    """A sample input as a batch of data."""
    if isinstance(sample, JointCall):
        return tuple(p.kwargs or (p.args[0] if len(p.args) == 1 else p.args) for p in sample.parts)
    return sample.kwargs or sample.args


@dataclass(frozen=True)
class Calibration:
    """Batches of all sources. Calling it gives a fresh iterable; each stage may iterate as often as it needs."""

    sources: tuple[Iterable[Any], ...]
    sample: Call
    description: str
    show: bool
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, data: Any, sample: Call, models: int, progress: bool | None) -> Calibration:
        """Sort out what `data` is: None, batches, or one iterable of batches per model."""
        show = sys.stderr.isatty() if progress is None else progress
        if data is None:
            given = [_as_batch(sample)]
            note = "no `data` was given: `sample_input` served as calibration data, which is far too little to match by"
            return cls((given,), sample, "calibrated on `sample_input`", show, [note])
        listed = isinstance(data, (tuple, list)) and len(data) == models
        if isinstance(data, PerModel) and isinstance(sample, JointCall):
            raise DataError(
                "Models with inputs of their own must be calibrated on inputs that belong together; found a `PerModel` "
                "of sources. Let `data` yield tuples with an input for each model."
            )
        if isinstance(sample, JointCall):
            return cls((replayable(data),), sample, "calibrated on `data`", show)
        if isinstance(data, PerModel) or (listed and not any(_is_batch(item) for item in data)):
            sources = tuple(replayable(source) for source in data)
            return cls(sources, sample, f"calibrated on {len(sources)} sources of data, one per model", show)
        return cls((replayable(data),), sample, "calibrated on `data`", show)

    @classmethod
    def none(cls, sample: Call) -> Calibration:
        """No data at all, for methods and refits that need none.

        >>> list(Calibration.none(Call((Tensor(),), {}))("observing"))
        []
        """
        note = (
            "no `data` was given: features are matched by weights alone, variances of merged features estimated from "
            "those stored in BatchNorms, nothing is measured; a few unlabelled batches (`data=...`) allow a refit"
        )
        return cls((), sample, "without data", False, [note])

    def __call__(self, stage: str) -> Replay:
        """All batches, named `stage` on the bar."""
        return Replay(lambda: self._calls(stage), max(len(self.sources), 1))

    def _calls(self, stage: str) -> Iterator[tuple[int, Call]]:
        for number, source in enumerate(self.sources):
            for call in tqdm(
                batches(source, self.sample), desc=stage, unit="batch", disable=not self.show, leave=False
            ):
                yield number, call


@dataclass(frozen=True)
class Replay:
    """Batches of all sources, as often as they are asked for."""

    start: Callable[[], Iterator[tuple[int, Call]]]
    sources: int = 1

    def __iter__(self) -> Iterator[Call]:
        return (call for _, call in self.start())

    def labelled(self) -> Iterator[tuple[int, Call]]:
        """Each batch with the number of its source."""
        return self.start()

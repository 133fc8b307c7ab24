"""What `data` may be: sources of batches, each of which can be read several times and has an end.

A source is an iterable of batches: a `DataLoader`, a list, an iterator, a stream without an end, a dataset of single
inputs. Of each at most `limit` batches are read in a pass. What can be read only once (a generator) is kept as it is
read, at most `KEPT` bytes of it. One source may serve all models, or each model have its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset, default_collate

from ..errors import DataError, OptionError
from ..tracing.calls import Call
from .batches import as_tensors, fits, single

MAX_BATCHES = 512
"""How many batches of a source are read in a pass unless the caller says otherwise."""

KEPT = 4 << 30
"""Most bytes of batches that are kept of an iterator, which can be read only once."""

_TOGETHER = 64  # single inputs of a dataset that make a batch


class PerModel(tuple[Any, ...]):
    """One thing for each model. As `data`: iterables of batches, where a plain list could be taken for batches. As
    `sample_input`: inputs, where models take inputs of their own.

    >>> len(PerModel(["batches of a"], ["batches of b"]))
    2
    """

    def __new__(cls, *sources: Any) -> PerModel:
        return super().__new__(cls, sources)


@dataclass(eq=False)
class Source:
    """The batches of one iterable, at most `limit` in a pass; can be read as often as needed.

    >>> import torch
    >>> source = Source((torch.ones(1) for _ in range(2)), Call((torch.ones(1),), {}), 512, print)
    >>> len(list(source)), len(list(source))
    (2, 2)

    Attributes:
        data: the iterable.
        sample: what the models were traced with, to tell a dataset of single inputs from one of batches.
        limit: most batches of a pass.
        note: takes a sentence for the report.
    """

    data: Any
    sample: Call
    limit: int
    note: Callable[[str], None]
    kept: list[Any] = field(default_factory=list)
    bytes: int = 0
    longest: int = 0
    ended: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.data, PerModel):
            raise DataError(
                "Each source of a `PerModel` must be an iterable of batches; found another `PerModel`. Pass one source "
                "for each model, `fxzip.PerModel(batches of a, batches of b, ...)`."
            )
        if isinstance(self.data, (Tensor, Mapping, np.ndarray)):
            self.data = [self.data]
        iterable = hasattr(self.data, "__iter__") or hasattr(self.data, "__getitem__")
        if not iterable or isinstance(self.data, (str, bytes)):
            raise DataError(
                f"`data` must be an iterable of batches; found `{type(self.data).__name__}`. "
                "Pass a DataLoader, or a list of tensors."
            )

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for batch in itertools.islice(self._items(), self.limit):
            count += 1
            yield batch
        if not count and self.longest:
            raise DataError(
                f"`data` must give its batches at every pass; it gave {self.longest} at the first and none at a later "
                f"one: `{type(self.data).__name__}` can be read only once. Pass a list, a DataLoader or a generator."
            )
        if not count and isinstance(self.data, Iterator):
            raise DataError(
                "`data` must yield at least one batch; it gave none. An iterator can be read only once: one that an "
                "earlier call has used up is empty. Pass a list or a DataLoader."
            )
        self.longest = max(self.longest, count)
        length = _length(self.data)
        if count == self.limit and (length is None or length > count):
            self.note(
                f"`max_batches` was reached: {self.limit} batches of `data` were read, what it holds beyond was not"
            )

    def _items(self) -> Iterator[Any]:
        if isinstance(self.data, Iterator):
            return self._kept(self.data)
        if isinstance(self.data, Dataset):
            return self._of_dataset(self.data)
        if hasattr(self.data, "__iter__"):
            return iter(self.data)
        length = _length(self.data)
        return _by_number(self.data, itertools.count() if length is None else range(length))

    def _kept(self, rest: Iterator[Any]) -> Iterator[Any]:
        """What has been read before, and then the rest, which is kept."""
        for place in itertools.count():
            if place == len(self.kept):
                if self.ended:
                    return
                if self.bytes > KEPT:
                    self.note(
                        f"an iterator can be read only once, so its batches are kept: {place} fill {KEPT >> 30} GiB, "
                        "and no more were read; a DataLoader is read anew in every pass"
                    )
                    return
                try:
                    batch = next(rest)
                except StopIteration:
                    self.ended = True
                    return
                self.kept.append(batch)
                self.bytes += sum(t.nbytes for t in pytree.tree_leaves(as_tensors(batch)) if isinstance(t, Tensor))
            yield self.kept[place]

    def _of_dataset(self, data: Dataset[Any]) -> Iterator[Any]:
        """The items of a dataset if they are batches; else as many of them as make a batch, together."""
        length = None if isinstance(data, IterableDataset) else _length(data)
        if hasattr(data, "__iter__"):
            items: Iterator[Any] = iter(data)
        else:
            items = _by_number(data, itertools.count() if length is None else range(length))
        first = next(items, None)
        if first is None:
            return
        if not single(first, self.sample):
            yield from itertools.chain([first], items)
            return
        self.note(f"`data` is a dataset of single inputs; they were read in batches of {_TOGETHER}")
        items = itertools.chain([first], items)
        most = _TOGETHER * self.limit
        if length is not None and length > most:  # spread evenly, since datasets are often sorted
            items = _by_number(data, (place * length // most for place in range(most)))
        while part := list(itertools.islice(items, _TOGETHER)):
            try:
                yield default_collate(part)
            except (RuntimeError, TypeError, KeyError, ValueError) as error:
                raise DataError(
                    f"The inputs of a dataset must make a batch; {_TOGETHER} of `{type(data).__name__}` do not: "
                    f"{str(error).splitlines()[0]} Pass a DataLoader with a `collate_fn` of your own."
                ) from error


def _length(data: Any) -> int | None:
    """How many items something holds, if it says so."""
    try:
        return len(data)
    except Exception:  # streams raise what they like
        return None


def _by_number(data: Any, numbers: Iterable[int]) -> Iterator[Any]:
    """Items by number, up to the first that is not there."""
    for number in numbers:
        try:
            item = data[number]
        except IndexError:
            return
        yield item


def sources_of(data: Any, sample: Call, models: int, limit: int, note: Callable[[str], None]) -> tuple[Source, ...]:
    """One source for all models, or one for each.

    Raises:
        InputError: `limit` is no positive whole number.
        DataError: `data` is nothing that could be read, holds another number of sources than models, or could be both
            batches and sources.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise OptionError(f"`max_batches` must be a whole number of at least 1; found {limit!r}.")
    given = _per_model(data, sample, models)
    return tuple(Source(own, sample, limit, note) for own in ([data] if given is None else given))


def _per_model(data: Any, sample: Call, models: int) -> Sequence[Any] | None:
    """The sources of each model, if that is what `data` is."""
    if isinstance(data, PerModel):
        if len(data) != models:
            raise DataError(
                f"`data` as a `PerModel` must hold one source of batches for each of the {models} models; found "
                f"{len(data)}. Pass one for each, or one iterable of batches for all."
            )
        return data
    if not isinstance(data, (tuple, list)) or not data:
        return None
    batch = [_is_batch(item, sample) for item in data]
    if all(batch):
        if len(data) == models and any(_several(item, sample) for item in data):
            raise DataError(
                f"`data` must be batches, or a source of batches for each model; found a list of {models} items that "
                "each hold several inputs like `sample_input`: two batches with targets, or the batches of two models. "
                "Pass `fxzip.PerModel(batches of a, batches of b, ...)`, or let `data` yield inputs only."
            )
        return None
    if any(batch) and not any(_is_source(item) for item in data):
        return None
    if len(data) != models and any(_is_source(item) for item in data):
        raise DataError(
            f"`data` must be batches, or one source of batches for each of the {models} models; found {len(data)} "
            f"sources. Pass one for each, or one iterable of batches for all."
        )
    return data if len(data) == models else None


def _is_source(item: Any) -> bool:
    """Whether an item can only be an iterable of batches."""
    if isinstance(item, (Tensor, Mapping, np.ndarray, tuple, list, str, bytes)):
        return False
    return isinstance(item, (Iterable, Dataset)) or hasattr(item, "__getitem__")


def _is_batch(item: Any, sample: Call) -> bool:
    """A tensor, a dict, or a tuple or list that starts with one (or with a tuple of tensors), or fits the sample."""
    if isinstance(item, (Tensor, Mapping, np.ndarray)):
        return True
    if not isinstance(item, (tuple, list)) or not item:
        return False
    first = item[0]
    if all(isinstance(part, Mapping) for part in item):  # nobody gives dicts as labels
        return False
    if isinstance(first, (Tensor, np.ndarray)) or fits(item, sample):
        return True
    return isinstance(first, (tuple, list)) and bool(first) and isinstance(first[0], Tensor)


def _several(item: Any, sample: Call) -> bool:
    """Whether a tuple or list holds several values, each of which could be a batch by itself."""
    return isinstance(item, (tuple, list)) and len(item) > 1 and all(fits(part, sample) for part in item)

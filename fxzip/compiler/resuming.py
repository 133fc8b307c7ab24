"""`resume=folder`: a compile that was killed goes on where it was.

The folder holds `request.json`, which says what was asked for, and a file of each value that a stage has asked the
`Store` for, in the order in which they were asked for: moments of a pass, solutions of least squares, measured times,
what came of a cut that was tried. They are plain data (safetensors, and JSON in its header), written beside their place
and renamed, so a file is whole or not there. What does not take long is made anew. Since each value follows from the
request and from those before it, and a stage cannot tell whether it was made or read, the result is the same to the
bit.

Under `torch.distributed` the first process keeps the folder, and hands its values to the others.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..calibration import processes
from ..calibration.store import NOTHING, Store
from ..errors import LoadError, OptionError
from ..matching.moments import Moments
from ..refit.least_squares.solving import Solved
from ..rewriting.factorised import LinearSize
from ..rewriting.json_values import decoded, encoded
from ..tracing.tensor_bytes import bytes_of
from ..tracing.whole_files import UNFINISHED, written_whole
from ..widths.prices import Price
from ..widths.rank_losses import CallOutputs

T = TypeVar("T")

KINDS: tuple[type, ...] = (CallOutputs, LinearSize, Moments, Price, Solved)
"""Dataclasses that may be part of a value."""

FORMAT = 1

_REQUEST, _VALUE = "request.json", ".safetensors"
_SHOWN = 60  # letters of a fact in an error


class FolderStore(Store):
    """Keeps values in a folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for _ in range(2):
    ...         store = FolderStore(folder)
    ...         store.value("sum", lambda: print("made") or (1.5, torch.ones(2)))
    made
    (1.5, tensor([1., 1.]))
    (1.5, tensor([1., 1.]))
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """
        Raises:
            OptionError: the folder holds something else, or cannot be made.
        """
        self.folder = Path(os.path.abspath(folder))
        self._parts: list[list[Any]] = [["", 0]]  # of each the name, and how many values were asked for
        processes.of_first(self._open)

    def bind(self, facts: Mapping[str, str]) -> None:
        """Say what the values follow from.

        Args:
            facts: by name, in words or as a checksum.

        Raises:
            OptionError: the folder is that of another request.
        """
        every = processes.everyone(dict(facts))
        many = len(every) > 1
        named = {f"{name} (rank {k})" if many else name: v for k, own in enumerate(every) for name, v in own.items()}
        processes.of_first(lambda: self._bind(named))

    def value(self, name: str, make: Callable[[], T], *, once: bool = False) -> T:
        """See `Store.value`; read if it is there."""
        place = self.folder / (self._numbered(name, once=once) + _VALUE)
        found = processes.of_first(lambda: _read(place, name))
        if found is not None:
            value: T = found[0]
            return value

        value = make()
        if processes.rank() == 0:
            with written_whole(place) as part:
                _write(part, name, value)
        return value

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """See `Store.part`."""
        self._parts.append([_slug(name), 0])
        try:
            yield
        finally:
            self._parts.pop()

    def _numbered(self, name: str, *, once: bool) -> str:
        """The name of a file: of the parts that it lies in, its number in the last, and what it holds."""
        if once:
            return _slug(name)
        self._parts[-1][1] += 1
        parts = [own for own, _ in self._parts if own]
        return "-".join([*parts, f"{self._parts[-1][1]:04d}", _slug(name)])

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            there = list(self.folder.iterdir())
        except OSError as error:
            raise OptionError(
                f"`resume` must be a folder that can be written to; `{self.folder}` cannot: {error}. Pass another."
            ) from error
        if there and not any(own.name == _REQUEST or own.name.startswith(UNFINISHED) for own in there):
            raise OptionError(
                f"`resume` must be a folder of its own, new or of an earlier compile; `{self.folder}` holds something "
                f"else, `{sorted(own.name for own in there)[0]}`. Pass another folder."
            )
        for own in there:
            if own.name.startswith(UNFINISHED):  # somebody was killed while writing it
                own.unlink(missing_ok=True)
        self._bind({})

    def _bind(self, facts: Mapping[str, str]) -> None:
        place, known = self.folder / _REQUEST, dict[str, str]()
        if place.exists():
            known = _request(place)
            differ = [name for name in facts if known.get(name, facts[name]) != facts[name]]
            if differ:
                said = "; ".join(f"{name} was {_short(known[name])} and is {_short(facts[name])}" for name in differ)
                raise OptionError(
                    f"`resume` must be the folder of the same request; `{self.folder}` was begun for another: {said}. "
                    "Pass what was passed then, or another folder."
                )
        text = json.dumps({"format": FORMAT, "request": {**known, **facts}}, indent=1)
        with written_whole(place) as part:
            part.write_text(text)


def opened(folder: str | os.PathLike[str] | None) -> Store:
    """The store of a folder; None: one that keeps nothing."""
    return NOTHING if folder is None else FolderStore(folder)


def _request(place: Path) -> dict[str, str]:
    try:
        found = json.loads(place.read_text())
        known, written = dict(found["request"]), found["format"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise OptionError(
            f"`resume` must be a folder of an earlier compile; `{place}` cannot be read: {error}. Pass another folder."
        ) from error
    if written != FORMAT:
        raise OptionError(
            f"`resume` must be a folder that this version of fxzip has written; `{place.parent}` is of format "
            f"{written}, not {FORMAT}. Pass another folder."
        )
    return {str(name): str(text) for name, text in known.items()}


def _write(place: Path, name: str, value: Any) -> None:
    tensors: dict[str, Tensor] = {}

    def own(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors[str(len(tensors))] = part.detach().cpu().contiguous().clone()
            return {"$tensor": [len(tensors) - 1, str(part.device)]}
        if is_dataclass(part) and type(part) in KINDS:
            values = {field.name: encoded(getattr(part, field.name), own) for field in fields(part)}
            return {f"${type(part).__name__}": values}
        return None

    text = json.dumps(encoded(value, own))
    save_file(tensors, place, metadata={"name": name, "value": text, "sum": str(_sum(text, tensors))})


def _read(place: Path, name: str) -> tuple[Any] | None:
    """The value; None where it is not there, or is not what was written."""
    if not place.exists():
        return None
    try:
        with safe_open(place, "pt") as file:
            known = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        if known["name"] != name or known["sum"] != str(_sum(known["value"], tensors)):
            return None

        forms = dict[str, Callable[[Any], Any]]()

        def dataclass(kind: type, held: Any) -> Any:
            return kind(**{key: decoded(own, forms) for key, own in held.items()})

        forms |= {f"${kind.__name__}": partial(dataclass, kind) for kind in KINDS}
        forms["$tensor"] = lambda held: tensors[str(held[0])].to(torch.device(held[1]))
        return (decoded(json.loads(known["value"]), forms),)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, LoadError):
        return None  # a damaged disk: it is made anew


def _sum(text: str, tensors: Mapping[str, Tensor]) -> int:
    result = zlib.crc32(text.encode())
    for key in sorted(tensors):
        result = zlib.crc32(bytes_of(tensors[key]), result)
    return result


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name)[:80]


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."

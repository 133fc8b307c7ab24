"""Networks in folders: `save` and `load`, without pickle.

A folder holds `model.safetensors` (all tensors), `graph.json` (nodes and modules, see `json_graph.py`), `report.json`,
`fxzip.json` (format, versions, and a checksum of each of the three), and `README.md`, a model card. It is plain data:
names in it are looked up among those that `tracing/allowed.py` lists and those that the caller trusts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, LoadError, SaveError
from ..tracing.option_values import checked
from ..tracing.whole_files import beside
from .json_graph import network_as_json, network_of_json, own_names, unlisted
from .json_values import decoded, encoded, fields, plain
from .model_card import card
from .module import EmittedModule, ZippedModule
from .report import Report
from .stored_facts import check_facts
from .stored_names import Names

FORMAT = 1
"""The number of the format of folders that is written."""

_MANIFEST, _TENSORS, _CARD = "fxzip.json", "model.safetensors", "README.md"
_LIMITS = {"graph.json": 2**28, "report.json": 2**26}
_SUMMED = (_TENSORS, *_LIMITS)


@checked
def save(zipped: EmittedModule, folder: str | os.PathLike[str]) -> None:
    """Write a zipped network to a folder, which `load` reads without the code of the models.

    The folder is written beside its place and then renamed. One that is there must be empty or hold a saved network,
    which is replaced.

    >>> import fxzip, tempfile
    >>> from torch import nn
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)).eval() for n in (2, 3))
    >>> x = torch.randn(16, 4)
    >>> zipped = fxzip.compile_zip(a, b, x, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fxzip.save(zipped, f"{folder}/zipped")
    ...     torch.equal(fxzip.load(f"{folder}/zipped")(x)[1], zipped(x)[1])
    True

    Raises:
        SaveError: the network holds what cannot be stored (named, with its place), or the folder holds something else.
            Nothing has been written then.
    """
    if not isinstance(zipped, EmittedModule):
        raise InputError(f"`save` takes a zipped network; found a `{type(zipped).__name__}`.")
    place = Path(os.path.abspath(folder))
    _check_place(place)
    stored, data = network_as_json(zipped)
    report = zipped.meta.get("fxzip_report")
    values = _report_values(report)
    tasks = zipped.tasks if isinstance(zipped, ZippedModule) else ()
    own = own_names(zipped)
    versions = {"fxzip": _version(), "torch": str(torch.__version__)}
    texts = {
        "graph.json": _text(stored), "report.json": _text(values),
        _CARD: card(report, tasks, versions, unlisted(own)).encode(),
    }  # fmt: skip
    _check_readable(texts, data, own)
    place.parent.mkdir(parents=True, exist_ok=True)
    part = beside(place)
    part.mkdir()
    try:
        save_file(data, part / _TENSORS, metadata={"format": "pt"})
        for name, text in texts.items():
            (part / name).write_bytes(text)
        sums = {name: _checksum(part / name) for name in _SUMMED}
        manifest = {"format": FORMAT, **versions, "tasks": list(tasks), "sha256": sums}
        (part / _MANIFEST).write_bytes(_text(manifest))
        _put(part, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@checked
def load(folder: str | os.PathLike[str], *, trust: Iterable[Callable[..., Any]] = ()) -> EmittedModule:
    """The network that `save` wrote: the same outputs, parameters, mode and report, on the CPU.

    `trust`: functions and classes of one's own that it may name. No others are called than those on tensors that
    fxzip lists, and modules of PyTorch, torchvision, timm and transformers.

    Raises:
        LoadError: the folder is not as `save` wrote it, is of a later format, or names something else.
    """
    place, names = Path(folder), Names(trust)
    if not place.is_dir():
        raise LoadError(f"There is no folder `{place}`.")
    with _reading(_MANIFEST):
        sums, tasks = _manifest(plain(_bytes(place, _MANIFEST, 2**20), 2**20))
    texts = {}
    for name in _SUMMED:
        with _reading(name):
            if name in _LIMITS:
                texts[name] = _bytes(place, name, _LIMITS[name])
                found = hashlib.sha256(texts[name]).hexdigest()
            else:
                found = _checksum(_file(place, name))
            if found != sums[name]:
                raise LoadError("it is not the file that was saved: its checksum is another")
    with _reading(_TENSORS):
        data = _tensors(_file(place, _TENSORS))
    with _reading("graph.json"):
        network = network_of_json(plain(texts["graph.json"], _LIMITS["graph.json"]), data, names)
    with _reading("report.json"):
        report = _report(plain(texts["report.json"], _LIMITS["report.json"]))
    with _reading(_MANIFEST):
        if tasks != list(network.tasks if isinstance(network, ZippedModule) else ()):
            raise LoadError("the names of the tasks are not those of the network")
    if report is not None:
        network.meta["fxzip_report"] = report
    return network


def _manifest(value: Any) -> tuple[dict[str, str], list[str]]:
    written = value.get("format") if isinstance(value, dict) else None
    if type(written) is int and written > FORMAT:
        raise LoadError(
            f"this version of fxzip reads saved folders up to format {FORMAT}; the folder is of format {written}. Use "
            "the version that wrote it, or a later one"
        )
    written, _, _, tasks, sums = fields(value, format=int, fxzip=str, torch=str, tasks=list, sha256=dict)
    fields(sums, **dict.fromkeys(_SUMMED, str))
    if written < 1:
        raise LoadError(f"there is no format {written}")
    return sums, tasks


def _version() -> str:
    return str(getattr(sys.modules[__name__.partition(".")[0]], "__version__", "unknown"))


def _text(value: Any) -> bytes:
    return (json.dumps(value, allow_nan=False, indent=1) + "\n").encode()


def _report_values(report: Any) -> Any:
    if report is None:
        return None
    try:
        return encoded(dict(report))
    except SaveError as error:
        raise SaveError(f"The report cannot be stored: {error}.") from error


def _report(stored: Any) -> Report | None:
    if stored is None:
        return None
    values = decoded(stored)
    if not isinstance(values, dict):
        raise LoadError("a report is an object")
    report = Report(values)
    check_facts(report)
    _ = str(report), report.tasks, report.notes, report.cost
    if not all(isinstance(lost, str) for traced in report["tracing"] for lost in traced.get("lost", ())):
        raise LoadError("`tracing` is no list of how the models were traced")
    return report


def _check_readable(texts: dict[str, bytes], data: dict[str, Tensor], own: list[Any]) -> None:
    """Whether `load` takes what is about to be written."""
    for name, limit in _LIMITS.items():
        if len(texts[name]) > limit:
            raise SaveError(f"`{name}` would be longer than {limit:,} bytes.")
    try:
        network_of_json(json.loads(texts["graph.json"]), data, Names(own))
        _report(json.loads(texts["report.json"]))
    except Exception as error:
        raise SaveError(f"The network cannot be stored, for it could not be read again: {error}.") from error


def _check_place(place: Path) -> None:
    """Whether a folder may be written there."""
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise SaveError(f"`save` writes a folder; `{place}` is something else.")
    found = {path.name for path in place.iterdir()} if place.exists() else set()
    others = sorted(found - {_MANIFEST, _CARD, *_SUMMED})
    if others or (found and _MANIFEST not in found):
        held = ", ".join(others[:4]) or "part of one"
        raise SaveError(f"`save` replaces an empty folder or a saved network; `{place}` holds {held}.")


def _put(part: Path, place: Path) -> None:
    """Rename a folder to its place; what was there comes back if that fails."""
    if not place.exists():
        part.rename(place)
        return
    before = part.with_name(part.name + ".before")
    place.rename(before)
    try:
        part.rename(place)
    except BaseException:
        before.rename(place)
        raise
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is an error that names the file."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, LoadError) else f"it is no file of a saved network: {str(error)[:300]}"
        raise LoadError(f"`{name}` cannot be read: {text.rstrip('.')}.") from error


def _file(place: Path, name: str) -> Path:
    """A file of the folder, and no link out of it."""
    path = place / name
    if not path.resolve().is_relative_to(place.resolve()):
        raise LoadError("it is a link to something outside of the folder")
    if not path.exists():
        raise LoadError("it is missing")
    if not stat.S_ISREG(path.stat().st_mode):
        raise LoadError("it is no file")
    return path


def _bytes(place: Path, name: str, limit: int) -> bytes:
    with _file(place, name).open("rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise LoadError(f"it is longer than {limit:,} bytes")
    return text


def _checksum(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - it is no dict

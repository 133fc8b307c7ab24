"""Batches of inputs from what a recipe names: images, arrays, `datasets`, or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fxzip import PerModel

from ...errors import RecipeError
from .images import ImageFiles, Images
from .packages import called, function_of, needed
from .preprocessing import Preprocessing, chosen
from .recipe import Data, path_of


@dataclass(frozen=True, eq=False)
class Source:
    """Batches that can be read as often as needed.

    Attributes:
        batches: tensors, or dicts of them; (inputs, labels) where `labelled`.
        labelled: whether they have labels.
        classes: names of the classes, where they are known.
        preprocessing: of images; None for other inputs.
    """

    batches: Iterable[Any]
    labelled: bool
    classes: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None


@dataclass(frozen=True, eq=False)
class Rows(Dataset[Any]):
    """Some items of a dataset, in an order of their own."""

    items: Any
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return self.items[self.order[index]]


@dataclass(frozen=True, eq=False)
class Moved:
    """Batches moved to a device as they are read."""

    batches: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        return (_moved(batch, self.device) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of batches, without their labels."""

    batches: Iterable[Any]
    labelled: bool

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if not self.labelled:
                yield batch
            else:
                inputs = batch[:-1]
                yield inputs[0] if len(inputs) == 1 else inputs


@dataclass(frozen=True, eq=False)
class Called:
    """What a function returns, called anew for each pass, so that a generator can be read several times."""

    make: Callable[[], Iterable[Any]]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.make())


def source(data: Data, own: Preprocessing | None, where: str, *, labels: bool) -> Source:
    """The batches that `data` names; `where` is its place in the recipe.

    Args:
        own: preprocessing of the model.
        labels: whether labels are read where there are any; without them inputs come in an order drawn at random,
            always the same.

    Raises:
        RecipeError: it names nothing that can be read.
    """
    if data.batch_size < 1 or data.workers < 0 or (data.limit is not None and data.limit < 1):
        raise RecipeError(f"`{where}` needs a `batch_size` and a `limit` of at least 1, and no negative `workers`.")
    path = path_of(data.path)
    if path.is_dir():
        is_table = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
        return _of_table(data, path, own, where, labels) if is_table else _of_images(data, path, own, where, labels)
    if path.suffix in (".npy", ".safetensors"):
        return _of_arrays(data, path, where, labels)
    if path.exists():
        raise RecipeError(f"`{where}.path` must be a folder, or a file .npy or .safetensors; found `{path}`.")
    if ":" in data.path.relative:
        return _of_function(data, where, labels)
    raise RecipeError(f"`{where}.path`: there is no `{path}`.")


def _batches(items: Any, data: Data, *, mixed: bool) -> DataLoader[Any]:
    """All items, or as many as `limit`, in batches. `mixed`: in an order drawn at random, always the same."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()[: data.limit]
    chosen = order if mixed else sorted(order)
    return DataLoader(Rows(items, chosen), batch_size=data.batch_size, num_workers=data.workers)


def _of_images(data: Data, path: Path, own: Preprocessing | None, where: str, labels: bool) -> Source:
    found = Images.of(path, where, None if data.classes is None else path_of(data.classes))
    preprocessing = chosen(data, own, where)
    known = found.labels if labels else None
    items = ImageFiles(found.paths, known, preprocessing.transform())
    return Source(_batches(items, data, mixed=known is None), known is not None, found.classes, preprocessing)


class _Arrays(Dataset[Any]):
    """Rows of arrays: one input, or several by name, each with its label if there are labels."""

    def __init__(self, inputs: Mapping[str, Any], labels: Any) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, index: int) -> Any:
        row = {name: _tensor(values[index]) for name, values in self.inputs.items()}
        inputs = row if len(row) > 1 else next(iter(row.values()))
        return inputs if self.labels is None else (inputs, int(self.labels[index]))


def _of_arrays(data: Data, path: Path, where: str, labels: bool) -> Source:
    """A file of one array, or of several by name."""
    if path.suffix == ".npy":
        inputs: dict[str, Any] = {"inputs": _npy(path, where)}
        targets = None if data.labels is None or not labels else _npy(path_of(data.labels), f"{where}.labels")
    else:
        try:
            held = load_file(path)
        except (SafetensorError, OSError) as error:
            raise RecipeError(f"`{where}.path`: `{path}` cannot be read: {error}.") from error
        name = None if data.labels is None else data.labels.relative
        inputs = _named(held, data.inputs or [key for key in held if key != name], where)
        targets = _named(held, [name], where)[name] if name is not None and labels else None
    sizes = {name: len(values) for name, values in [*inputs.items(), ("labels", targets)] if values is not None}
    if len(set(sizes.values())) != 1 or not all(sizes.values()):
        raise RecipeError(f"`{where}`: inputs and labels must be equally many and at least one; found {sizes}.")
    for name, values in inputs.items():
        if str(values.dtype).rpartition(".")[2] == "uint8":
            raise RecipeError(
                f"`{where}`: `{name}` in `{path.name}` holds bytes; it must hold what the networks take, floats that "
                "are normalised already, or whole numbers of 64 bits."
            )
    return Source(_batches(_Arrays(inputs, targets), data, mixed=targets is None), targets is not None)


def _npy(path: Path, where: str) -> Any:
    """An array of a file, left on disk until its rows are read."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RecipeError(f"`{where}`: `{path}` is no file of one array: {error}") from error
    if found.ndim < 1:
        raise RecipeError(f"`{where}`: `{path}` must hold one row per input; it holds one number.")
    return found


def _named(held: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    missing = [name for name in names if name not in held]
    if missing or not names:
        known = ", ".join(f"`{key}`" for key in held) or "nothing"
        raise RecipeError(f"`{where}`: there is no {' and no '.join(map(repr, missing)) or 'input'}; there is {known}.")
    return {name: held[name] for name in names}


def _tensor(value: Any) -> Tensor:
    """A row as networks take it: floats of 32 bits, whole numbers of 64."""
    found = value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    if found.is_floating_point():
        return found.float()
    return found if found.dtype == torch.bool or found.is_complex() else found.long()


class _Table(Dataset[Any]):
    """Rows of a table of `datasets`; images in it are preprocessed."""

    def __init__(self, rows: Any, names: Sequence[str], label: str | None, transform: Callable[[Any], Tensor] | None):
        self.rows, self.names, self.label, self.transform = rows, names, label, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        read = self.transform or _tensor
        inputs = {name: read(row[name]) for name in self.names}
        found = inputs if len(inputs) > 1 else next(iter(inputs.values()))
        return found if self.label is None else (found, int(row[self.label]))


def _of_table(data: Data, path: Path, own: Preprocessing | None, where: str, labels: bool) -> Source:
    """A folder of `datasets.save_to_disk`."""
    datasets: Any = needed("datasets", "datasets")
    held = called(datasets.load_from_disk, {"dataset_path": str(path)}, "datasets.load_from_disk", where)
    if isinstance(held, Mapping):
        if data.split not in held:
            raise RecipeError(f"`{where}.split` must be one of {', '.join(held)}; found {data.split}.")
        held = held[data.split]
    images = [name for name, kind in held.features.items() if isinstance(kind, datasets.Image)]
    names = data.inputs or images[:1]
    label = None if data.labels is None else data.labels.relative
    if not names:
        raise RecipeError(f"`{where}.inputs` must say which columns are inputs; there is {', '.join(held.features)}.")
    _named(held.features, [*names, *([label] if label else [])], where)
    pictures = [name for name in names if name in images]
    if pictures and len(names) > 1:
        raise RecipeError(f"`{where}.inputs` must be one column where it is of images; found {', '.join(names)}.")
    preprocessing = chosen(data, own, where) if pictures else None
    transform = preprocessing.transform() if preprocessing else None
    used = label if labels else None
    items = _Table(held, names, used, transform)
    classes = tuple(getattr(held.features[label], "names", ())) if label else ()
    return Source(_batches(items, data, mixed=used is None), used is not None, classes, preprocessing)


def _of_function(data: Data, where: str, labels: bool) -> Source:
    name = data.path.relative
    function = function_of(name, f"{where}.path")
    first = called(function, data.arguments or {}, name, where)
    if not isinstance(first, Iterable):
        raise RecipeError(
            f"`{where}.path`: `{name}` must return an iterable of batches; found `{type(first).__name__}`."
        )
    batches: Iterable[Any] = first
    if isinstance(first, Iterator):
        batches = Called(lambda: called(function, data.arguments or {}, name, where))
    return Source(batches, labels and _has_labels(next(iter(batches), None)))


def _has_labels(batch: Any) -> bool:
    """Whether a batch ends with a whole number for each input."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[-1], Tensor):
        return False
    return batch[-1].ndim == 1 and not batch[-1].is_floating_point()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(own, device) for name, own in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_moved(own, device) for own in value]
        return type(value)(*items) if isinstance(value, PerModel) or hasattr(value, "_fields") else type(value)(items)
    return value

"""What a recipe may hold. The docstrings are the help of the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import path_type

MYPY = False  # mypy takes it for true; jsonargparse looks into blocks of `TYPE_CHECKING`, and must not see this one
if MYPY:

    class Location:
        """A path, or a name that may hold one, and the folder that it was written in."""

        relative: str
        absolute: str
        cwd: str

        def __init__(self, path: str, *, cwd: str | None = None) -> None: ...
else:
    Location = path_type("", docstring="a path or name; a relative path is relative to the recipe that holds it")


def path_of(location: Location, text: str | None = None) -> Path:
    """The path that a recipe (relative to it) or the command line (relative to the current folder) names."""
    return Path(os.path.abspath(os.path.join(location.cwd, os.path.expanduser(text or location.relative))))


Scalar = str | bool | int | float | None
Value = Scalar | list[Scalar] | dict[str, Scalar | list[Scalar]]
"""What arguments of functions may be. Strings come first, so that "3" stays one."""


@dataclass
class Model:
    """A trained network.

    Args:
        architecture: `timm:NAME`, `torchvision:NAME`, `transformers:FOLDER`, or `package.module:function`, which
            returns a module.
        arguments: keyword arguments of the function that builds the network, such as `num_classes`.
        checkpoint: its weights: a file `.safetensors`, or a file of `torch.save`, of which weights alone are read.
            `random` for weights as the architecture sets them.
        entry: which entry of the checkpoint holds the weights, where there are several (`model_ema`).
        ignore: patterns of names in the checkpoint that the network does not have and need not (`loss.*`).
    """

    architecture: Location
    arguments: dict[str, Value] | None = None
    checkpoint: Location | None = None
    entry: str | None = None
    ignore: list[str] | None = None


@dataclass
class Data:
    """Inputs, with labels or without.

    Args:
        path: a folder of images (with classes as its folders: labelled), a file `.npy` or `.safetensors`, a folder of
            `datasets.save_to_disk`, or `package.module:function`, which returns an iterable of batches.
        arguments: keyword arguments of the function.
        size: height and width of images, or one number for both. As the model's own preprocessing has it, where it
            has one; so are the next four.
        resize: the shorter side before the centre is cropped to `size`, or height and width.
        interpolation: `nearest`, `bilinear`, `bicubic` or `lanczos`.
        mean: of each channel, of values in [0, 1].
        std: of each channel.
        inputs: names of the tensors or columns that are inputs. One is the only argument of the network, several are
            keyword arguments.
        labels: the tensor or column with the labels; for a `.npy`, the file.
        split: of a folder of `datasets`, where there are several.
        classes: a file with the names of the classes, one a line, in the order of the network's outputs. Without it,
            the sorted names of the folders.
        batch_size: inputs in a batch.
        limit: most inputs, drawn at random but the same each time.
        workers: processes that read images.
    """

    path: Location
    arguments: dict[str, Value] | None = None
    size: int | list[int] | None = None
    resize: int | list[int] | None = None
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    inputs: list[str] | None = None
    labels: Location | None = None
    split: str | None = None
    classes: Location | None = None
    batch_size: int = 32
    limit: int | None = None
    workers: int = 0


@dataclass
class ZipRecipe:
    """Which networks are zipped, and on which inputs.

    Args:
        models: the networks by the names of their tasks; the zipped network returns a dict by these names.
        data: unlabelled inputs to match and fit on: of all tasks together, or of each by its name.
        test: inputs to judge by, which no fit sees: in `compare` and `sweep` if they are labelled, and in `evaluate`.
        sample_input: what the networks are traced with: a shape, for random numbers, or `package.module:function`.
            Without it, the first inputs of `data`, or an input in the size of the first model's preprocessing.
        device: where the networks run, `cpu` or `cuda`.
        cuts: of `compare` and `sweep`: what `until` takes, each.
        methods: of `compare`: what `method` takes, each, or pairs [method, refit].
        max_costs: of `sweep`: what `max_cost` takes, each; widths are then by need.
    """

    models: dict[str, Model]
    data: Data | dict[str, Data] | None = None
    test: Data | dict[str, Data] | None = None
    sample_input: Location | list[int] | None = None
    device: str = "cpu"
    cuts: list[str | float | None] | None = None
    methods: list[str | dict[str, Any] | list[Any]] | None = None
    max_costs: list[float] | None = None


def by_task(data: Data | Mapping[str, Data]) -> dict[str | None, Data]:
    """Data of each task, under None if they are of all.

    >>> list(by_task({"pets": Data("pets"), "birds": Data("birds")}))
    ['pets', 'birds']
    """
    if isinstance(data, Data):
        return {None: data}
    found: dict[str | None, Data] = {}
    found.update(data)
    return found

"""Tasks on CIFAR-10 for fine-tunes of one base, and the networks: the base and a fine-tune for each task.

The base is trained on six of the ten classes. Every task is fine-tuned from it with a head of its own, on images that
the base has not seen. Tasks are class subsets, a superclass, a rotation to be told, and degraded images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from cifar_data import Images
from torch import Tensor, nn
from torch.nn import functional as F
from training import Recipe, Trained, load_checkpoint, save_checkpoint, train_network

ANIMALS, MACHINES = (2, 3, 4, 5, 6, 7), (0, 1, 8, 9)
BASE_CLASSES = (0, 1, 2, 3, 4, 5)
HEADS = {"resnet20": "linear", "vit": "head"}
"""The last linear layer of each architecture, which the base and the fine-tunes have of their own."""


@dataclass(frozen=True)
class Task:
    """What a network is fine-tuned to.

    Attributes:
        classes: how many its head tells apart.
        make: images of CIFAR-10 and a seed → images of the task, uint8, labels 0…classes - 1.
        flips: whether training images may be mirrored.
    """

    classes: int
    make: Callable[[Images, int], Images]
    flips: bool = True


def _subset(*classes: int) -> Callable[[Images, int], Images]:
    """The images of some classes, numbered anew."""

    def make(images: Images, seed: int) -> Images:
        own = images.of(classes)
        return Images(own.pixels, torch.tensor([classes.index(int(label)) for label in own.labels]))

    return make


def _superclass(images: Images, seed: int) -> Images:
    return Images(images.pixels, torch.isin(images.labels, torch.tensor(ANIMALS)).long())


def _rotated(images: Images, seed: int) -> Images:
    """Each image turned by a number of quarter turns, drawn by the seed, which is the label."""
    turns = torch.randint(4, (len(images),), generator=torch.Generator().manual_seed(seed))
    pixels = torch.stack([image.rot90(int(n), (1, 2)) for image, n in zip(images.pixels, turns, strict=True)])
    return Images(pixels, turns)


def _degraded(change: Callable[[Tensor, torch.Generator], Tensor]) -> Callable[[Images, int], Images]:
    def make(images: Images, seed: int) -> Images:
        generator = torch.Generator().manual_seed(seed)
        parts = [change(part.float(), generator).round().clamp(0, 255) for part in images.pixels.split(1000)]
        return Images(torch.cat(parts).to(torch.uint8), images.labels)

    return make


def _noisy(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return pixels + 40 * torch.randn(pixels.shape, generator=generator)


def _coarse(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return F.interpolate(F.avg_pool2d(pixels, 4), scale_factor=4, mode="bilinear", align_corners=False)


def _grey(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return pixels.mean(1, keepdim=True).expand_as(pixels)


TASKS: dict[str, Task] = {
    "animals": Task(len(ANIMALS), _subset(*ANIMALS)),
    "rotation": Task(4, _rotated, flips=False),
    "machines": Task(len(MACHINES), _subset(*MACHINES)),
    "noise": Task(10, _degraded(_noisy)),
    "superclass": Task(2, _superclass),
    "coarse": Task(10, _degraded(_coarse)),
    "grey": Task(10, _degraded(_grey)),
    "pets": Task(2, _subset(3, 5)),
}
"""The first two, the first four, and all eight are zipped."""


@dataclass(frozen=True)
class Training:
    """How the networks come about.

    Attributes:
        width: of the architecture.
        epochs: of the base.
        images: for each fine-tune, most.
        tune: epochs of each fine-tune.
        rate: peak of the learning rate of a fine-tune.
    """

    width: float
    epochs: int
    images: int
    tune: int
    rate: float


TRAINING = {"resnet20": Training(1, 6, 5000, 2, 0.05), "vit": Training(0.34, 7, 4000, 3, 5e-4)}


HELD = 2500
"""The last images of the fine-tunes' half, on which nothing is trained: calibration draws from them."""


def halves(train: Images) -> tuple[Images, Images]:
    """Training images in two parts, always the same: for the base, and for the fine-tunes."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(17))
    return train[order[::2]], train[order[1::2]]


def networks(architecture: str, train: Images, folder: Path) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The base and its fine-tunes by task, read from the folder where they are there, else trained and put there."""
    how, (first, second) = TRAINING[architecture], halves(train)
    name = f"{architecture}x{how.width:g}_e{how.epochs}"

    def kept(path: Path, make: Callable[[], Trained]) -> nn.Module:
        if not path.is_file():
            save_checkpoint(make(), path, architecture, how.width)
        return load_checkpoint(path).network

    base = kept(
        folder / f"{name}_base.safetensors",
        lambda: train_network(architecture, first, BASE_CLASSES, width=how.width, epochs=how.epochs),
    )

    def fine_tuned(number: int, task: Task) -> Trained:
        own = task.make(second[torch.arange(len(second) - HELD)], 100 + number)
        return train_network(
            architecture,
            own[torch.arange(min(len(own), how.images))],
            tuple(range(task.classes)),
            epochs=how.tune,
            seed=1 + number,
            recipe=Recipe(rate=how.rate, flip=task.flips),
            start=_with_head(base, HEADS[architecture], task.classes, number),
        )

    ending = f"{how.images}x{how.tune}_r{how.rate:g}"
    tuned = {
        what: kept(folder / f"{name}_{ending}_{what}.safetensors", partial(fine_tuned, number, task))
        for number, (what, task) in enumerate(TASKS.items())
    }
    return base, tuned


def _with_head(base: nn.Module, name: str, classes: int, seed: int) -> nn.Module:
    """A copy of the base with a new last layer."""
    result = copy.deepcopy(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        setattr(result, name, nn.Linear(getattr(result, name).in_features, classes))
    return result

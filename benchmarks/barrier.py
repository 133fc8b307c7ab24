"""Barriers between networks trained on one task from different seeds, by method of matching, with and without a refit.

    python benchmarks/barrier.py digits
    python benchmarks/barrier.py cifar10 --data DIR

`digits`: scikit-learn's images of 8×8 pixels, ResNet-20 of fourfold width, 500 images held out; needs no download.
`cifar10`: VGG-11 of quarter width on all ten classes. Networks are matched on training images, and the loss and the
accuracy on the line between them are those of held-out images. `--checkpoints` keeps the networks for the next run.
`--zip METHOD ...` also zips them, with least squares, and prints the accuracy of both heads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cifar_data import DEFAULT_CACHE, Images, load_cifar, normalise
from torch import Tensor, nn
from torch.nn import functional as F
from training import Recipe, load_checkpoint, save_checkpoint, train_network

import fxzip
from fxzip.tools.accuracy import evaluate_heads
from fxzip.tools.interpolation import Barrier

METHODS = ("average", "permute", "weights", "c2m3")
TASKS = {  # architecture, width, epochs, recipe
    "digits": ("resnet20", 4.0, 30, Recipe(crop=1, flip=False)),
    "cifar10": ("vgg11", 0.25, 8, Recipe()),
}
CLASSES = tuple(range(10))


@dataclass(frozen=True)
class Row:
    """Loss and accuracy at the worst point of the line between two networks, and the barriers.

    Attributes:
        loss, accuracy: the barrier in the loss, and in the accuracy.
        fall: by how much the loss barrier is lower than that of the naive line with the same refit, in [-∞, 1];
            `average` has to come first among the methods.
    """

    seeds: tuple[int, int]
    method: str
    refit: str
    worst_loss: float
    loss: float
    worst_accuracy: float
    accuracy: float
    fall: float


def digits() -> tuple[Images, Images]:
    """Training and held-out images, [n, 3, 8, 8], grey in three channels, 0 to 255."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images * (255 / 16)).round().to(torch.uint8)
    images = Images(pixels[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(found.target).long())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[500:]], images[order[:500]]


def networks(settings: argparse.Namespace, train: Images) -> list[nn.Module]:
    """A network for each seed, read from its checkpoint if there is one."""
    found = []
    for seed in settings.seeds:
        name = f"{settings.task}_{settings.architecture}x{settings.width:g}_e{settings.epochs}_s{seed}.safetensors"
        path = settings.checkpoints / name if settings.checkpoints else None
        if path is not None and path.is_file():
            found.append(load_checkpoint(path).network)
            continue
        trained = train_network(
            settings.architecture,
            train,
            CLASSES,
            width=settings.width,
            epochs=settings.epochs,
            seed=seed,
            bfloat16=settings.bfloat16,
            recipe=TASKS[settings.task][3],
            progress=False if settings.quiet else None,
        )
        if path is not None:
            save_checkpoint(trained, path, settings.architecture, settings.width)
        found.append(trained.network)
    return found


def logits(network: nn.Module, images: Images) -> Tensor:
    return torch.cat([network(normalise(batch)) for batch in images.pixels.split(250)])


def lines(
    pair: Sequence[nn.Module], drawn: Sequence[Tensor], held: Images, method: str, refit: str | None, points: int
) -> tuple[Barrier, Barrier]:
    """The line between two networks, in the loss and in the accuracy."""
    accuracies: list[float] = []

    def loss(network: nn.Module) -> float:
        found = logits(network, held)
        accuracies.append((found.argmax(1) == held.labels).double().mean().item())
        return F.cross_entropy(found, held.labels).item()

    line = fxzip.barrier(
        *pair, drawn[0][:2], loss=loss, data=drawn, method=method, refit=refit, points=points, progress=False
    )
    return line, Barrier(line.points, tuple(accuracies), "score")


@dataclass(frozen=True)
class Material:
    """The networks, the calibration batches and the held-out images."""

    trained: list[nn.Module]
    drawn: list[Tensor]
    held: Images


def material(settings: argparse.Namespace) -> Material:
    if settings.task == "digits":
        train, held = digits()
    else:
        cifar = load_cifar(settings.data, settings.cache)
        train, held = cifar.train, cifar.test
    trained = networks(settings, train)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seeds[0]))
    return Material(trained, [normalise(b) for b in train[order[: settings.images]].pixels.split(125)], held)


def zipped(found: Material, seeds: Sequence[int], methods: Sequence[str]) -> Iterator[str]:
    """Lines of the table of zips, of each two networks."""
    yield from ("| seeds | network | accuracy | average |", "|" + "---|" * 4)
    for first in range(len(found.trained) - 1):
        pair = found.trained[first : first + 2]
        rows = [("side by side", fxzip.side_by_side(pair, found.drawn[0][:2]))]
        for method in methods:
            settings = {"data": found.drawn, "method": method, "refit": "lstsq", "hold_out": False, "progress": False}
            rows.append((f"{method}, lstsq", fxzip.compile_zip(pair, found.drawn[0][:2], **settings)))
        for name, network in rows:
            own = evaluate_heads(
                lambda pixels, network=network: network(normalise(pixels)), found.held.pixels, found.held.labels,
                [CLASSES, CLASSES],
            )  # fmt: skip
            shown = " / ".join(f"{100 * value:.2f}" for value in own.per_task)
            yield f"| {seeds[first]}, {seeds[first + 1]} | {name} | {shown} | {100 * own.average:.2f} |"


def run(found: Material, settings: argparse.Namespace) -> Iterator[Row]:
    """Rows of the table, one by one; the first of each pair is the naive line."""
    trained, drawn, held = found.trained, found.drawn, found.held
    for first in range(len(trained) - 1):
        pair, naive = trained[first : first + 2], float("nan")
        for refit in (None, *settings.refit):
            for method in settings.methods:
                line, score = lines(pair, drawn, held, method, refit, settings.points)
                naive = line.height if method == "average" else naive
                yield Row(
                    seeds=tuple(settings.seeds[first : first + 2]),
                    method=method,
                    refit=refit or "none",
                    worst_loss=max(line.values),
                    loss=line.height,
                    worst_accuracy=min(score.values),
                    accuracy=score.height,
                    fall=1 - line.height / naive,
                )


def format_table(rows: Sequence[Row]) -> str:
    """Markdown; accuracies in per cent."""
    lines = ["| seeds | method | refit | worst loss | barrier | fall | worst accuracy | barrier |", "|" + "---|" * 8]
    for row in rows:
        cells = [
            f"{row.seeds[0]}, {row.seeds[1]}",
            row.method,
            row.refit,
            f"{row.worst_loss:.3f}",
            f"{row.loss:.3f}",
            f"{100 * row.fall:.0f} %",
            f"{100 * row.worst_accuracy:.2f}",
            f"{100 * row.accuracy:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("task", choices=sorted(TASKS))
    add("--seeds", type=int, nargs="+", default=[0, 1], help="of the networks; each is matched with the next")
    add("--architecture", help="default: that of the task")
    add("--width", type=float)
    add("--epochs", type=int)
    add("--bfloat16", action="store_true", help="train in mixed precision")
    add("--methods", nargs="+", default=METHODS)
    add("--refit", nargs="*", default=["batchnorm", "repair"], help="besides none")
    add("--zip", nargs="*", default=[], metavar="METHOD", help="also zip the networks by these methods")
    add("--points", type=int, default=11)
    add("--images", type=int, default=1000, help="training images that are matched and refitted on")
    add("--checkpoints", type=Path, help="folder to keep the networks in")
    add("--data", help="CIFAR-10, as for benchmarks/cifar.py")
    add("--cache", type=Path, default=DEFAULT_CACHE)
    add("--json", type=Path, help="also write settings and rows to this file")
    add("--quiet", action="store_true", help="no progress bars")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    settings = parser().parse_args(argv)
    for name, usual in zip(("architecture", "width", "epochs"), TASKS[settings.task], strict=False):
        if getattr(settings, name) is None:
            setattr(settings, name, usual)
    if settings.methods[0] != "average":
        settings.methods = ["average", *settings.methods]  # what the others are compared with
    rows = []
    found = material(settings)
    if settings.zip:
        print("\n".join(zipped(found, settings.seeds, settings.zip)) + "\n", flush=True)
    for row in run(found, settings):
        rows.append(row)
        print(row, flush=True)
    print("\n" + format_table(rows))
    if settings.json:
        content = {"settings": vars(settings), "rows": [asdict(row) for row in rows]}
        settings.json.write_text(json.dumps(content, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()

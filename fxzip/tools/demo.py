"""The demonstration behind `fxzip demo`: two small residual networks that read numbers, zipped into one.

The images are pairs of scikit-learn's bundled digits side by side, 8×16 pixels with noise. Network a learns to read the
numbers 00 to 49 and network b the numbers 50 to 99, from different seeds: fifty classes each, which needs most of what
networks of this width can hold. Their weights are averaged, they are zipped by ZipIt!, and by what `compile_zip` does
by default, fully and up to two earlier stages, from unlabelled training images. All are compared on images of digits
that neither the training nor the calibration has seen. Last, heads are made to decide together
(`fxzip.calibrate_joint`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fxzip

from .accuracy import HeadAccuracy, evaluate_heads

TASKS = (tuple(range(50)), tuple(range(50, 100)))
MERGES: Mapping[str, Mapping[str, Any]] = {
    "weights averaged": {"method": "average", "refit": None},
    "averaged, BatchNorm reset": {"method": "average", "refit": "batchnorm"},
    "ZipIt!, BatchNorm reset": {"method": "zip", "refit": "batchnorm"},
    "zip, all shared": {},
    "zip, until layer2": {"until": "layer2"},
    "zip, until layer1": {"until": "layer1"},
}
"""Rows of the table: what `compile_zip` is asked for beside the images. `zip` is what it does by default."""

APART, FULL = "a and b side by side", "zip, all shared"
TOGETHER = ", deciding together"
ALONE = ("a alone (numbers 00-49)", "b alone (numbers 50-99)")
WIDTH = 12
EPOCHS = 4
BATCH = 32
NOISE = 0.3
COLUMNS = ("network", "per task", "joint", "FLOPs / one", "parameters / one")


@dataclass(frozen=True, eq=False)
class Digits:
    """Images [n, 1, 8, 8] of zero mean and unit deviation, labels [n]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def of(self, task: Sequence[int]) -> Tensor:
        """The training images of a task."""
        return self.train_images[torch.isin(self.train_labels, torch.tensor(task))]


@dataclass(frozen=True)
class Row:
    """One network of the table.

    Attributes:
        name: what it is.
        accuracy: mean accuracy of the tasks it knows, each head on its own numbers.
        joint: accuracy of all heads together over a hundred numbers; None for a model that knows fifty.
        flops: FLOPs / FLOPs of one model.
        parameters: parameters / parameters of one model.
    """

    name: str
    accuracy: float
    joint: float | None
    flops: float
    parameters: float


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, a strided 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network of three stages for small images.

    >>> SmallResNet(classes=5)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 5])
    """

    def __init__(self, classes: int, width: int = WIDTH) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = BasicBlock(width, width, 1)
        self.layer2 = BasicBlock(width, 2 * width, 2)
        self.layer3 = BasicBlock(2 * width, 2 * width, 1)
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


def load_digits_split(seed: int = 0, test_share: float = 0.3) -> Digits:
    """The 1,797 bundled digits, split at random into images to train and calibrate on, and held-out images."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    targets = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order.split([round(test_share * len(order)), len(order) - round(test_share * len(order))])
    images = (images - images[train].mean()) / images[train].std()
    return Digits(images[train], targets[train], images[test], targets[test])


def numbers(digits: Digits, seed: int = 0, train: int = 6000, test: int = 2000) -> Digits:
    """Images [n, 1, 8, 16] of numbers of two digits, drawn from the images of single ones, with noise."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
        tens, ones = torch.randint(len(images), (2, count), generator=generator)
        both = torch.cat([images[tens], images[ones]], dim=3)
        return both + NOISE * torch.randn(both.shape, generator=generator), 10 * labels[tens] + labels[ones]

    return Digits(
        *drawn(digits.train_images, digits.train_labels, train), *drawn(digits.test_images, digits.test_labels, test)
    )


def train(
    examples: tuple[Tensor, Tensor], task: Sequence[int], *, seed: int, epochs: int = EPOCHS, width: int = WIDTH,
    progress: bool | None = None,
) -> SmallResNet:  # fmt: skip
    """Train a network on the images of its task alone. The caller's RNG state stays as it is. Returns it in eval mode.

    Args:
        examples: images and their labels.
        progress: None shows a bar on a terminal only; a bool forces it.
    """
    (images, labels), classes = examples, torch.tensor(task)
    own = torch.isin(labels, classes)
    images, targets = images[own], torch.searchsorted(classes, labels[own])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SmallResNet(len(task), width)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=max(steps, 2), pct_start=0.25)
    hidden = None if progress is None else not progress
    with tqdm(total=steps, desc="training", unit="step", disable=hidden) as bar:
        for _ in range(epochs):
            for index in torch.randperm(len(images), generator=generator).split(BATCH):
                loss = F.cross_entropy(model(images[index]), targets[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval()


def calibration_batches(images: Tensor, batch_size: int = 100) -> list[Tensor]:
    """Unlabelled images in batches, for `compile_zip`."""
    return list(images.split(batch_size))


def evaluate(forward: Callable[[Tensor], Sequence[Tensor]], digits: Digits) -> HeadAccuracy:
    """Accuracy of both heads on the held-out images."""
    return evaluate_heads(forward, digits.test_images, digits.test_labels, TASKS)


def compare(
    models: Sequence[nn.Module], digits: Digits, *, images: int = 1000, progress: bool | None = None
) -> Iterator[tuple[Row, nn.Module | None]]:
    """Merge in every way: the rows of the table, each with its network, as they come. `images`: to calibrate on."""
    sample, halves = digits.train_images[:2], [digits.of(task)[: images // 2] for task in TASKS]
    mixed = torch.stack(halves, dim=1).flatten(0, 1)  # batches hold images of both tasks
    own = fxzip.PerModel(*map(calibration_batches, halves))
    apart = fxzip.side_by_side(models, sample)
    for name, accuracy in zip(ALONE, evaluate(apart, digits).per_task, strict=True):
        yield Row(name, accuracy, None, 1.0, 1.0), None

    yield _row(APART, apart, digits), apart
    full: Any = None
    for name, options in MERGES.items():
        found = fxzip.compile_zip(models, sample, data=calibration_batches(mixed), progress=progress, **options)
        full = found if name == FULL else full
        yield _row(name, found, digits), found

    for name, network in ((APART, apart), (FULL, full)):
        judge = fxzip.calibrate_joint(network, sample, own, progress=progress)
        yield _row(name + TOGETHER, judge, digits), judge


def _row(name: str, network: Any, digits: Digits) -> Row:
    found, cost = evaluate(network, digits), [network.report[key] for key in ("flops", "parameters")]
    flops, parameters = (one["total"] / one["originals"][0] for one in cost)
    return Row(name, found.average, found.joint, flops, parameters)


def row_names() -> list[str]:
    """Names of all rows of the table, in their order."""
    return [*ALONE, APART, *MERGES, APART + TOGETHER, FULL + TOGETHER]


def format_row(row: Row | None = None) -> str:
    """A row as aligned plain text, accuracies in per cent and costs as ratios; None: the heads of the columns."""
    cells: Sequence[str] = COLUMNS
    if row is not None:
        joint = "-" if row.joint is None else f"{100 * row.joint:.1f} %"
        cells = (row.name, f"{100 * row.accuracy:.1f} %", joint, f"{row.flops:.2f}", f"{row.parameters:.2f}")
    widths = [max(map(len, row_names())), *(max(len(column), len("100.0 %")) for column in COLUMNS[1:])]
    return "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch has one thread: networks so small gain nothing by more, and where other programs keep a core busy
    threads that wait for one another take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run(
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    width: int = WIDTH,
    output: str | Path = "zipped.pt2",
    quiet: bool = False,
    write: Callable[[str], Any] = print,
) -> list[Row]:
    """Train, merge, compare, keep. Writes the table row by row, and what was kept; returns the rows."""
    progress = False if quiet else None
    digits = numbers(load_digits_split(seed), seed)
    models = [
        train(
            (digits.train_images, digits.train_labels), task, seed=2 * seed + i, epochs=epochs, width=width,
            progress=progress,
        )
        for i, task in enumerate(TASKS)
    ]  # fmt: skip
    write(f"{format_row()}\n{'-' * len(format_row())}")
    rows, networks = [], {}
    for row, network in compare(models, digits, progress=progress):
        write(format_row(row))
        rows.append(row)
        networks[row.name] = network

    write(
        f"\nAccuracy on {len(digits.test_images)} held-out images; zipped from unlabelled ones, without training.\n"
        "Deciding together: `calibrate_joint`, from images of which the task is known, but not the class."
    )
    keep(networks[FULL + TOGETHER], digits.test_images[:2], Path(output), write)
    return rows


def keep(network: Any, sample: Tensor, path: Path, write: Callable[[str], Any]) -> None:
    """Save as a folder, a page beside it, and a program; write where they are.

    Raises:
        FxzipError: the program gives other outputs than the network (`fxzip.export`).
    """
    folder, page = path.with_suffix(""), path.with_suffix(".html")
    path.parent.mkdir(parents=True, exist_ok=True)
    fxzip.save(network, folder)
    network.report.html(page)
    fxzip.export(network, path, sample)
    write(
        f"\nThe last network of the table: {page} shows it in a browser, {folder} is for `fxzip.load`, {path} for\n\n"
        f'    model = torch.export.load("{path}").module()\n'
        "    numbers_to_49, numbers_from_50 = model(torch.zeros(16, 1, 8, 16))"
    )

"""The demonstration behind `fxzip demo`: two small residual networks, trained on disjoint digits, zipped into one.

Network a learns the digits 0 to 4 and network b the digits 5 to 9 of scikit-learn's bundled 8×8 images, from different
seeds. They are then zipped by every method, fully and up to two earlier stages, from unlabelled training images, and
all results are compared on images that neither the training nor the calibration has seen. Last, heads are made to
decide together (`fxzip.calibrate_joint`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fxzip

from .accuracy import HeadAccuracy, evaluate_heads

TASKS = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
METHODS = ("average", "permute", "zip")
CUTS = (None, "layer2", "layer1")
WIDTH = 12
EPOCHS = 8
BATCH = 32
COLUMNS = ("network", "per task", "joint", "FLOPs / one", "/ both", "parameters / one", "/ both")


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
    """One network of the table. Costs are relative to one model alone.

    Attributes:
        name: what it is.
        accuracy: mean accuracy of the tasks it knows, each head on its own digits.
        joint: accuracy of all heads together over ten digits; None for a model that knows five.
        flops: FLOPs / FLOPs of one model.
        parameters: parameters / parameters of one model.
        both: FLOPs and parameters of both models side by side, relative to one.
    """

    name: str
    accuracy: float
    joint: float | None
    flops: float
    parameters: float
    both: tuple[float, float]


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
    """A residual network of three stages for 8×8 images.

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


def train(
    images: Tensor,
    labels: Tensor,
    task: Sequence[int],
    *,
    seed: int,
    epochs: int = EPOCHS,
    width: int = WIDTH,
    name: str = "network",
    progress: bool | None = None,
) -> SmallResNet:
    """Train a network on the images of its task alone. The caller's RNG state stays as it is. Returns it in eval mode.

    Args:
        progress: None shows a bar on a terminal only; a bool forces it.
    """
    classes = torch.tensor(task)
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
    with tqdm(total=steps, desc=f"training {name}", unit="step", disable=hidden) as bar:
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
    models: Sequence[nn.Module],
    digits: Digits,
    *,
    methods: Sequence[str] = METHODS,
    cuts: Sequence[str | None] = CUTS,
    progress: bool | None = None,
) -> tuple[list[Row], torch.fx.GraphModule]:
    """Zip by every method and cut; the rows of the table, and the last method's full zip with heads that decide
    together."""
    data = calibration_batches(digits.train_images)
    sample = digits.train_images[:2]

    def score(network: nn.Module) -> dict[str, float]:
        found = evaluate(network, digits)
        return {"accuracy": found.average, "joint": found.joint}

    table = fxzip.compare(
        models, sample, data=data, held_out=[digits.test_images], score=score, methods=methods, cuts=cuts,
        progress=progress,
    )  # fmt: skip
    accuracy = evaluate(lambda x: [model(x) for model in models], digits)
    both = (table[0]["cost"], table[0]["parameters"])
    alone = [
        Row(f"{name} alone (digits {task[0]}-{task[-1]})", own, None, 1.0, 1.0, both)
        for name, task, own in zip("ab", TASKS, accuracy.per_task, strict=True)
    ]
    names = ["a and b side by side", *(f"{row['method']}, {_extent(row['until'])}" for row in table[1:])]
    rows = [
        Row(name, row["accuracy"], row["joint"], row["cost"], row["parameters"], both)
        for name, row in zip(names, table, strict=True)
    ]
    own = fxzip.PerModel(*(calibration_batches(digits.of(task)) for task in TASKS))
    full = fxzip.compile_zip(models, sample, data=data, method=fxzip.matching.resolve(methods[-1]), progress=False)
    for name, network in ((rows[0].name, fxzip.side_by_side(models, sample)), (f"{methods[-1]}, all shared", full)):
        full = fxzip.calibrate_joint(network, sample, own, progress=False)
        found, cost = evaluate(full, digits), [full.report[key] for key in ("flops", "parameters")]
        flops, parameters = (one["total"] / one["originals"][0] for one in cost)
        rows.append(Row(f"{name}, deciding together", found.average, found.joint, flops, parameters, both))
    return [*alone, *rows], full


def format_table(rows: Sequence[Row]) -> str:
    """Rows as aligned plain text: accuracies in per cent, costs as ratios."""

    def cells(row: Row) -> tuple[str, ...]:
        return (
            row.name,
            f"{100 * row.accuracy:.1f} %",
            "-" if row.joint is None else f"{100 * row.joint:.1f} %",
            f"{row.flops:.2f}",
            f"{row.flops / row.both[0]:.2f}",
            f"{row.parameters:.2f}",
            f"{row.parameters / row.both[1]:.2f}",
        )

    table = [COLUMNS, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def export(zipped: nn.Module, sample: Tensor, path: Path) -> None:
    """Save as a `torch.export` program of any batch size, load it again, and check it at another batch size.

    Raises:
        FxzipError: the loaded program gives other outputs than the module.
    """
    batch = torch.export.Dim("batch")
    program = torch.export.export(zipped, (sample[:2],), dynamic_shapes=({0: batch},))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    other = sample[:7]
    with torch.no_grad():
        for head, (found, wanted) in enumerate(zip(loaded(other), zipped(other), strict=True)):
            if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4):
                difference = (found - wanted).abs().max().item()
                raise fxzip.FxzipError(
                    f"The exported program must give the outputs of the zipped network at any batch size; head {head} "
                    f"differs by {difference:.1e} on a batch of {len(other)} after loading {path}."
                )


def run(
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    width: int = WIDTH,
    output: str | Path = "zipped.pt2",
    quiet: bool = False,
    write: Callable[[str], Any] = print,
) -> list[Row]:
    """Train, zip, compare, export. Writes the table and how to load the program; returns the rows of the table."""
    progress = False if quiet else None
    digits = load_digits_split(seed)
    models = [
        train(
            digits.train_images,
            digits.train_labels,
            task,
            seed=2 * seed + i,
            epochs=epochs,
            width=width,
            name=f"{name} on digits {task[0]}-{task[-1]}",
            progress=progress,
        )
        for i, (name, task) in enumerate(zip("ab", TASKS, strict=True))
    ]
    rows, zipped = compare(models, digits, progress=progress)
    write(format_table(rows))
    write(
        f"\nAccuracy on {len(digits.test_images)} held-out images; zipped from {len(digits.train_images)} unlabelled "
        "ones, without training.\nDeciding together: `calibrate_joint`, from images of which the task is known, but "
        "not the class."
    )
    path = Path(output)
    export(zipped, digits.test_images, path)
    write(f"The last network of the table is in {path}. To load it:\n")
    write(f'    import torch\n    model = torch.export.load("{path}").module()')
    write("    digits_0_to_4, digits_5_to_9 = model(torch.zeros(16, 1, 8, 8))")
    return rows


def _extent(cut: str | None) -> str:
    return "all shared" if cut is None else f"until {cut}"

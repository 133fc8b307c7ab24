"""Fine-tunes of one base on CIFAR-10, zipped to the cost of one network: 2, 4 and 8 tasks, every method.

    python benchmarks/onebase.py --data DIR --checkpoints DIR --draws 3

Tasks and training are those of `onebase_tasks.py`. Calibration takes unlabelled images of each task that no network was
trained on; accuracies are those of the test images, per task, mean over the tasks. The rows are

    side by side       the fine-tunes themselves
    alone              each narrowed by itself to 1/K of the cost (`fxzip.narrow`), side by side
    average ... iso-c  published methods, with REPAIR behind them where the network has BatchNorms, else without a refit
    regmean, regmean++ as refits of the average
    default            `fxzip.compile_zip(models, sample, data=...)`
    by need            the same with `width="auto", max_cost=1`
    data-free ...      methods without any data
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from cifar_data import DEFAULT_CACHE, Cifar, Images, load_cifar, normalise
from onebase_tasks import HELD, TASKS, TRAINING, halves, networks
from torch import Tensor, nn

import fxzip

PUBLISHED = ("average", "task-arithmetic", "ties", "tsv", "iso-c")
ROWS: dict[str, dict[str, Any]] = {
    **{name: {"method": name, "refit": "statistics"} for name in PUBLISHED},
    "regmean": {"method": "average", "refit": "regmean"},
    "regmean++": {"method": "average", "refit": "regmean++"},
    "default": {},
    "energy": {"method": "energy"},
    "zip": {"method": "zip"},
    "by need": {"width": "auto", "max_cost": 1.0},
    **{f"data-free {name}": {"method": name, "data": None} for name in PUBLISHED},
}
"""What `compile_zip` is given; the refit "statistics" is "repair" where there are BatchNorms, else none."""


def accuracy(network: Callable[[Tensor], Any], images: Images, head: int | None = None) -> float:
    """Per cent of images that a network, or a head of it, gets right."""
    found = []
    with torch.no_grad():
        for pixels in images.pixels.split(500):
            output = network(normalise(pixels))
            found.append((output if head is None else output[head]).argmax(1))
    return 100 * (torch.cat(found) == images.labels).double().mean().item()


def evaluated(zipped: nn.Module, tests: Mapping[str, Images]) -> list[float]:
    """Accuracy of each head on its own task; only that head is run."""
    return [accuracy(zipped.single(k), images) for k, images in enumerate(tests.values())]  # type: ignore[operator]


def calibration(cifar: Cifar, tasks: Sequence[str], count: int, draw: int) -> fxzip.PerModel:
    """`count` unlabelled images of each task, drawn from those that no network was trained on, in batches of 100."""
    kept = halves(cifar.train)[1]
    kept = kept[torch.arange(len(kept) - HELD, len(kept))]
    sources = []
    for number, task in enumerate(tasks):
        own = TASKS[task].make(kept, 1000 * draw + number)
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(1000 * draw + number))
        sources.append(list(normalise(own.pixels[order[:count]]).split(100)))
    return fxzip.PerModel(*sources)


def zipped_by(
    how: Mapping[str, Any], models: Mapping[str, nn.Module], base: nn.Module, data: fxzip.PerModel
) -> fxzip.ZippedModule:
    """The zip of a row."""
    # The analysis is the same in all rows, and the tests check it: once is enough.
    options: dict[str, Any] = {"data": data, "progress": False, "hold_out": False, "verify": False, **how}
    if options.get("refit") == "statistics":
        norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in base.modules())
        options["refit"] = "repair" if norms else None
    if options.get("method") in PUBLISHED[1:]:
        options["base"] = base
    sample = next(iter(next(iter(data))))[:4]
    return fxzip.compile_zip(dict(models), sample, **options)


def alone(models: Mapping[str, nn.Module], data: fxzip.PerModel) -> list[nn.Module]:
    """Each network narrowed by itself to its share of the cost of one."""
    found: list[nn.Module] = []
    for network, source in zip(models.values(), data, strict=True):
        batches = list(source)
        found.append(fxzip.narrow(network, batches[0][:4], data=batches, max_cost=1 / len(models), progress=False))
    return found


def run(settings: argparse.Namespace, architecture: str, cifar: Cifar) -> list[dict[str, Any]]:
    """A row for each method at each number of tasks."""
    base, tuned = networks(architecture, cifar.train, settings.checkpoints)
    tests = {task: TASKS[task].make(cifar.test, 10_000 + n) for n, task in enumerate(TASKS)}
    if settings.test_images:
        order = torch.Generator().manual_seed(0)
        tests = {
            task: own[torch.randperm(len(own), generator=order)[: settings.test_images]] for task, own in tests.items()
        }
    own = {task: accuracy(network, tests[task]) for task, network in tuned.items()}
    print(architecture, *(f"{task} {value:.2f}" for task, value in own.items()), sep="  ", flush=True)

    rows: list[dict[str, Any]] = []
    for count in settings.tasks:
        chosen = {task: tuned[task] for task in list(TASKS)[:count]}
        there = {task: tests[task] for task in chosen}
        bound = mean(own[task] for task in chosen)
        rows.append({"network": architecture, "tasks": count, "row": "side by side", "draws": [bound], "cost": count})
        for name in settings.rows:
            draws, cost, seconds = [], 0.0, 0.0
            for draw in range(1 if name.startswith("data-free") else settings.draws):
                data = calibration(cifar, list(chosen), settings.images, draw)
                start = time.perf_counter()
                try:
                    if name == "alone":
                        found = alone(chosen, data)
                        scores = [accuracy(one, images) for one, images in zip(found, there.values(), strict=True)]
                        cost = 1.0
                    else:
                        zipped = zipped_by(ROWS[name], chosen, base, data)
                        scores, cost = evaluated(zipped, there), zipped.report.cost
                except fxzip.CostError as error:
                    print(f"{architecture} {count} {name}: {error}", flush=True)
                    break
                seconds += time.perf_counter() - start
                draws.append(mean(scores))
                print(f"{architecture} {count} {name} {draws[-1]:.2f}", [round(s, 1) for s in scores], flush=True)
            if draws:
                row = {"draws": draws, "cost": cost, "seconds": seconds / len(draws), "of": mean(draws) / bound}
                rows.append({"network": architecture, "tasks": count, "row": name, **row})
            if settings.json:
                settings.json.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each method, a column for each network and number of tasks."""
    columns = list(dict.fromkeys((row["network"], row["tasks"]) for row in rows))
    cells = {(row["row"], row["network"], row["tasks"]): row for row in rows}
    lines = ["| method | " + " | ".join(f"{network}, {tasks}" for network, tasks in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name in dict.fromkeys(row["row"] for row in rows):
        shown = []
        for column in columns:
            row = cells.get((name, *column))
            spread = "" if row is None or len(row["draws"]) < 2 else f" ± {stdev(row['draws']):.2f}"
            shown.append("" if row is None else f"{mean(row['draws']):.2f}{spread}")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--data", help="CIFAR-10, as for benchmarks/cifar.py")
    add("--cache", type=Path, default=DEFAULT_CACHE)
    add("--checkpoints", type=Path, default=DEFAULT_CACHE / "onebase", help="folder to keep the networks in")
    add("--architectures", nargs="+", default=list(TRAINING), choices=list(TRAINING))
    add("--tasks", nargs="+", type=int, default=[2, 4, 8], choices=range(2, len(TASKS) + 1))
    add("--rows", nargs="+", default=["alone", *ROWS], choices=["alone", *ROWS])
    add("--draws", type=int, default=1, help="draws of calibration images")
    add("--images", type=int, default=400, help="calibration images of each task")
    add("--test-images", type=int, default=0, help="test images of each task; 0: all")
    add("--threads", type=int, default=1)
    add("--json", type=Path, help="also write the rows to this file")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    settings = parser().parse_args(argv)
    torch.set_num_threads(settings.threads)
    warnings.simplefilter("ignore", fxzip.FxzipWarning)
    cifar = load_cifar(settings.data, settings.cache)
    rows = [row for architecture in settings.architectures for row in run(settings, architecture, cifar)]
    print("\n" + format_table(rows))


if __name__ == "__main__":
    main()

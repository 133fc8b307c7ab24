"""Zip networks trained on disjoint classes of CIFAR-10 and evaluate them, by method, cut and refit.

    python benchmarks/cifar.py --data DIR --checkpoints DIR

Calibration sees unlabelled training images only. Settings are tuned with `--split holdout`, which evaluates on 5,000
training images that calibration does not see; the test images are for reporting.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cifar_data import DEFAULT_CACHE, Images, draw_calibration, holdout_split, load_cifar, mixed_batches, normalise
from cifar_networks import NETWORKS
from cifar_table import Result, averaged, format_table
from training import Trained, load_checkpoint, save_checkpoint, train_network

from fxzip.tools.accuracy import HeadAccuracy, evaluate_heads


def parse_method(text: str) -> Any:
    """A method's name, or `zip:ALPHA,BETA` for `fxzip.Zip(alpha=ALPHA, beta=BETA)`; `recover+METHOD` for what
    `fxzip.baselines.Recover` makes of it."""
    import fxzip

    if text.startswith("recover+"):
        return fxzip.baselines.Recover(fxzip.matching.resolve(parse_method(text.removeprefix("recover+"))))
    name, _, settings = text.partition(":")
    if not settings:
        return name
    if name != "zip":
        raise ValueError(f"Only `zip` takes settings, as `zip:ALPHA,BETA`; found `{text}`.")
    alpha, beta = (float(value) for value in settings.split(","))
    return fxzip.Zip(alpha=alpha, beta=beta)


def evaluate_originals(
    models: Sequence[Trained], images: Images, device: str, batch: torch.Tensor | None = None
) -> list[Result]:
    """Each model alone on its own classes, and all side by side, with their latency on a batch."""
    accuracy = evaluate(lambda x: [model.network(x) for model in models], models, images, device)
    sizes = [sum(p.numel() for p in model.network.parameters()) for model in models]
    flops = [count_flops(model, device) for model in models]
    rows = [
        Result(f"model {i + 1} alone", "", "", "", (own,), own, None, flops[i] / flops[0], sizes[i] / sizes[0], None)
        for i, own in enumerate(accuracy.per_task)
    ]
    ratios = (sum(flops) / flops[0], sum(sizes) / sizes[0])
    taken = None
    if batch is not None:
        import fxzip

        both = fxzip.side_by_side([model.network for model in models], batch)
        taken = latency(both, models, batch)
    return [*rows, Result("side by side", "", "", "", *astuple(accuracy), *ratios, None, latency=taken)]


def evaluate_zipped(
    models: Sequence[Trained],
    drawn: Sequence[torch.Tensor],
    images: Images,
    settings: argparse.Namespace,
    method: str,
    until: str,
    width: str,
    rank: str,
    refit: str,
    seed: int,
) -> Result:
    """Zip by one method, cut, width and refit, and evaluate. `seed`: of the order of mixed batches."""
    import fxzip

    device = settings.device
    sample = draw_sample(drawn, settings.latency_batch).to(device)
    if settings.data_per_model or settings.joint:
        data: Any = per_model(drawn, settings)
    else:
        data = [batch.to(device) for batch in mixed_batches(drawn, settings.batch_size, seed)]
    start = time.perf_counter()
    options = {**parse_width(width), **parse_rank(rank)}
    if "auto" in (options["width"], options["rank"]):
        options["budget"] = settings.budget
    if method == "alone":
        zipped = narrowed_alone(models, sample, data, options)
        if settings.joint:
            zipped = fxzip.calibrate_joint(zipped, sample, data, progress=False)
    else:
        zipped = fxzip.compile_zip(
            [model.network for model in models],
            sample,
            data=data,
            method=parse_method(method),
            until=parse_until(until),
            **options,
            refit=None if refit == "none" else refit,
            joint=settings.joint,
            hold_out=settings.hold_out,
            progress=False if settings.quiet else None,
        )
    seconds = time.perf_counter() - start
    accuracy = evaluate(zipped, models, images, device)
    name = f"{refit}, joint" if settings.joint else refit
    found = zipped.report.get("auto")
    taken = latency(zipped, models, sample)
    until = until if found is None else f"{until}: {found['until'] or 'none'}"
    width = width if rank == "1" else f"{width}, rank {rank}"
    costs = ratios(zipped, models, len(sample))
    return Result(method, until, width, name, *astuple(accuracy), *costs, seconds, latency=taken)


def draw_sample(drawn: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """The batch that latency is that of."""
    every = torch.cat(list(drawn))
    return every[torch.arange(size) % len(every)]


def per_model(drawn: Sequence[torch.Tensor], settings: argparse.Namespace) -> Any:
    """The calibration images as one source of batches for each model."""
    import fxzip

    return fxzip.PerModel(*([batch.to(settings.device) for batch in own.split(settings.batch_size)] for own in drawn))


def ratios(network: Any, models: Sequence[Trained], batch: int) -> list[float]:
    """FLOPs and parameters, relative to the first model; the network's report is of so many images."""
    parameters = list(models[0].network.parameters())
    flops = count_flops(models[0], str(parameters[0].device)) * batch
    total = {key: network.report[key]["total"] for key in ("flops", "parameters")}
    return [total["flops"] / flops, total["parameters"] / sum(p.numel() for p in parameters)]


def evaluate_joint(
    models: Sequence[Trained], drawn: Sequence[torch.Tensor], images: Images, settings: argparse.Namespace
) -> Result:
    """All models side by side, with the shifts of `fxzip.calibrate_joint`."""
    import fxzip

    sample = drawn[0][:2].to(settings.device)
    both = fxzip.side_by_side([model.network for model in models], sample)
    start = time.perf_counter()
    both = fxzip.calibrate_joint(both, sample, per_model(drawn, settings), progress=False)
    seconds = time.perf_counter() - start
    accuracy = evaluate(both, models, images, settings.device)
    return Result("side by side", "", "", "joint", *astuple(accuracy), *ratios(both, models, 2), seconds)


def evaluate(forward: Any, models: Sequence[Trained], images: Images, device: str) -> HeadAccuracy:
    """Accuracy of the heads on images given as pixels."""
    tasks = [model.classes for model in models]
    return evaluate_heads(lambda pixels: forward(normalise(pixels.to(device))), images.pixels, images.labels, tasks)


def astuple(accuracy: HeadAccuracy) -> tuple[tuple[float, ...], float, float]:
    return accuracy.per_task, accuracy.average, accuracy.joint


def parse_until(text: str) -> str | float | None:
    """`none`, a fraction of the FLOPs, or a module path or node name."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def parse_width(text: str) -> dict[str, Any]:
    """Arguments of `compile_zip` for a number, or `auto:COST`."""
    name, _, cost = text.partition(":")
    return {"width": "auto", "max_cost": float(cost or 1)} if name == "auto" else {"width": float(text)}


def parse_rank(text: str) -> dict[str, Any]:
    """The same of `rank`; `auto` alone shares the budget of the widths."""
    name, _, cost = text.partition(":")
    if name != "auto":
        return {"rank": float(text)}
    return {"rank": "auto", "max_cost": float(cost)} if cost else {"rank": "auto"}


def narrowed_alone(
    models: Sequence[Trained], sample: torch.Tensor, data: Any, options: Mapping[str, Any]
) -> torch.nn.Module:
    """Each network narrowed by itself to its share of the cost of one, side by side; of data per model it sees its
    own."""
    import fxzip

    cost = options.get("max_cost", 1.0) / len(models)
    given = {"max_cost": cost, "hold_out": False, "progress": False}
    given |= {key: options[key] for key in ("rank", "budget") if key in options}
    sources = list(data) if isinstance(data, fxzip.PerModel) else [data] * len(models)
    apart = [fxzip.narrow(model.network, sample, data=own, **given) for model, own in zip(models, sources, strict=True)]
    return fxzip.side_by_side(apart, sample)


def latency(network: torch.nn.Module, models: Sequence[Trained], batch: torch.Tensor, rounds: int = 40) -> float:
    """Least seconds of the network over those of the first model, run in turn."""
    both = network, models[0].network
    best = [float("inf")] * 2
    with torch.no_grad():
        for done in range(rounds + 2):
            for place, one in enumerate(both):
                start = time.perf_counter()
                one(batch)
                if batch.is_cuda:
                    torch.cuda.synchronize()
                if done > 1:
                    best[place] = min(best[place], time.perf_counter() - start)
    return best[0] / best[1]


def count_flops(model: Trained, device: str) -> int:
    """FLOPs of one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.network(torch.zeros(1, 3, 32, 32, device=device))
    return counter.get_total_flops()


def checkpoint_paths(settings: argparse.Namespace, count: int) -> list[Path]:
    """`NAME_a.safetensors`, `NAME_b.safetensors`, …"""
    name = settings.pair or f"cifar10_{settings.architecture}x{settings.width:g}"
    return [settings.checkpoints / f"{name}_{letter}.safetensors" for letter in "abcdefghij"[:count]]


def train_models(settings: argparse.Namespace, train: Images) -> list[Path]:
    """Train a network per task and save it; network i gets seed `--seed` + i."""
    if settings.train_images is not None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
        train = train[order[: settings.train_images]]
    paths = checkpoint_paths(settings, len(settings.tasks))
    for i, (path, classes) in enumerate(zip(paths, settings.tasks, strict=True)):
        if path.exists() and not settings.overwrite:
            raise FileExistsError(f"`--train` does not overwrite {path}; pass `--overwrite` or another `--pair`.")
        trained = train_network(
            settings.architecture,
            train,
            classes,
            width=settings.width,
            epochs=settings.epochs,
            seed=settings.seed + i,
            device=settings.device,
            bfloat16=settings.bfloat16,
            progress=False if settings.quiet else None,
        )
        save_checkpoint(trained, path, settings.architecture, settings.width)
    return paths


def find_models(settings: argparse.Namespace) -> list[Trained]:
    """The models of all checkpoints of the pair (or triple …) that are there."""
    paths = checkpoint_paths(settings, 10)
    present = [path for path in paths if path.is_file()]
    if len(present) < 2:
        raise FileNotFoundError(
            f"Evaluation needs at least {paths[0].name} and {paths[1].name}; {len(present)} of them are in "
            f"{settings.checkpoints}. Pass `--checkpoints DIR`, or `--train` to train them."
        )
    models = [load_checkpoint(path) for path in present]
    for model in models:
        model.network.to(settings.device)
    return models


def run(settings: argparse.Namespace) -> Iterator[Result]:
    """Rows of the table, one by one."""
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    cifar = load_cifar(settings.data, settings.cache)
    calibration, held = holdout_split(cifar.train)
    if settings.train:
        train_models(settings, cifar.train)
    models = find_models(settings)
    images = cifar.test if settings.split == "test" else held
    seeds = range(settings.seed, settings.seed + settings.draws)
    tasks = [model.classes for model in models]
    drawn = {seed: draw_calibration(calibration, tasks, settings.images, seed) for seed in seeds}
    batch = draw_sample(drawn[settings.seed], settings.latency_batch).to(settings.device)
    yield from evaluate_originals(models, images, settings.device, batch)
    if settings.joint:
        yield averaged([evaluate_joint(models, drawn[seed], images, settings) for seed in seeds])
    kinds = product(settings.refit, settings.methods, settings.cuts, settings.widths, settings.ranks)
    for refit, method, until, width, rank in kinds:
        kind = (method, until, width, rank, refit)
        yield averaged([evaluate_zipped(models, drawn[seed], images, settings, *kind, seed) for seed in seeds])


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add(
        "--data",
        default=os.environ.get("FXZIP_DATA", _default("../shared/data")),
        help="ImageFolder or archive of CIFAR-10, or a folder that holds cifar10.tar.xz "
        "(default: $FXZIP_DATA, else ../shared/data if it is there, else torchvision's download)",
    )
    add(
        "--checkpoints",
        type=Path,
        default=Path(os.environ.get("FXZIP_CHECKPOINTS") or _default("../shared/checkpoints") or "checkpoints"),
        help="folder of the trained networks (default: $FXZIP_CHECKPOINTS, else ../shared/checkpoints if it is there, "
        "else checkpoints)",
    )
    add("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the decoded images (default: %(default)s)")
    add("--pair", help="name of the checkpoints before _a, _b, … (default: cifar10_ARCHITECTURExWIDTH)")
    add("--architecture", choices=sorted(NETWORKS), default="resnet20")
    add("--width", type=float, default=2)
    add("--methods", nargs="+", default=["zip:0.1,0.5", "zip:1,1", "permute", "average"], help="zip:ALPHA,BETA, …")
    add("--cuts", nargs="+", default=["none", "layer2", "layer1"], help="values of `until`")
    add("--widths", nargs="+", default=["1"], help="values of `width`: a number, or auto:COST for `max_cost=COST`")
    add(
        "--ranks", nargs="+", default=["1"], help="values of `rank`: a number, auto (with widths by need), or auto:COST"
    )
    add("--refit", nargs="+", default=["repair"], help="repair, batchnorm, none, …")
    add("--images", type=int, default=1000, help="unlabelled calibration images of all tasks together")
    add("--draws", type=int, default=1, help="draws of them, with seeds from --seed on; rows then show mean ± spread")
    add("--data-per-model", action="store_true", help="give `data` as one iterable per model instead of mixed batches")
    add("--joint", action="store_true", help="fit shifts of the heads' logits (`joint=True`); implies --data-per-model")
    add("--hold-out", action="store_true", help="keep every tenth calibration image out of the fits, as by default")
    add("--budget", default="flops", help="what an auto:COST counts: flops, latency, memory or parameters")
    add("--latency-batch", type=int, default=32, help="size of the sample input, which latency is measured on")
    add("--threads", type=int, help="of PyTorch (default: as many as it takes)")
    add("--batch-size", type=int, default=125, help="of the calibration batches")
    add("--seed", type=int, default=0, help="of the calibration images; with --train, of the first network")
    add(
        "--split",
        choices=["test", "holdout"],
        default="test",
        help="evaluate on the test images, or on training images",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, help="also write settings and rows to this file")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--quiet", action="store_true", help="no progress bars")
    training = result.add_argument_group("training")
    training.add_argument(
        "--train", action="store_true", help="train the networks first and save them in --checkpoints"
    )
    training.add_argument("--epochs", type=int, default=40)
    training.add_argument("--train-images", type=int, help="train on so many images only")
    training.add_argument("--bfloat16", action="store_true", help="train in mixed precision")
    training.add_argument("--overwrite", action="store_true", help="replace checkpoints that are there")
    training.add_argument(
        "--tasks",
        nargs="+",
        type=lambda text: tuple(int(label) for label in text.split(",")),
        default=[(0, 2, 4, 6, 8), (1, 3, 5, 7, 9)],
        help="classes of each network (default: 0,2,4,6,8 1,3,5,7,9)",
    )
    return result


def _default(folder: str) -> str | None:
    return folder if Path(folder).is_dir() else None


def main(argv: Sequence[str] | None = None) -> None:
    settings = parser().parse_args(argv)
    rows = []
    for row in run(settings):
        rows.append(row)
        name = " ".join(filter(None, (row.network, row.until, row.width, row.refit)))
        print(f"{name}: {100 * row.average:.2f}", flush=True)
    print("\n" + format_table(rows, settings.markdown))
    if settings.json:
        content = {"settings": vars(settings), "rows": [asdict(row) for row in rows]}
        settings.json.write_text(json.dumps(content, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()

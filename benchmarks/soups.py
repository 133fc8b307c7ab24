"""Model soups on CIFAR-10: fine-tunes of one network with different settings, their means, and the best of them.

    python benchmarks/soups.py --data DIR --checkpoints DIR

A network is trained on all ten classes for a few epochs, then fine-tuned by every recipe of `RECIPES`. Ingredients of
the greedy soup are chosen on 5,000 training images that no network was trained on; accuracies are those of the test
images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from cifar_data import DEFAULT_CACHE, Images, holdout_split, load_cifar, normalise
from torch import nn
from training import Recipe, load_checkpoint, save_checkpoint, train_network, with_statistics_of

import fxzip

CLASSES = tuple(range(10))
RECIPES = {
    "rate 0.02": Recipe(rate=0.02),
    "rate 0.05": Recipe(rate=0.05),
    "rate 0.1": Recipe(rate=0.1),
    "rate 0.05, decay 1e-3": Recipe(rate=0.05, decay=1e-3),
    "rate 0.05, no crop, no flip": Recipe(rate=0.05, crop=0, flip=False),
    "rate 0.05, labels smoothed by 0.1": Recipe(rate=0.05, smoothing=0.1),
}


def accuracy(network: nn.Module, images: Images) -> float:
    """Share of images that the network gets right."""
    with torch.no_grad():
        found = torch.cat([network(normalise(batch)).argmax(1) for batch in images.pixels.split(500)])
    return (found == images.labels).double().mean().item()


def trained(
    settings: argparse.Namespace,
    train: Images,
    name: str,
    epochs: int,
    seed: int,
    recipe: Recipe,
    start: nn.Module | None,
) -> nn.Module:
    """A network, read from its checkpoint if there is one."""
    path = settings.checkpoints / f"{name}.safetensors" if settings.checkpoints else None
    if path is not None and path.is_file():
        return load_checkpoint(path).network
    result = train_network(
        settings.architecture,
        train,
        CLASSES,
        width=settings.width,
        epochs=epochs,
        seed=seed,
        bfloat16=settings.bfloat16,
        recipe=recipe,
        start=start,
        progress=False if settings.quiet else None,
    )
    if path is not None:
        save_checkpoint(result, path, settings.architecture, settings.width)
    return result.network


def run(settings: argparse.Namespace) -> list[tuple[str, float, float]]:
    """Rows: name, accuracy on the images that serve for selection, and on the test images."""
    cifar = load_cifar(settings.data, settings.cache)
    train, held = holdout_split(cifar.train)
    name = f"soup_{settings.architecture}x{settings.width:g}_e{settings.epochs}+{settings.tune}"
    base = trained(settings, train, f"{name}_base", settings.epochs, settings.seed, Recipe(), None)
    tuned = [
        trained(settings, train, f"{name}_{i}", settings.tune, settings.seed + 1 + i, recipe, base)
        for i, recipe in enumerate(RECIPES.values())
    ]
    rows: list[tuple[str, float, float]] = []

    def show(what: str, network: nn.Module) -> None:
        rows.append((what, accuracy(network, held), accuracy(network, cifar.test)))
        print("  ".join([what, *(f"{100 * value:.2f}" for value in rows[-1][1:])]), flush=True)

    show("before fine-tuning", base)
    for what, network in zip(RECIPES, tuned, strict=True):
        show(what, network)
    singles = rows[1:]
    best = max(singles, key=lambda row: row[1])
    rows.append((f"best single by selection ({best[0]})", *best[1:]))
    sample = normalise(held.pixels[:2])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
    drawn = [normalise(batch) for batch in train.pixels[order[: settings.images]].split(250)]
    show("uniform soup", fxzip.soup(tuned, sample))
    show("greedy soup", chosen := fxzip.soup(tuned, sample, kind="greedy", score=lambda net: accuracy(net, held)))
    print("greedy soup, in order:", ", ".join(list(RECIPES)[i] for i in chosen.fxzip_soup.models))
    show("uniform soup, BatchNorm reset", with_statistics_of(fxzip.soup(tuned, sample), drawn))
    corrected: Callable[[nn.Module], float] = lambda net: accuracy(with_statistics_of(net, drawn), held)  # noqa: E731
    chosen = fxzip.soup(tuned, sample, kind="greedy", score=corrected)
    show("greedy soup, BatchNorm reset", with_statistics_of(chosen, drawn))
    print("greedy soup, BatchNorm reset, in order:", ", ".join(list(RECIPES)[i] for i in chosen.fxzip_soup.models))
    return rows


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--data", help="CIFAR-10, as for benchmarks/cifar.py")
    add("--cache", type=Path, default=DEFAULT_CACHE)
    add("--checkpoints", type=Path, help="folder to keep the networks in")
    add("--architecture", default="vgg11")
    add("--width", type=float, default=0.25)
    add("--epochs", type=int, default=6, help="before fine-tuning")
    add("--tune", type=int, default=2, help="epochs of fine-tuning")
    add("--seed", type=int, default=0)
    add("--images", type=int, default=1000, help="training images for BatchNorm's statistics")
    add("--bfloat16", action="store_true", help="train in mixed precision")
    add("--json", type=Path, help="also write settings and rows to this file")
    add("--quiet", action="store_true", help="no progress bars")
    return result


def format_table(rows: Sequence[tuple[str, float, float]]) -> str:
    """Markdown; accuracies in per cent."""
    lines = ["| network | selection | test |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {100 * own:.2f} | {100 * test:.2f} |" for what, own, test in rows)])


def main(argv: Sequence[str] | None = None) -> None:
    settings = parser().parse_args(argv)
    rows = run(settings)
    print("\n" + format_table(rows))
    if settings.json:
        settings.json.write_text(json.dumps({"settings": vars(settings), "rows": rows}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()

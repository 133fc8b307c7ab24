"""One network at a part of its FLOPs: `fxzip.narrow` beside Torch-Pruning, from the same images.

    pip install torch-pruning
    python benchmarks/pruning.py --data DIR --checkpoints DIR --costs 0.5

The network is the first of the pair of `benchmarks/cifar.py`. All rows see the same training images, of its own
classes, and no label. Torch-Pruning removes groups of channels, the same share of every layer or the least important
ones of the whole network, as many as the FLOPs ask for; behind it the statistics of all BatchNorms are estimated anew
on these images, which is what REPAIR comes to where every convolution has a BatchNorm. Its importances here are those
that need no labels: magnitudes of grouped weights, and scales of BatchNorms.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import cifar
import torch
from cifar_data import Images, draw_calibration, holdout_split, load_cifar, normalise
from settings import flops
from torch import Tensor, nn
from training import with_statistics_of

import fxzip

SAMPLE = torch.zeros(1, 3, 32, 32)
IMPORTANCES = {"magnitude": "GroupMagnitudeImportance", "BatchNorm scales": "BNScaleImportance"}


def classes_of(network: nn.Module, images: Images) -> Tensor:
    """The class that the network chooses, of each image."""
    with torch.no_grad():
        return torch.cat([network(normalise(pixels)).argmax(1) for pixels in images.pixels.split(500)])


def pruned(network: nn.Module, cost: float, importance: Any, *, everywhere: bool) -> nn.Module:
    """By Torch-Pruning: the largest network that takes at most `cost` of the FLOPs, found by bisection.

    `everywhere`: layers compete with one another; else all lose the same share.
    """
    import torch_pruning

    limit, low, high = cost * flops(network, SAMPLE), 0.0, 1.0
    best: nn.Module | None = None
    for _ in range(12):
        ratio = (low + high) / 2
        tried = copy.deepcopy(network)
        last = [module for module in tried.modules() if isinstance(module, nn.Linear)][-1]
        pruner = torch_pruning.pruner.BasePruner(
            tried, SAMPLE, importance=importance(), pruning_ratio=ratio, global_pruning=everywhere,
            ignored_layers=[last], max_pruning_ratio=0.9,
        )  # fmt: skip
        pruner.step()
        if flops(tried, SAMPLE) <= limit:
            best, high = tried, ratio
        else:
            low = ratio
    if best is None:
        raise ValueError(f"Torch-Pruning finds no network at {cost} of the FLOPs.")
    return best


def rows(settings: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    """Names and networks."""
    import torch_pruning

    network, batches = settings.network, settings.batches
    for cost in settings.costs:
        narrow = partial(
            fxzip.narrow, network, batches[0][:32], data=batches, max_cost=cost, budget="flops", hold_out=False,
            progress=False,
        )  # fmt: skip
        yield "fxzip.narrow", narrow()
        if settings.ranks:
            yield 'fxzip.narrow, rank="auto"', narrow(rank="auto")
        for name, kind in IMPORTANCES.items():
            for everywhere in (False, True):
                importance = getattr(torch_pruning.importance, kind)
                found = pruned(network, cost, importance, everywhere=everywhere)
                where = "over all layers" if everywhere else "in each layer"
                yield f"Torch-Pruning, {name} {where}", found
                yield f"Torch-Pruning, {name} {where}, statistics anew", with_statistics_of(found, batches)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=cifar.parser().get_default("data"), help="as for benchmarks/cifar.py")
    parser.add_argument("--checkpoints", help="as for benchmarks/cifar.py")
    parser.add_argument("--costs", nargs="+", type=float, default=[0.5], help="FLOPs relative to the network")
    parser.add_argument("--images", type=int, default=1000, help="unlabelled training images")
    parser.add_argument("--seed", type=int, default=0, help="of the images")
    parser.add_argument("--ranks", action="store_true", help='a row with rank="auto", too')
    settings = parser.parse_args(argv)

    own = ["--checkpoints", settings.checkpoints] if settings.checkpoints else []
    defaults = cifar.parser().parse_args(own)
    data = load_cifar(settings.data, defaults.cache)
    first = cifar.find_models(defaults)[0]
    (drawn,) = draw_calibration(holdout_split(data.train)[0], [first.classes], settings.images, settings.seed)
    settings.network, settings.batches = first.network.cpu().eval(), list(drawn.split(125))

    test = data.test.of(first.classes)
    labels = torch.tensor([first.classes.index(int(label)) for label in test.labels])
    original, whole = classes_of(settings.network, test), flops(settings.network, SAMPLE)
    print("| network | FLOPs | accuracy | agreement |\n|---|---|---|---|")
    print(f"| as it is | 1.00 | {100 * (original == labels).double().mean():.2f} | |", flush=True)
    for name, network in rows(settings):
        found = classes_of(network, test)
        right, same = ((found == wanted).double().mean() for wanted in (labels, original))
        print(f"| {name} | {flops(network, SAMPLE) / whole:.2f} | {100 * right:.2f} | {100 * same:.2f} |", flush=True)


if __name__ == "__main__":
    main()

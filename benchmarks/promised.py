"""What a zip under a budget of latency was promised to take, against what it takes when it is timed by itself.

    python benchmarks/promised.py --networks resnet20x2 resnet50 vit --threads 1 2 --batches 1 32 --costs 1.0 0.6

Weights and images are random, and few images are used: times do not depend on them. "Promised" is what the report says
(`report["budget"]["spent"]`); "timed" is the least of interleaved runs of the zip and the first network, after the
compile. Both are relative to the first network. Prices are measured anew for each row.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torchvision
from cifar_networks import ResNet20
from deployment import least_seconds
from torch import nn

import fxzip


def vit() -> nn.Module:
    """ViT-S/16, with a head that is not zero: heads that are equal are no heads of two tasks."""
    network = torchvision.models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536, num_classes=10
    )
    nn.init.normal_(network.heads.head.weight, std=0.02)
    return network


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], int]] = {  # and pixels along a side
    "resnet20x2": (partial(ResNet20, 5), 32),
    "resnet50": (partial(torchvision.models.resnet50, num_classes=10), 224),
    "vit": (vit, 224),
}


def promised_and_timed(name: str, batch: int, cost: float, until: str | None, rounds: int) -> tuple[float, float]:
    """Latencies of the zip relative to the first network: by its report, and timed afterwards."""
    torch.manual_seed(0)
    make, side = NETWORKS[name]
    models = [make().eval() for _ in range(2)]
    images = [torch.randn(8, 3, side, side)]  # the same in all rows of a network
    x = torch.randn(batch, 3, side, side)
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few images and small trunks
        os.environ["FXZIP_CACHE"] = cache
        zipped = fxzip.compile_zip(
            models, x, data=images, until=until, width="auto", max_cost=cost, budget="latency", hold_out=False,
            progress=False,
        )  # fmt: skip
    with torch.no_grad():
        taken, first = least_seconds([zipped, models[0]], x, rounds)
    return zipped.report["budget"]["spent"], taken / first


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--costs", nargs="+", type=float, default=[1.0, 0.6])
    parser.add_argument("--until", help="where trunks end, see `compile_zip`")
    parser.add_argument("--rounds", type=int, default=30)
    settings = parser.parse_args(argv)

    print(
        "| network | threads | batch | asked for | promised | timed | timed / promised |\n|---|---|---|---|---|---|---|"
    )
    for name in settings.networks:
        for threads in settings.threads:
            torch.set_num_threads(threads)
            for batch in settings.batches:
                for cost in settings.costs:
                    said, timed = promised_and_timed(name, batch, cost, settings.until, settings.rounds)
                    figures = f"{cost:g} | {said:.3f} | {timed:.3f} | {timed / said:.2f}"
                    print(f"| {name} | {threads} | {batch} | {figures} |", flush=True)


if __name__ == "__main__":
    main()

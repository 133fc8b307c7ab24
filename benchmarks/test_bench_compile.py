"""The time of a whole compile against that of the forward passes of both networks over the same images.

    python -m pytest benchmarks/test_bench_compile.py --benchmark-enable

Weights are random: what takes time does not depend on their values.
"""

from __future__ import annotations

import pytest
import torch
from cifar_networks import ResNet20
from test_bench_pipeline import build, synchronise
from torch import Tensor, nn

import fxzip

SETTINGS = {  # network: images, pixels along a side, batch size
    "resnet20x2": (1000, 32, 125),
    "resnet50": (128, 224, 16),
}


def network(name: str, seed: int, device: str) -> nn.Module:
    if name != "resnet20x2":
        return build(name, seed, device)
    torch.manual_seed(seed)
    return ResNet20(5).eval().to(device)


@pytest.fixture(scope="module", params=list(SETTINGS))
def setting(request: pytest.FixtureRequest, device: str) -> tuple[list[nn.Module], list[Tensor]]:
    """Two networks, and batches of images."""
    images, side, size = SETTINGS[request.param]
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(images, 3, side, side, generator=generator).to(device).split(size)
    return [network(request.param, seed, device) for seed in (0, 1)], list(batches)


def forward_passes(models: list[nn.Module], batches: list[Tensor]) -> None:
    with torch.no_grad():
        for batch in batches:
            for model in models:
                model(batch)


def compile_pair(models: list[nn.Module], batches: list[Tensor]) -> None:
    fxzip.compile_zip(*models, batches[0], data=batches, progress=False)


def compile_by_zipit(models: list[nn.Module], batches: list[Tensor]) -> None:
    fxzip.compile_zip(*models, batches[0], data=batches, method="zip", refit="repair", progress=False)


@pytest.mark.parametrize("run", [forward_passes, compile_pair, compile_by_zipit])
@pytest.mark.benchmark(group="compile")
def test_compile(benchmark, setting, device, run):
    def timed() -> None:
        run(*setting)
        synchronise(device)

    benchmark.pedantic(timed, rounds=3, warmup_rounds=1)

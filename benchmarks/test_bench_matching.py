"""How long matching takes: `pytest benchmarks/test_bench_matching.py --benchmark-enable`."""

from __future__ import annotations

import pytest
import torch
import torchvision

from fxzip.compiler.options import Options
from fxzip.compiler.survey import survey
from fxzip.matching import BlockMoments, Permute, WeightMatching, Zip, match_blocks
from fxzip.matching.moments import Moments, moments
from fxzip.rewriting.zip_plan import plan
from fxzip.tracing.calls import as_call


def rectified(n: int, models: int = 2) -> Moments:
    """Features like those of a trained layer: noisy mixtures of n / 16 signals, behind a ReLU."""
    generator = torch.Generator().manual_seed(n)
    positions, rank = 2 * n, n // 16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    signal = normal(positions, rank)
    mixed = [signal @ normal(rank, n) / rank**0.5 + 0.5 * normal(positions, n) for _ in range(models)]
    return moments([x.relu() for x in mixed])


@pytest.mark.parametrize("n", [512, 2048])
@pytest.mark.parametrize("method", [Zip(), Zip(alpha=0.1, beta=0.5), Zip(alpha=0.3, beta=0.125), Permute()], ids=str)
def test_one_space(benchmark, method, n: int) -> None:
    statistics = rectified(n)
    benchmark.pedantic(method, (statistics, n), rounds=2)


@pytest.mark.parametrize("method", [Zip(), Permute()], ids=str)
@pytest.mark.parametrize(("n_blocks", "s"), [(16, 64), (32, 32)])
def test_one_space_of_blocks(benchmark, method, n_blocks: int, s: int) -> None:
    blocks = torch.arange(n_blocks * s).view(n_blocks, s)
    space = BlockMoments(rectified(n_blocks * s), (blocks, blocks))
    benchmark.pedantic(match_blocks, ([space], method), rounds=3)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_weights_of_two_networks(benchmark, name: str) -> None:
    """To convergence, from random initialisations, which takes the most steps."""
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(getattr(torchvision.models, name)())
    trunk = survey(networks, as_call(torch.randn(2, 3, 64, 64)), Options(verify=False)).trunk()
    benchmark.pedantic(plan, (trunk, {}, WeightMatching()), rounds=1)

"""Timings of the stages, and of the zipped network against one model and against both.

python -m pytest benchmarks --benchmark-enable
"""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import fxzip

IMAGES = 32
BATCH = 8


def build(name: str, seed: int, device: str) -> nn.Module:
    """A torchvision network in eval mode whose BatchNorm statistics are not at their initial values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = torchvision.models.get_model(name, weights=None, num_classes=10)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval().to(device)


def synchronise(device: str) -> None:
    """Wait for the device, so that the clock sees its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def models(device):
    return [build("resnet18", seed, device) for seed in (0, 1)]


@pytest.fixture(scope="module")
def batches(size, device):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, 3, size, size, generator=generator).to(device) for _ in range(IMAGES // BATCH)]


@pytest.fixture(scope="module")
def zipped(models, batches):
    return fxzip.compile_zip(*models, batches[0][:2], data=batches, method="permute", verify=False, progress=False)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.benchmark(group="analysis")
def test_inspect(benchmark, name, size, device):
    model = build(name, 0, device)
    sample = torch.randn(2, 3, size, size, device=device)
    inspection = benchmark.pedantic(fxzip.inspect, (model, sample), rounds=3, warmup_rounds=1)
    assert str(inspection)


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def pair(request, batches, device):
    """Two networks, their trunk, and the data."""
    models = [build(request.param, seed, device) for seed in (0, 1)]
    programs = [fxzip.tracing.trace(model, batches[0][:2]) for model in models]
    labellings = [fxzip.analysis.label(program, fxzip.RULES) for program in programs]
    trunk = fxzip.partition.find_trunk(fxzip.partition.align(programs), labellings)
    return models, trunk, fxzip.calibration.Calibration.of(batches, programs[0].call, models=2, progress=False)


@pytest.mark.parametrize("stage", ["forward passes", "observe"])
@pytest.mark.benchmark(group="observation")
def test_observe(benchmark, pair, batches, device, stage):
    models, trunk, calibration = pair

    def forward():
        with torch.no_grad():
            for batch in batches:
                for model in models:
                    model(batch)

    def run():
        forward() if stage == "forward passes" else fxzip.calibration.observe(trunk, calibration("observing"))
        synchronise(device)

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("network", ["one model", "both models", "zipped"])
@pytest.mark.benchmark(group="latency")
def test_latency(benchmark, models, zipped, batches, device, network):
    run = {
        "one model": models[0],
        "both models": lambda x: [model(x) for model in models],
        "zipped": zipped,
    }[network]

    def forward():
        with torch.no_grad():
            run(batches[0])
        synchronise(device)

    benchmark.pedantic(forward, rounds=30, warmup_rounds=5)

"""Refits of what has no batch, computed from parameters alone, and of what leaf modules ask of their input."""

from __future__ import annotations

import copy

import pytest
import torch
from models import randomise
from torch import Tensor, nn

import fxzip
from fxzip.refit.spread import Sums

close = torch.testing.assert_close
REFITS = ["repair", "lstsq", "regmean"]


class Conditioned(nn.Module):
    """A scale and a shift for each feature, computed from a parameter by a small network with a residual sum."""

    def __init__(self, classes: int = 3, *, written: bool = False) -> None:
        super().__init__()
        self.p, self.written = nn.Parameter(torch.zeros(4)), written
        self.a, self.b, self.c, self.norm = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 16), nn.LayerNorm(6)
        self.x, self.y, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.p) * 1.0
        if self.written:
            h[h < -0.05] = 0
        h = self.norm(h + self.b(torch.sigmoid(h)))
        scale, shift = self.c(torch.relu(h)).chunk(2, -1)
        return self.head(torch.relu(self.y(torch.relu(self.x(x) * (1 + scale) + shift))))


class Recurrent(nn.Module):
    """A leaf that asks what dtype its input has, right behind a linear call."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.a, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.gru, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.gru(h)[0].mean(1))


def pair(kind, **options):
    return [randomise(kind(classes, **options), seed).double() for seed, classes in ((1, 3), (2, 4))]


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("refit", REFITS)
def test_values_without_a_batch_are_refitted(refit, written):
    a, b = pair(Conditioned, written=written)
    data = [random(64, 5, seed=seed) for seed in range(3)]
    zipped = fxzip.compile_zip(a, b, data[0], data=data, method="permute", refit=refit, progress=False)
    x = random(32, 5, seed=9)
    for found, model in zip(zipped(x), (a, b), strict=True):
        assert found.shape == model(x).shape
        assert bool(found.isfinite().all())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("refit", REFITS)
def test_with_itself_they_stay_what_they_are(refit, written):
    a, _ = pair(Conditioned, written=written)
    data = [random(64, 5, seed=seed) for seed in range(3)]
    zipped = fxzip.compile_zip(a, copy.deepcopy(a), data[0], data=data, method="average", refit=refit, progress=False)
    x = random(32, 5, seed=9)
    for found in zipped(x):
        close(found, a(x), atol=1e-6, rtol=1e-6)


def test_repair_shifts_what_does_not_vary():
    """Such a value gets its target exactly: the mean of the models' own."""
    a, b = pair(Conditioned)
    data = [random(64, 5)]
    zipped = fxzip.compile_zip(
        a, b, data[0], data=data, method="average", refit="repair", hold_out=False, progress=False
    )
    seen = []
    hooks = [net.c.register_forward_hook(lambda _, __, y: seen.append(y)) for net in (a, b, zipped.trunk)]
    for net in (a, b, zipped):
        net(data[0])
    for hook in hooks:
        hook.remove()
    close(seen[2], (seen[0] + seen[1]) / 2)


def test_sums_of_a_value_without_a_batch():
    sums = Sums()
    for value in ([1.0, 2.0], [3.0, 6.0]):
        mean, spread = sums.add(torch.tensor(value), 0)
        close(mean, torch.tensor(value).double())
        assert not spread.any()
    close(sums.result()[0], torch.tensor([2.0, 4.0]).double())
    close(sums.result()[1], torch.tensor([1.0, 2.0]).double())


def test_least_squares_gives_leaves_values_of_their_dtype():
    """Where a result goes is followed beside it: a leaf never sees anything but what it is called on."""
    a, b = pair(Recurrent)
    data = [random(32, 6, 5, seed=seed) for seed in range(2)]
    errors = {}
    for refit in (None, "lstsq"):
        zipped = fxzip.compile_zip(a, b, data[0], data=data, method="permute", refit=refit, progress=False)
        x = random(64, 6, 5, seed=9)
        outputs = zip(zipped(x), (a, b), strict=True)
        errors[refit] = sum(float((found - net(x)).detach().square().mean()) for found, net in outputs)
    assert errors["lstsq"] < 0.5 * errors[None]

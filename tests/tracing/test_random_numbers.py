"""Random numbers in a model's code: a graph draws them anew in every call, or the model is refused by name."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import fxzip
from fxzip.errors import TraceError

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Noisy(nn.Module):
    """Noise on the features between two layers."""

    def __init__(self, noise):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.noise = noise

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.head(torch.relu(self.second(hidden + self.noise(hidden))))


def seeded(hidden):
    torch.manual_seed(0)
    return torch.randn_like(hidden)


def seeded_by_itself(_):
    torch.manual_seed(3)
    return torch.randn(16, dtype=torch.float64)


def from_seed(network, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return network(X)


@pytest.mark.parametrize("noise", [
    torch.randn_like, lambda h: torch.randn(16, dtype=h.dtype), lambda h: torch.rand(len(h), 1, dtype=h.dtype),
    lambda h: torch.normal(0.0, 1.0, (16,), dtype=h.dtype), lambda h: torch.randint(0, 3, (16,)).to(h),
    seeded_by_itself,
])  # fmt: skip
def test_noise_is_drawn_in_every_call_as_the_model_draws_it(noise):
    model = Noisy(noise).double().eval()
    zipped = fxzip.compile_zip(model, model, X, data=[X], method="permute", refit=None, progress=False)
    for seed in (5, 6):
        torch.testing.assert_close(from_seed(zipped.single(0), seed), from_seed(model, seed))


def test_a_generator_of_its_own_is_named_or_gives_what_it_always_does():
    """PyTorch 2.10 traces what it draws as a constant, which is right; newer ones do not trace it."""
    model = Noisy(lambda h: torch.randn(16, dtype=h.dtype, generator=torch.Generator().manual_seed(1))).double()
    traced, said = None, ""
    try:
        traced = fxzip.tracing.trace(model, X)
    except TraceError as error:
        said = str(error)
    if traced is None:
        assert "its `forward` seeds rand" in said
    else:
        torch.testing.assert_close(traced.module(X[:7]), model(X[:7]))


@pytest.mark.parametrize(("noise", "message"), [
    (seeded, "its `forward` seeds random numbers, or a generator of them, which no graph does: draw them once, in `__"),
    (lambda _: random.random(), "its `forward` may draw random numbers of Python or NumPy, which no graph does"),
    (lambda _: float(np.random.rand()), "its `forward` may draw random numbers of Python or NumPy, which no graph"),
])  # fmt: skip
def test_numbers_that_no_graph_draws_are_named(noise, message):
    model = Noisy(noise).double()
    states = torch.get_rng_state(), random.getstate()
    with pytest.raises(TraceError, match=message):
        fxzip.tracing.trace(model, X)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()

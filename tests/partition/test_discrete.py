"""Cuts at booleans and integers that go by features: of merged features no model can be given its own."""

import pytest
import torch
from models import randomise
from torch import nn

import fxzip

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    """What is passed on from the first layer by a mask that a later layer reads again."""

    def __init__(self, again):
        super().__init__()
        self.again = again
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        mask = h > 0.1
        h = self.second(torch.tanh(h * mask))
        return self.head(h * mask if self.again else torch.relu(h))


@pytest.mark.parametrize("method", ["energy", "zip", "permute"])
def test_a_mask_is_no_place_to_cut(method):
    models = [randomise(Masked(False), seed) for seed in range(2)]
    with pytest.raises(fxzip.CutError, match="at 'gt' node `gt` hands over booleans or integers that go by features"):
        fxzip.compile_zip(models, X[:4], data=[X], method=method, until="gt", progress=False)
    zipped = fxzip.compile_zip(models, X[:4], data=[X], method=method, until="first", progress=False)
    assert [tuple(y.shape) for y in zipped(X)] == [(64, 3)] * 2


def test_by_default_a_mask_that_heads_read_is_theirs():
    model = randomise(Masked(True), 0).double()
    x = X.double()
    zipped = fxzip.compile_zip(model, fxzip.relabel(model, x[:4]), x[:4], data=[x], progress=False)
    for found in zipped(x):
        torch.testing.assert_close(found, model(x), rtol=1e-6, atol=1e-6)


class Kept(nn.Module):
    """Features above a threshold are doubled by a write through a mask that is computed from them."""

    def __init__(self, classes):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x):
        h = self.second(torch.relu(self.first(x)))
        g = h.clone()
        g[h > 0.5] = h[h > 0.5] * 2
        return self.head(g)


def test_a_mask_that_a_write_reads_is_the_heads():
    models = [randomise(Kept(n), n) for n in (2, 3)]
    zipped = fxzip.compile_zip(
        models, X[:4], data=[X], until="second", width=2, refit=None, method="zip", progress=False
    )
    for model, output in zip(models, zipped(X), strict=True):
        torch.testing.assert_close(output, model(X))
    assert [tuple(y.shape) for y in fxzip.compile_zip(models, X[:4], data=[X], progress=False)(X)] == [(64, 2), (64, 3)]


class Replaced(nn.Module):
    """Features below zero are overwritten in place by what a mask takes of them, then those of a second layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        h[h < 0] = h[h < 0] * 0.1
        h = self.second(h)
        h[h < 0] = 0.0
        return self.head(h)


def test_what_a_mask_takes_of_features_that_models_share_is_the_heads():
    model, other = (randomise(Replaced(), seed) for seed in range(2))
    other.first.load_state_dict(model.first.state_dict())
    for twin in (other, fxzip.relabel(model, X[:4])):
        zipped = fxzip.compile_zip(model, twin, X[:4], data=[X], method="zip", progress=False)
        for found, own in zip(zipped(X), (model, twin), strict=True):
            torch.testing.assert_close(found, own(X), rtol=1e-4, atol=1e-5)

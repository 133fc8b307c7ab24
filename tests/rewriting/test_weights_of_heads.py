"""What heads compute from parameters alone: each model's own values, whatever was merged in front of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.analysis import relative_difference

X = torch.randn(128, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PLAIN = {"method": "zip", "refit": None, "progress": False}


class Net(nn.Module):
    """Two layers, and an end of their features."""

    def __init__(self, end):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.end, self.vector, self.small = end, nn.Parameter(torch.randn(16)), nn.Linear(6, 16)
        self.codes, self.eye = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.eye(16))

    def forward(self, x):
        return self.end(self, torch.relu(self.second(torch.relu(self.first(x)))))


def pair(end):
    torch.manual_seed(0)
    return [Net(end).double().eval() for _ in range(2)]


def own_features():
    """What each head gets of a trunk of both layers: the merged features, brought back by the method."""
    zipped = fxzip.compile_zip(*pair(lambda s, h: F.linear(h, s.eye)), X[:4], data=[X], until="relu_1", **PLAIN)
    return zipped(X)


ENDS = {
    "exp": lambda s, h: F.linear(h, s.head.weight.exp()),
    "abs": lambda s, h: torch.einsum("bc,kc->bk", h, s.head.weight.abs()),
    "softplus": lambda s, h: F.linear(h, F.softplus(s.head.weight), s.head.bias),
    "rounded": lambda s, h: F.linear(h, (s.head.weight * 8).round() / 8),
    "quantised": lambda s, h: F.linear(h, torch.fake_quantize_per_tensor_affine(s.head.weight, 0.05, 0, -128, 127)),
    "signs": lambda s, h: F.linear(h, s.head.weight.sign()),
    "without small ones": lambda s, h: F.linear(h, s.head.weight * (s.head.weight.abs() > 0.1)),
    "times a vector": lambda s, h: F.linear(h, s.head.weight * s.vector),
    "divided by a vector": lambda s, h: F.linear(h, s.head.weight / s.vector),
    "made by a network": lambda s, h: F.linear(h, torch.tanh(s.small(s.codes))),
    "tied to a bias": lambda s, h: F.linear(h, s.second.bias[None]),
    "a weight's size beside": lambda s, h: (s.head(h), s.second.weight.pow(2).mean()),
    "a weight's sum beside": lambda s, h: (s.head(h), s.second.weight.abs().sum()),
    "a weight beside": lambda s, h: (s.head(h), s.second.weight),
    "tied to a weight": lambda s, h: F.linear(h, s.second.weight),
}
TIED = ("a weight beside", "tied to a weight")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ENDS)
def test_a_head_computes_with_its_own_parameters(name):
    models = pair(ENDS[name])
    until = {"until": "relu_1"} if name in TIED else {}
    zipped = fxzip.compile_zip(*models, X[:4], data=[X], **PLAIN, **until)
    assert zipped.report["cut"]["after"] == ["relu_1"]
    for model, features, found in zip(models, own_features(), zipped(X), strict=True):
        assert relative_difference(ENDS[name](model, features), found) <= 1e-12


LINEAR = {
    "scaled": lambda s: s.head.weight * 0.5,
    "by rows": lambda s: s.head.weight * s.head.bias[:, None],
    "a sum": lambda s: s.head.weight + s.vector,
    "an outer product": lambda s: s.head.bias[:, None] * s.vector,
    "a product": lambda s: s.codes @ s.small.weight.t(),
}


@pytest.mark.parametrize("name", LINEAR)
def test_weights_that_add_up_take_the_unmerge(name):
    models = pair(lambda s, h: F.linear(h, LINEAR[name](s)))
    zipped = fxzip.compile_zip(*models, X[:4], data=[X], **PLAIN)
    assert [space["folded"] for space in zipped.report["spaces"]] == [[True, True]] * 2
    for model, features, found in zip(models, own_features(), zipped(X), strict=True):
        assert relative_difference(F.linear(features, LINEAR[name](model)), found) <= 1e-12


class Positive(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.exp(), self.bias)


def test_in_the_trunk_such_weights_leave_permutations_only():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Positive(16, 12), nn.ReLU(), nn.Linear(12, 3)).double().eval()
    spaces = fxzip.inspect(net, X).spaces
    assert [(space.size, space.legality) for space in spaces] == [(16, "relabel only"), (12, "free")]
    assert "a function of parameters that is not linear" in spaces[0].reason

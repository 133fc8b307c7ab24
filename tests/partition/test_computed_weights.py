"""Weights that the trunk computes from parameters become parameters, which can be merged and fitted."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.analysis import label, relative_difference
from fxzip.partition.lifting import computed_weights
from fxzip.tracing import trace

X = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
HOW = {
    "equalised": lambda w: w * 0.7,
    "normalised": lambda w: F.normalize(w, dim=1),
    "standardised": lambda w: (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True) / w.shape[1] ** 0.5,
}


class Net(nn.Module):
    def __init__(self, how, classes=3):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, classes)
        self.how = how

    def forward(self, x):
        x = torch.relu(F.linear(torch.relu(self.first(x)), self.how(self.second.weight), self.second.bias))
        return self.last(x)


def plain(net):
    """The same network with the weight as a parameter."""
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.second.weight.copy_(net.how(net.second.weight))
    twin.how = lambda w: w
    return twin


@pytest.mark.parametrize("name", HOW)
def test_they_are_merged_and_fitted_as_weights_are(name):
    torch.manual_seed(0)
    models = [Net(HOW[name], classes).eval() for classes in (3, 4)]
    zipped = fxzip.compile_zip(*models, X[:4], data=[X], progress=False)
    expected = fxzip.compile_zip(*map(plain, models), X[:4], data=[X], progress=False)
    for found, wanted in zip(zipped(X), expected(X), strict=True):
        assert relative_difference(wanted, found) < 1e-3
    assert any("is a parameter of the zip" in note for note in zipped.report["notes"])


def test_heads_keep_what_they_have():
    torch.manual_seed(0)
    labelling = label(trace(Net(HOW["equalised"]).eval(), X[:4]))
    names = [name for name, _ in labelling.program.module.named_parameters()]
    assert computed_weights(labelling, names) == ["mul"]
    assert computed_weights(labelling, ["second.weight"]) == []  # of what differs it is the last sum
    assert computed_weights(labelling, ["first.weight", "last.weight"]) == []


@pytest.mark.parametrize("name", HOW)
def test_within_one_network_features_that_are_copies_are_merged_exactly(name):
    torch.manual_seed(0)
    model = Net(HOW[name]).eval()
    with torch.no_grad():
        for value in (*model.first.parameters(), *model.second.parameters()):
            value[8:] = value[:8]
        model.first.weight.mul_(4)
        model.second.bias.add_(1)  # a feature that is 0 on all inputs is no copy of another
    narrowed = fxzip.narrow(model, X[:4], data=[X], max_cost=0.62, budget="flops", refit=None, progress=False)
    assert narrowed.report["spaces"][0]["kept"] < 16
    assert relative_difference(model(X), narrowed(X)) < 1e-5
    same = {"data": [X], "width": 0.5, "method": "energy", "refit": None, "until": "relu_1", "progress": False}
    twins = fxzip.compile_zip(model, copy.deepcopy(model), X[:4], **same)
    for found in twins(X):
        assert relative_difference(model(X), found) < 1e-5

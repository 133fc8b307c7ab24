"""Functional calls on the parameters of one module are the modules of torch.nn that they stand for."""

import copy

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.tracing import ladder, trace

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Norm(nn.BatchNorm2d):
    """As in libraries that put an activation behind it: not of torch.nn, so tracing goes inside."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


class Convolution(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, bias=self.bias)


OWN = {nn.BatchNorm2d: Norm, nn.Conv2d: Convolution, nn.Linear: Linear}


def functional(model):
    """The same network on functional calls."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = OWN.get(type(module), type(module))
    return model


def leaves(program):
    module = program.module
    return [type(module.get_submodule(n.target)) for n in module.graph.nodes if n.op == "call_module"]


def test_the_trace_is_that_of_the_modules():
    model = randomise(Residual())
    plain, raised = trace(model, X), trace(functional(model), X)
    assert leaves(raised) == leaves(plain)
    assert not any(node.op == "get_attr" for node in raised.module.graph.nodes)
    assert set(raised.module.state_dict()) == set(plain.module.state_dict())
    torch.testing.assert_close(raised.module(X), model(X))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("refit", [None, "batchnorm", "repair", "lstsq"])
@pytest.mark.slow
def test_the_zip_is_that_of_the_modules(refit):
    models = [randomise(Residual(n), n) for n in (3, 4)]
    data = [torch.randn(16, 3, 8, 8) for _ in range(3)]
    settings = {"data": data, "refit": refit, "progress": False}
    wanted = fxzip.compile_zip(*models, X, **settings)(X)
    for pair in ([functional(m) for m in models], [models[0], functional(models[1])]):
        for found, expected in zip(fxzip.compile_zip(*pair, X, **settings)(X), wanted, strict=True):
            torch.testing.assert_close(found, expected)


class Layers(nn.Module):
    """Layers of several kinds, with a view that an exported graph has too."""

    def __init__(self):
        super().__init__()
        self.body = Residual()
        self.up = nn.ConvTranspose2d(3, 3, 2, 2)
        self.line = nn.Conv1d(4, 5, 3, padding="same", bias=False)

    def forward(self, x):
        return self.line(self.body(self.up(x)).unsqueeze(-1).expand(-1, -1, 6))


def test_what_export_gives_is_raised_as_well(monkeypatch):
    monkeypatch.setattr(ladder, "RUNGS", ("export",))
    model = randomise(Layers())
    program = trace(model, X)
    found = leaves(program)
    assert program.rung == "export"
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.ConvTranspose2d, nn.Conv1d):
        assert found.count(kind) == sum(type(m) is kind for m in model.modules())
    torch.testing.assert_close(program.module(X), model(X))


class Kept(nn.Module):
    """Calls that no module of torch.nn makes: the bias is left out, the weight is not the parameter, all is twice. And
    one that one makes, in front."""

    def __init__(self):
        super().__init__()
        self.plain = Convolution(3, 3, 1)
        self.scaled, self.part, self.twice = nn.Module(), nn.Module(), nn.Module()
        for own in (self.scaled, self.part, self.twice):
            own.weight = nn.Parameter(torch.randn(3, 3, 1, 1))
        self.part.bias = nn.Parameter(torch.randn(3))

    def forward(self, x):
        x = F.conv2d(self.plain(x), self.scaled.weight * 2)
        x = F.conv2d(x, self.part.weight) * self.part.bias.sum()
        return F.conv2d(F.conv2d(x, self.twice.weight), self.twice.weight, padding=1)


def test_calls_that_are_no_module_stay():
    model = Kept()
    program = trace(model, X)
    assert leaves(program) == [nn.Conv2d]
    torch.testing.assert_close(program.module(X), model(X))


def test_a_call_that_is_made_twice_is_one_module():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = Convolution(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x).relu())

    program = trace(Twice(), X)
    assert leaves(program) == [nn.Conv2d, nn.Conv2d]
    assert len(list(program.module.parameters())) == 2


@pytest.mark.parametrize("refit", ["batchnorm", "stored"])
def test_a_refit_of_statistics_says_when_there_are_none(refit):
    models = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, n)) for n in (2, 3)]
    zipped = fxzip.compile_zip(*models, torch.randn(8, 3), refit=refit)
    assert any("BatchNorm" in note and "changed nothing" in note for note in zipped.report["notes"])

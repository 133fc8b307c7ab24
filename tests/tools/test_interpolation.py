"""The line between two networks: alignment, interpolation, and the height of the barrier."""

import copy
import re

import matplotlib as mpl
import pytest
import torch
from models import randomise
from models.networks import Mixed, PaddedResNet, Residual, torchvision_model
from torch import nn
from torch.nn import functional as F

import fxzip

mpl.use("agg")
G = torch.Generator().manual_seed(0)
X = torch.randn(40, 3, 8, 8, generator=G)


def value(network):
    return float(network(X).detach().double().square().mean())


def difference(model):
    """Relative distance from the model's outputs."""
    wanted = model(X)
    return lambda network: float((network(X) - wanted).norm() / wanted.norm())


def test_height_by_hand():
    """Ends 1 and 3: on the line 1.5, 2 and 2.5; the values rise above it by 0.5, 2 and -0.5."""
    line = fxzip.Barrier((0.0, 0.25, 0.5, 0.75, 1.0), (1.0, 2.0, 4.0, 2.0, 3.0), "loss")
    assert line.rises == (0.0, 0.5, 2.0, -0.5, 0.0)
    assert line.height == 2.0
    assert line.worst == 0.5
    fall = fxzip.Barrier((0.0, 0.5, 1.0), (0.9, 0.2, 0.7), "score")
    assert fall.height == pytest.approx(0.6)
    assert fxzip.Barrier((0.0, 0.5, 1.0), (0.5, 0.9, 0.5), "score").height == 0.0


def test_points_of_the_naive_line_are_the_means_of_the_weights():
    a, b = randomise(Residual(4), 1), randomise(Residual(4), 2)
    line = fxzip.barrier(a, b, X, loss=value, method="average", points=5, progress=False)
    assert line.points == (0.0, 0.25, 0.5, 0.75, 1.0)
    for t, found in zip(line.points, line.values, strict=True):
        between = copy.deepcopy(a)
        for name, tensor in between.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_((1 - t) * tensor + t * b.state_dict()[name])
        assert found == pytest.approx(value(between), rel=1e-4)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("make", [
    lambda: Residual(4), lambda: PaddedResNet(4, 8, 1),
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)),
])  # fmt: skip
def test_no_barrier_to_a_relabelled_copy(make):
    """Every network on the line is the same function, and the naive line shows that there was something to align."""
    model = randomise(make(), 1)
    twin = fxzip.relabel(model, X)
    line = fxzip.barrier(model, twin, X, loss=difference(model), data=[X], points=3, progress=False)
    assert max(line.values) < 1e-4
    naive = fxzip.barrier(model, twin, X, loss=difference(model), data=[X], method="average", points=3, progress=False)
    assert naive.values[0] < 1e-4
    assert naive.values[2] < 1e-4
    assert naive.height > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnext50_32x4d", "shufflenet_v2_x1_0"])
def test_grouped_networks_align(name):
    x = torch.randn(8, 3, 32, 32, generator=G)
    model = torchvision_model(name, 1)
    wanted = model(x)
    line = fxzip.barrier(
        model, fxzip.relabel(model, x), x, data=[x], points=3, progress=False, verify=False,
        loss=lambda network: (network(x) - wanted).norm() / wanted.norm(),
    )  # fmt: skip
    assert max(line.values) < 1e-3


def test_the_ends_are_the_networks():
    a, b = randomise(Residual(4), 1), randomise(Residual(4), 2)
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    line = fxzip.barrier(a, b, X, score=value, data=[X], progress=False)
    assert line.kind == "score"
    assert len(line.points) == 11
    assert line.values[0] == pytest.approx(value(a), rel=1e-5)
    assert line.values[-1] == pytest.approx(value(b), rel=1e-5)
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("method", ["permute", "weights"])
def test_outputs_keep_their_order(method):
    """Networks that name the classes in other orders: what they return is never relabelled."""
    a, b = randomise(Residual(4), 1), randomise(Residual(4), 2)
    with torch.no_grad():
        b.linear.weight.copy_(a.linear.weight[[1, 2, 3, 0]])
        b.linear.bias.copy_(a.linear.bias[[1, 2, 3, 0]])
    wanted = b(X)
    line = fxzip.barrier(
        a, b, X, loss=lambda net: (net(X) - wanted).norm() / wanted.norm(), data=[X], method=method, points=3,
        progress=False,
    )  # fmt: skip
    assert line.values[2] < 1e-4
    assert line.values[0] > 0.1


@pytest.mark.thinned(2)
@pytest.mark.parametrize("refit", ["repair", "batchnorm"])
def test_a_refit_at_every_point(refit):
    """On the same data a refit leaves the ends as they are if their statistics were those of the data."""
    a, b = randomise(Residual(4), 1), randomise(Residual(4), 2)
    with torch.no_grad():
        for model in (a, b):
            torch.optim.swa_utils.update_bn([X], model)
            model.eval()
    plain = fxzip.barrier(a, b, X, loss=value, data=[X], points=3, progress=False)
    line = fxzip.barrier(a, b, X, loss=value, data=[X], points=3, refit=refit, progress=False)
    assert line.values[0] == pytest.approx(plain.values[0], rel=0.05)
    assert line.values[2] == pytest.approx(plain.values[2], rel=0.05)
    assert line.values[1] != pytest.approx(plain.values[1], rel=0.05)


def test_repair_gives_the_middle_its_statistics_back():
    """The features of the network in the middle have the means of the ends' deviations."""
    a, b = randomise(Residual(4), 1), randomise(Residual(4), 2)
    seen = {}

    def deviations(network):
        convolution, norm = (network.get_submodule(f"trunk.stem.{i}") for i in range(2))
        seen.setdefault("std", []).append(norm(convolution(X)).std((0, 2, 3)))
        return 0.0

    fxzip.barrier(a, b, X, loss=deviations, data=[X], points=3, refit="repair", method="average", progress=False)
    first, middle, last = seen["std"]
    torch.testing.assert_close(middle, (first + last) / 2, rtol=1e-3, atol=1e-4)


def test_several_inputs_and_outputs():
    words = torch.randint(20, (40, 3), generator=G)
    model = randomise(Mixed(), 1)
    wanted = model(X, words)

    def loss(network):
        found = network(X, words)
        return sum(float((found[key] - wanted[key]).norm()) for key in wanted)

    line = fxzip.barrier(model, fxzip.relabel(model, (X, words)), (X, words), loss=loss, data=[(X, words)], points=3,
                         progress=False)  # fmt: skip
    assert max(line.values) < 1e-2


def test_a_call_without_a_rule_does_not_end_the_line():
    class Cumulative(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(torch.fft.fft(F.relu(self.first(x))).real)

    a, b, x = Cumulative(), Cumulative(), torch.randn(30, 4)
    line = fxzip.barrier(a, b, x, loss=lambda net: net(x).square().mean(), points=3, progress=False)
    assert line.values[2] == pytest.approx(float(b(x).detach().square().mean()), rel=1e-5)


def test_the_line_is_drawn():
    line = fxzip.Barrier((0.0, 0.5, 1.0), (1.0, 4.0, 3.0), "loss")
    ax = line.plot(label="permute")
    assert list(ax.lines[0].get_ydata()) == [1.0, 4.0, 3.0]
    assert list(ax.lines[1].get_ydata()) == [1.0, 3.0]
    assert ax.get_ylabel() == "loss (less is better)"
    assert ax.get_title() == "The loss between two networks"
    assert [text.get_text() for text in ax.texts] == ["barrier 2"]
    assert line.plot(ax) is ax


@pytest.mark.parametrize(("settings", "message"), [
    ({}, "`barrier` needs either `loss` (less is better) or `score` (greater is better), a function of a network; "
     "found neither."),
    ({"loss": value, "score": value}, "found both."),
    ({"loss": value, "points": 2}, "`points` must be at least 3, with both ends; found 2."),
    ({"loss": value, "method": "zip"}, "`barrier` needs features that are paired one to one; the method does not in"),
    ({"loss": lambda network: None}, "`loss` must return a number; found `NoneType`."),
])  # fmt: skip
def test_settings_that_do_not_fit(settings, message):
    a, b = randomise(Residual(4), 1), randomise(Residual(4), 2)
    with pytest.raises((fxzip.InputError, fxzip.OptionError), match=re.escape(message)):
        fxzip.barrier(a, b, X, data=[X], progress=False, **settings)


def test_networks_without_a_line_between_them():
    with pytest.raises(fxzip.InputError, match=r"`linear.bias` has the shapes \(4,\) and \(5,\)"):
        fxzip.barrier(randomise(Residual(4)), randomise(Residual(5)), X, loss=value, progress=False)
    with pytest.raises(fxzip.InputError, match=r"the first calls `ReLU` \(`1`\), the other calls `Tanh` \(`1`\)"):
        fxzip.barrier(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
                      torch.randn(3, 4), loss=value, progress=False)  # fmt: skip

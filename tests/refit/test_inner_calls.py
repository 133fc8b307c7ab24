"""All refits see linear calls wherever they are made: in modules, in functions, inside leaf modules."""

from __future__ import annotations

import pytest
import torch
from models import randomise
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.refit import repair
from fxzip.refit.linear_calls.parameter_uses import survey
from fxzip.refit.linear_calls.units import find_units
from fxzip.tracing import quiet_execution, trace
from fxzip.tracing.aten_calls import run
from fxzip.tracing.calls import Call, as_call

close = torch.testing.assert_close


class Attended(nn.Module):
    """Attention in a leaf module, with the projections of queries, keys and values in one."""

    shape = (6, 5)

    def __init__(self, classes: int = 3, *, bias: bool = True) -> None:
        super().__init__()
        self.a, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
        self.b, self.head = nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(torch.tanh(self.b(h)).mean(1))


class Unbiased(Attended):
    """The same without biases inside."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__(classes, bias=False)


class Functional(nn.Module):
    """Linear calls that are functions of parameters."""

    shape = (5,)

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.w, self.bias = nn.Parameter(torch.zeros(8, 5)), nn.Parameter(torch.zeros(8))
        self.v, self.head = nn.Parameter(torch.zeros(8, 8)), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.w, self.bias))
        return self.head(torch.tanh(h @ self.v))


class Convolved(nn.Module):
    """A convolution that is a function, with a BatchNorm behind it, and a transposed one in groups."""

    shape = (3, 6, 6)

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.w, self.norm = nn.Parameter(torch.zeros(8, 3, 3, 3)), nn.BatchNorm2d(8)
        self.up, self.head = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(F.conv2d(x, self.w, padding=1)))
        return self.head(torch.tanh(self.up(h)).mean((2, 3)))


class Encoded(nn.Module):
    """PyTorch's own layer of a transformer."""

    shape = (4, 5)

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.a, self.layer = nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.a(x)).mean(1))


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(kind):
    return randomise(kind(3), 1).double(), randomise(kind(4), 2).double()


def repaired(a: nn.Module, b: nn.Module, x: Tensor) -> nn.Module:
    """The zip of two models by averages, repaired on all of a batch; stage by stage, since `compile_zip` holds out."""
    programs = [trace(model, x) for model in (a, b)]
    trunk = fxzip.partition.find_trunk(
        fxzip.partition.align(programs), [fxzip.analysis.label(program) for program in programs]
    )
    moments = fxzip.calibration.observe(trunk, [as_call(x)])
    plan = fxzip.rewriting.plan(trunk, moments, fxzip.matching.resolve("average"))
    return repair(fxzip.rewriting.rewrite(plan), plan, [as_call(x)])


def linear_results(module, call: Call) -> dict[tuple[str, int], Tensor]:
    """What products, with their bias, and convolutions give, features last, by node and number in it."""
    found: dict[tuple[str, int], Tensor] = {}

    def on_call(made):
        out, node = made.make(), made.node.name
        number = sum(own == node for own, _ in found)
        if made.name in ("mm", "addmm", "convolution"):
            at = 1 if made.name == "convolution" else -1
            found[node, number] = out.movedim(at, -1).flatten(0, -2).clone()
        elif made.name == "add" and number:  # a bias by itself
            found[node, number - 1] = out.flatten(0, -2).clone()
        return out

    with quiet_execution():  # attention by its parts, as the refits see it
        run(module, call, on_call=on_call)
    return found


def statistics(module, call: Call) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
    return {where: (y.mean(0), y.std(0, correction=0)) for where, y in linear_results(module, call).items()}


@pytest.mark.parametrize(("kind", "node", "calls"), [
    (Attended, "attention", 2), (Functional, "linear", 1), (Functional, "matmul", 1), (Unbiased, "attention", 2),
    (Convolved, "up", 1),
])  # fmt: skip
def test_repair_restores_the_statistics_of_calls_that_are_no_modules(kind, node, calls):
    """On one batch every call has the mean and the standard deviation that it has in the models on average, but for the
    mean where no bias can hold it."""
    a, b = pair(kind)
    x = random(32, *kind.shape)
    zipped = repaired(a, b, x)
    theirs = [statistics(trace(model, x).module, as_call(x)) for model in (a, b)]
    mine = {where: own for where, own in statistics(zipped, as_call(x)).items() if where[0] == node}
    assert len(mine) == calls
    for where, (mean, spread) in mine.items():
        if kind is not Unbiased and node != "matmul":
            close(mean, (theirs[0][where][0] + theirs[1][where][0]) / 2, rtol=1e-6, atol=1e-8)
        close(spread, (theirs[0][where][1] + theirs[1][where][1]) / 2, rtol=1e-6, atol=1e-8)


def test_regmean_fits_calls_inside_leaf_modules():
    a, b = pair(Attended)
    x = random(64, *Attended.shape)
    zipped = fxzip.compile_zip(
        a, b, x, data=[x], method="average", refit=fxzip.baselines.RegMean(1.0), hold_out=False, progress=False
    )
    inputs = [torch.tanh(model.a(x)).flatten(0, 1).detach() for model in (a, b)]
    grams = [own.T @ own for own in inputs]
    weights = [model.attention.in_proj_weight.T for model in (a, b)]
    wanted = torch.linalg.solve(sum(grams), sum(g @ w for g, w in zip(grams, weights, strict=True)))
    found = dict(zipped.named_parameters())["trunk.attention.in_proj_weight"]
    close(found, wanted.T, rtol=1e-6, atol=1e-8)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("refit", ["repair", "stored", "batchnorm", "lstsq", "regmean"])
@pytest.mark.parametrize("kind", [Attended, Functional, Convolved, Encoded])
def test_a_zip_with_a_relabelled_copy_stays_exact(kind, refit):
    """But for new statistics of BatchNorms, which both heads then see."""
    model, x = randomise(kind(), 1).double(), random(32, *kind.shape)
    copied = fxzip.relabel(model, x)
    zipped = fxzip.compile_zip(model, copied, x, data=[x], method="permute", refit=refit, progress=False)
    if kind is Convolved and refit == "batchnorm":
        first, second = zipped(x)
        close(first, second)
    else:
        close(zipped(x), (model(x), model(x)), rtol=1e-6, atol=1e-6)


def test_a_batchnorm_behind_a_function_is_found():
    """Least squares and the stored statistics then take it with the call."""
    net, x = randomise(Convolved(), 1).double(), random(4, *Convolved.shape)
    program = trace(net, x)
    units, _ = find_units(program.module, survey(program.module, program.call), set(program.module.graph.nodes))
    behind = {unit.sites[0].node.name: unit.norm.name for unit in units if unit.norm is not None}
    assert behind == {"conv2d": "norm"}

    (a, b), x = pair(Convolved), random(32, *Convolved.shape)
    plain, stored = (
        fxzip.compile_zip(a, b, x, data=[x], method="permute", refit=refit, hold_out=False, progress=False)
        for refit in (None, "stored")
    )
    assert not torch.allclose(plain(x)[0], stored(x)[0])


def test_a_batchnorm_over_another_axis_than_that_of_the_features_is_not():
    """A BatchNorm over tokens behind a linear call over features, equally many."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.head = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.norm(self.a(x))).mean(1))

    program = trace(randomise(Tokens()).double(), random(4, 6, 5))
    units, _ = find_units(program.module, survey(program.module, program.call), set(program.module.graph.nodes))
    assert all(unit.norm is None for unit in units)

"""Samples of a regression and sums over them: what is computed once, and what takes no memory."""

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn

import fxzip
from fxzip.calibration.observer import observe
from fxzip.compiler.options import Options
from fxzip.compiler.survey import survey
from fxzip.refit.least_squares.blocks import Blocks
from fxzip.refit.least_squares.inputs import Inputs
from fxzip.refit.least_squares.samples import Sampler
from fxzip.rewriting.zip_plan import plan
from fxzip.tracing.calls import as_call

QUICK = {"least": 1000, "positions": 5, "turns": 1, "rounds": 1}


class Plain(nn.Module):
    """Residual sums of what the layers give, in its own order."""

    def __init__(self, classes):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(x + self.second(x))
        return self.head(x.mean((2, 3)))


def prepared(make, sizes):
    models = randomise(make(3), 1), randomise(make(4), 2)
    trunk = survey(models, as_call(torch.randn(2, 3, 12, 12)), Options(verify=False)).trunk()
    calls = [as_call(torch.randn(size, 3, 12, 12)) for size in sizes]
    planned = plan(trunk, observe(trunk, calls[:1]), fxzip.Permute())
    return fxzip.rewriting.rewrite(planned), planned, calls


@pytest.mark.parametrize("make", [Residual, Plain])
def test_a_call_is_looked_at_once_whatever_the_sizes_of_batches(make, monkeypatch):
    """How its result reaches a sum, and that it is a product with its weight, is known from the first batch."""
    check, checks = Sampler._check, []
    monkeypatch.setattr(Sampler, "_check", lambda self, unit, *given: checks.append(unit) or check(self, unit, *given))
    arguments = prepared(make, (8, 6, 6, 5))
    result = fxzip.LeastSquares(**QUICK)(*arguments)
    fit = result.meta["fxzip_fit"]
    sites = [id(unit) for unit in checks]
    assert len(set(sites)) == len(fit.fitted) + len(fit.fitted)  # in the trial on the sample, and in the fit
    assert len(sites) == len(set(sites))

    monkeypatch.setattr(Sampler, "_route", lambda self, site, shape: self.routes.get((site, shape)))
    again = fxzip.LeastSquares(**QUICK)(*arguments)
    assert all(map(torch.equal, result.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("constant", [True, False])
def test_a_constant_is_an_input_like_others(constant):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows, 300, generator=generator, dtype=torch.float64) for rows in (40, 25)]
    other = Blocks.of([torch.randn(len(own), 3, generator=generator, dtype=torch.float64) for own in parts])
    inputs, x = Inputs(Blocks.of(parts), constant), torch.cat(parts)
    x = torch.cat([x, torch.ones(65, 1)], 1) if constant else x
    weight = torch.randn(x.shape[1], 2, generator=generator, dtype=torch.float64)
    assert torch.equal(inputs.whole(), x)
    assert inputs.width == x.shape[1]
    assert torch.allclose(inputs.gram(), x.T @ x, atol=1e-10)
    assert torch.allclose(inputs.product(other), x.T @ other.whole(), atol=1e-10)
    assert torch.allclose(inputs.outputs(weight).whole(), x @ weight, atol=1e-10)


def test_sums_of_one_pass_are_those_of_several():
    made = []
    first = Blocks.of([torch.randn(7, 5), torch.randn(4, 5)]).map(lambda own: made.append(1) or own + 1)
    second = Blocks.of([torch.randn(7, 9), torch.randn(4, 9)])
    total, gram, product = first.moments(second)
    assert len(made) == 2
    for found, expected in ((total, first.sum()), (gram, first.gram()), (product, first.product(second))):
        assert torch.allclose(found, expected, atol=1e-5)


def test_rows_are_counted_without_a_block_being_made():
    made = []
    blocks = Blocks.of([torch.zeros(3, 2), torch.zeros(2, 2)]).map(lambda own: made.append(1) or own)
    assert blocks.rows == 5
    assert blocks.map(torch.exp).stored().rows == 5
    assert len(made) == 2  # where it was stored
    assert blocks.select(lambda own: own[:1]).rows == 2

"""`until="auto"` with widths by need: cuts are compared by sketches, the best are made of all the data."""

import pytest
import torch
from models import randomise
from models.networks import Residual

import fxzip
from fxzip.calibration.holdout import hold_out, one_of, thinned
from fxzip.calibration.sources import Calibration
from fxzip.compiler import session
from fxzip.compiler.pairs import rough
from fxzip.compiler.survey import survey
from fxzip.refit import LeastSquares, repair
from fxzip.tracing import trace
from fxzip.tracing.calls import as_call

G = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 8, 8, generator=G)
DATA = [torch.randn(25, 3, 8, 8, generator=G) for _ in range(4)]
SETTINGS = {"width": "auto", "max_cost": 1.4, "budget": "flops", "progress": False, "verify": False}


@pytest.fixture(scope="module")
def pair():
    return [randomise(Residual(4), 1), randomise(Residual(5), 2)]


class Counted:
    """A refit that notes on how many inputs it was called."""

    def __init__(self):
        self.inputs = []

    def __call__(self, zipped, plan, data):
        self.inputs.append(sum(len(call.args[0]) for call in data))
        return repair(zipped, plan, data)


def test_sketches_see_a_part_of_the_data_and_the_best_are_made_of_all(pair, monkeypatch):
    monkeypatch.setattr(session, "SKETCHED", 20)
    refit = Counted()
    zipped = fxzip.compile_zip(*pair, X, data=DATA, until="auto", refit=refit, **SETTINGS)
    auto = zipped.report["auto"]
    assert refit.inputs[:-2] == [20] * len(auto["frontier"])
    assert refit.inputs[-2:] == [80] * 2

    found = survey(pair, as_call(X))
    fit, held = hold_out(Calibration.of(DATA, as_call(X), 2, False), found.alignment.programs)
    rest = [call.args[0] for call in fit("x")]
    again = fxzip.compile_zip(*pair, X, data=rest, hold_out=False, until=auto["until"], refit="repair", **SETTINGS)
    torch.testing.assert_close(zipped(X), again(X), rtol=0, atol=0)
    assert held.agreement(again) == auto["agreement"]
    assert "on a part of the data, the best 2 of them made with all of it" in str(zipped.report)


@pytest.mark.slow
def test_where_data_are_few_every_cut_sees_all_of_them(pair):
    refit = Counted()
    zipped = fxzip.compile_zip(*pair, X, data=DATA, until="auto", refit=refit, **SETTINGS)
    assert refit.inputs == [80] * len(zipped.report["auto"]["frontier"])


@pytest.mark.slow
def test_interrupted_before_any_is_made_of_all_the_best_sketch_is_given_back(pair, monkeypatch):
    monkeypatch.setattr(session, "SKETCHED", 20)

    def refit(zipped, plan, data):
        if sum(len(call.args[0]) for call in data) > 20:
            raise KeyboardInterrupt
        return repair(zipped, plan, data)

    with pytest.raises(fxzip.Interrupted) as stop:
        fxzip.compile_zip(*pair, X, data=DATA, until="auto", refit=refit, **SETTINGS)
    assert stop.value.zipped.report["auto"]["interrupted"]


@pytest.mark.parametrize("sizes", [[60], [7, 20, 33], [1] * 60])
def test_every_nth_input_however_they_come(sizes):
    x = torch.arange(60.0).reshape(60, 1)
    program = trace(torch.nn.Linear(1, 2), x[:2])
    own = Calibration.of(x.split(sizes), as_call(x[:2]), 2, False)
    part = thinned(own, [program], every=4)
    assert torch.equal(torch.cat([call.args[0] for call in part("x")]), x[one_of(torch.arange(60), 4, 0)])
    assert part.inputs == 15


def test_a_sketch_takes_half_of_the_samples_of_least_squares():
    own = LeastSquares(positions=7, least=100, ridge=0.1)
    assert rough(own) == LeastSquares(positions=3, least=50, scarce=8, ridge=0.1)
    assert rough(repair) is repair

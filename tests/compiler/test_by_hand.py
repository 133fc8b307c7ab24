"""The stages one by one, as the README shows them: the same network as `compile_zip` makes, to the bit."""

from itertools import product

import pytest
import torch
from models import randomise
from models.networks import Residual

import fxzip
from fxzip.analysis import analyse, label
from fxzip.analysis.labelling import Labelling
from fxzip.calibration import observe
from fxzip.partition import align, find_trunk
from fxzip.refit import record_statistics
from fxzip.rewriting import plan, rewrite

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WAYS, CUTS = [("energy", "lstsq"), ("zip", None), ("permute", "repair")], ["layer1", None, 0.5]
BY_DEFAULT = list(zip(WAYS, CUTS, strict=True))


@pytest.mark.parametrize(
    ("way", "until"),
    [
        pytest.param(*case, marks=() if case in BY_DEFAULT else (pytest.mark.slow, pytest.mark.hours))
        for case in product(WAYS, CUTS)
    ],
)
def test_by_hand(way, until):
    method, refit = way
    models = [randomise(Residual(classes), seed) for seed, classes in enumerate((4, 5))]
    programs = [fxzip.tracing.trace(model, X[:2]) for model in models]
    trunk = find_trunk(align(programs), [analyse(program) for program in programs], until=until)
    data = fxzip.calibration.Calibration.of([X], programs[0].call, models=2, progress=False)
    zipping = plan(trunk, observe(trunk, data("observing")), fxzip.matching.resolve(method))
    zipped = fxzip.refit.refits(refit)(rewrite(zipping), zipping, data("refitting"))
    zipped = record_statistics(zipped, data("recording statistics"))
    settings = {"method": method, "refit": refit, "until": until, "hold_out": False, "progress": False}
    whole = fxzip.compile_zip(*models, X[:2], data=[X], **settings)
    assert all(map(torch.equal, zipped(X), whole(X)))


def test_the_self_check_cannot_be_left_out(monkeypatch):
    checked = []
    import fxzip.partition.trunk as trunk

    plain = trunk.check
    monkeypatch.setattr(trunk, "check", lambda labelling: checked.append(labelling) or plain(labelling))
    programs = [fxzip.tracing.trace(randomise(Residual(4), seed), X[:2]) for seed in (0, 1)]
    labellings = [label(program) for program in programs]
    assert find_trunk(align(programs), labellings).nodes
    assert all(isinstance(one, Labelling) for one in checked)
    assert len(checked) == 2


def test_a_share_of_the_flops_is_counted_here():
    programs = [fxzip.tracing.trace(randomise(Residual(4), seed), X[:2]) for seed in (0, 1)]
    analyses = [analyse(program) for program in programs]
    sizes = [len(find_trunk(align(programs), analyses, until=share).nodes) for share in (0.1, 0.5, 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]

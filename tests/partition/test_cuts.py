"""Every node as a cut: each head gets its own features back, or that is no cut.

The oracle: a network zipped with a relabelled copy of itself is that network at both heads, wherever the trunk ends.
"""

import pytest
import torch
from models import randomise
from models.cut_networks import CUTS, sample
from torch import nn

import fxzip
from fxzip.compiler.options import Options
from fxzip.compiler.survey import survey
from fxzip.partition.node_names import cut_names
from fxzip.rewriting.zip_plan import plan
from fxzip.tracing.calls import as_call

FRACTIONS = [i / 8 for i in range(1, 9)]


def zips(models, x, cuts=None):
    """The zips by permutation alone, at every cut at which there is one; of those that share the same the first."""
    found = survey(models, as_call(x[:4]), Options(verify=False))
    calibration = fxzip.calibration.Calibration.of([x], as_call(x[:4]), len(models), False)
    done = set()
    for cut in cuts or [None, *cut_names(list(found.alignment.programs[0].module.graph.nodes)), *FRACTIONS]:
        try:
            trunk = found.trunk(cut)
        except (fxzip.CutError, fxzip.AlignError):
            continue
        if trunk.nodes not in done:
            done.add(trunk.nodes)
            try:
                yield (
                    cut,
                    fxzip.rewriting.rewrite(
                        plan(trunk, fxzip.calibration.observe(trunk, calibration("observing")), fxzip.Permute())
                    ),
                )
            except fxzip.CutError:
                continue


def furthest(zipped, model, x):
    """The largest relative error of a head on inputs that nobody has seen, in another batch size."""
    with torch.no_grad():
        wanted = model(x.clone())
        return max(float((y - wanted).abs().max() / wanted.abs().max()) for y in zipped(x.clone()))


NAMES = [name for name in CUTS if name != "block-diagonal"]
SOME = [name if not i % 3 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(NAMES)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", SOME)
def test_every_cut_gives_every_head_its_own_features(name):
    x = sample(name)
    model = randomise(CUTS[name](5), 1).double()
    twin = fxzip.relabel(model, x[:4], seed=3, verify=False)
    errors = {cut: furthest(zipped, model, x[:7] * 0.5) for cut, zipped in zips([model, twin], x)}
    assert len(errors) >= (3 if name == "experts" else 6)  # nothing of the experts can be matched
    assert {cut: error for cut, error in errors.items() if error > 1e-9} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention, fused", "attention, gated", "attention, queries", "windows"])
def test_every_fraction_lands_where_heads_get_their_own_features(name):
    x = sample(name)
    model = randomise(CUTS[name](5), 1).double()
    twin = fxzip.relabel(model, x[:4], seed=3, verify=False)
    for cut, zipped in zips([model, twin], x, [i / 40 for i in range(2, 41)]):
        assert furthest(zipped, model, x[:7] * 0.5) < 1e-9, cut


class TwoNames(nn.Module):
    """Two values that are handed to the heads, of which one is called `a` and the other `a_1`."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 12), nn.Linear(5, 3)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        wide = self.one(x).unflatten(-1, (4, 3))
        narrow = self.two(x).unsqueeze(1)
        return self.out((wide.transpose(1, 2).tanh() * narrow.transpose(1, 2)).sum(1))


def test_what_is_handed_over_is_kept_under_names_of_its_own():
    x = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = randomise(TwoNames(), 1).double()
    twin = fxzip.relabel(model, x[:4], seed=1, verify=False)
    for _, zipped in zips([model, twin], x):
        assert furthest(zipped, model, x[:9]) < 1e-9


class Interleaved(nn.Module):
    """Features lie along the batch axis, and which of them depends on the place in the batch."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        y = torch.relu(self.one(x)).reshape(-1)
        return self.two(torch.cat([y[1:], y[:1]]).tanh().reshape(-1, 4))


def test_features_that_depend_on_the_place_in_the_batch_are_not_handed_over_wrongly():
    x = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = randomise(Interleaved(), 1).double()
    twin = fxzip.relabel(model, x[:4], seed=1, verify=False)
    for _, zipped in zips([model, twin], x):
        assert furthest(zipped, model, x[:9]) < 1e-9

"""Methods and refits: every pair that the table allows works, every other is refused, and the page shows the table."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fxzip
from fxzip import analysis, calibration, partition, rewriting, tracing
from fxzip.compiler.options import Recipe
from fxzip.compiler.pairs import go_together, method_for, table_of_pairs
from fxzip.matching import ENTRIES, resolve
from fxzip.matching.registry import table_of_methods
from fxzip.refit import REFITS, refits

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def observed():
    """Two networks with and without BatchNorm behind their linear calls, up to the moments."""
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, n)).eval()
        for n in (2, 3)
    ]
    programs = [tracing.trace(model, X) for model in models]
    trunk = partition.find_trunk(partition.align(programs), [analysis.analyse(program) for program in programs])
    data = calibration.Calibration.of([X], programs[0].call, models=2, progress=False)
    return trunk, calibration.observe(trunk, data("observing")), data


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ENTRIES)
def test_what_goes_together_works_and_nothing_else(observed, name):
    if ENTRIES[name].extra:
        pytest.importorskip(ENTRIES[name].extra)
    trunk, moments, data = observed
    base = dict(trunk.alignment.programs[0].module.named_parameters())
    plan = rewriting.plan(trunk, moments, resolve(name), base={key: 0.5 * value for key, value in base.items()})

    for refit in REFITS:
        zipped = rewriting.rewrite(plan)
        if go_together(resolve(name), refits(refit)):
            assert Recipe.of(name, refit, calibrated=True).method == resolve(name)
            outputs = refits(refit)(zipped, plan, data("refitting"))(X)
            assert all(bool(y.isfinite().all()) for y in outputs)
        else:
            with pytest.raises(fxzip.OptionError, match="needs a method that pairs features one to one; found"):
                Recipe.of(name, refit, calibrated=True)
            with pytest.raises(fxzip.InputError, match="needs features that are paired one to one"):
                refits(refit)(zipped, plan, data("refitting"))


def test_a_pair_is_refused_before_anything_is_traced(monkeypatch):
    def never(*args, **options):
        raise AssertionError("traced")

    monkeypatch.setattr("fxzip.compiler.survey.trace_all", never)
    nets = [nn.Linear(4, 2), nn.Linear(4, 2)]
    message = r"`RegMean\(alpha=0.9, positions=4096\)` needs a method that pairs features one to one; found `Zip\("
    for call in (fxzip.compile_zip, fxzip.sweep, fxzip.compare):
        how = {"methods": [("zip", "regmean")]} if call is fxzip.compare else {"method": "zip", "refit": "regmean"}
        with pytest.raises(fxzip.OptionError, match=message):
            call(nets, X, data=[X], **how)


@pytest.mark.parametrize("method", [
    fxzip.baselines.Transport(entropy=0.1), fxzip.baselines.MuDSC(inner=fxzip.Zip()),
    fxzip.baselines.Recover(fxzip.Permute()),
], ids=repr)  # fmt: skip
def test_settings_decide(method):
    assert not go_together(method, fxzip.baselines.RegMean(alpha=0.5))


def test_auto_goes_with_every_refit():
    for name, refit in REFITS.items():
        assert Recipe.of("auto", name, calibrated=True).method == resolve(method_for(refit))
    nets = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, n)).eval() for n in (2, 3)]
    zipped = fxzip.compile_zip(nets, X, data=[X], refit="regmean", progress=False)
    assert zipped.report["method"] == "Permute()"


@pytest.mark.parametrize(("name", "table"), [("methods", table_of_methods()), ("pairs", table_of_pairs())])
def test_the_page_shows_the_tables_of_the_code(name, table):
    found = re.search(rf"<!-- table of {name} -->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    assert found is not None
    assert found[1] == table


def test_evidence_names_headings_of_the_results():
    headings = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    for entry in ENTRIES.values():
        assert entry.evidence.startswith("results.md, ")
        where = entry.evidence.removeprefix("results.md, ").rpartition(": ")[0]
        assert re.search(rf"^## {re.escape(where)}", headings, re.MULTILINE), entry

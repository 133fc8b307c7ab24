"""Budgets in seconds, bytes and parameters: prices, what is kept of timings, and whether the result keeps them."""

import json

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxzip
from fxzip.analysis.flops import count_flops
from fxzip.compiler import affording
from fxzip.compiler.arguments import Given
from fxzip.compiler.memory import peaks
from fxzip.compiler.options import Options, Recipe
from fxzip.compiler.progress import Display
from fxzip.compiler.session import Session
from fxzip.tracing.calls import Call
from fxzip.widths import budget, latency
from fxzip.widths.cached_seconds import CachedSeconds, cache_folder
from fxzip.widths.latency import latency_prices, multiple_of
from fxzip.widths.requests import Budget, Scaled
from fxzip.widths.resizable import resizable_spaces

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SETTINGS = {"data": [X], "hold_out": False, "progress": False}


@pytest.fixture(scope="module")
def pair():
    return [randomise(Residual(n), n) for n in (4, 5)]


def counted(run, device):
    """A clock that counts FLOPs."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, float(counter.get_total_flops())


def opened(models, **options):
    given = Given.of((models, X[:4]))
    return Session.open(given, [X], Options(hold_out=False, **options), Display(show=False))


def test_a_clock_that_counts_flops_gives_the_prices_of_flops(pair):
    """The oracle of timing at several sizes: where seconds are in proportion to FLOPs, they are at every size."""
    session = opened(pair)
    programs = session.survey.alignment.programs
    alone = {k: (trunk, resizable_spaces(trunk)) for k, trunk in session.survey.whole_trunks.items()}
    timed = latency_prices(programs, alone, CachedSeconds(), counted)
    for k, flops in enumerate(session.prices("flops")):
        assert flops
        for node, price in flops.items():
            for work in (0.3, 0.75, 1.0, 1.4, 3.0):
                assert timed[k][node].at(work) == pytest.approx(price.at(work), rel=0.12)
            assert timed[k][node].at(1.0) == pytest.approx(price.at(1.0), rel=1e-9)
        rest = timed[k].keys() - flops.keys()
        assert all(timed[k][node].at(1.0) == 0 for node in rest)


def test_what_was_timed_is_not_timed_again(pair, tmp_path):
    session = opened(pair)
    programs = session.survey.alignment.programs
    alone = {k: (trunk, resizable_spaces(trunk)) for k, trunk in session.survey.whole_trunks.items()}
    path = tmp_path / "seconds.json"
    runs = []

    def clock(run, device):
        runs.append(1)
        return run(), float(len(runs))

    first = latency_prices(programs, alone, CachedSeconds(path), clock)
    timed = len(runs)
    again = latency_prices(programs, alone, CachedSeconds.of_file(path), clock)
    warm = len(runs) - timed
    assert again == first
    assert warm < timed / 4  # one run of each network tells what its nodes call
    path.write_text("{broken")
    assert CachedSeconds.of_file(path).seconds == {}


def test_one_signature_is_timed_once():
    """Two models of one shape have the same prices but where they differ."""
    models = [randomise(Residual(n), n) for n in (4, 4)]
    session = opened(models)
    programs = session.survey.alignment.programs
    prices = latency_prices(programs, {}, CachedSeconds(), lambda run, device: (run(), torch.rand(()).item()))
    assert prices[0] == prices[1]


@pytest.mark.slow
def test_timings_are_kept_in_the_cache_folder(pair):
    fxzip.compile_zip(*pair, X[:4], width="auto", max_cost=1.3, **SETTINGS)
    files = list((cache_folder() / "seconds").glob("*.json"))
    assert files
    kept = json.loads(files[0].read_text())
    assert kept
    assert all(0 < seconds < 10 for seconds in kept.values())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("overhead", [0.0, 0.6])
def test_the_network_is_measured_and_widths_chosen_again(pair, overhead, monkeypatch):
    """Where the clock says that a network takes longer than the sum of its nodes, the limit is corrected."""

    def clock(networks, call, **_):
        one, other = (count_flops(network, call).total for network in networks)
        return [one * (1 + overhead * (one != other)), other]

    monkeypatch.setattr(affording, "fastest", clock)
    monkeypatch.setattr(latency, "_clocked", counted)
    monkeypatch.setattr(budget, "multiple_of", lambda size, device: 1)
    monkeypatch.setattr(CachedSeconds, "of", classmethod(lambda cls, device: cls()))
    found = fxzip.compile_zip(*pair, X[:4], width="auto", max_cost=1.2, **SETTINGS).report
    spent = found["budget"]
    assert spent["currency"] == "latency"
    assert spent["spent"] == pytest.approx(found.cost * (1 + overhead))
    assert 0.85 * 1.2 < spent["spent"] <= 1.2 * affording.SLACK
    assert any(note.startswith("latency: at most 1.2 times that of the first model") for note in found.notes)


@pytest.mark.slow
def test_a_budget_out_of_reach_says_what_it_is_of(pair):
    for name, noun in (("memory", "peak memory"), ("parameters", "parameters"), ("flops", "FLOPs")):
        with pytest.raises(fxzip.CostError, match=f"takes .* of the first model's {noun}"):
            fxzip.compile_zip(*pair, X[:4], width="auto", max_cost=1e-6, budget=name, **SETTINGS)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("cost", [0.7, 1.3])
def test_parameters(pair, cost):
    report = fxzip.compile_zip(*pair, X[:4], width="auto", max_cost=cost, budget="parameters", **SETTINGS).report
    numbers = report["parameters"]
    assert 0.85 * cost < numbers["total"] / numbers["originals"][0] <= cost * 1.02


@pytest.mark.thinned(2)
@pytest.mark.parametrize("cost", [0.8, 1.3])
def test_peak_memory(pair, cost):
    zipped = fxzip.compile_zip(*pair, X[:4], width="auto", max_cost=cost, budget="memory", **SETTINGS)
    found = zipped.report["memory"]
    assert found["zipped"] <= cost * affording.SLACK * found["originals"][0]
    assert found["zipped"] > 0.7 * cost * found["originals"][0]
    assert found["side_by_side"] > found["originals"][0]


class Steps(nn.Module):
    """Three values, of which two live at once at most, beside the weights and the input."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(10, 100, bias=False), nn.Linear(100, 5, bias=False)

    def forward(self, x):
        x = self.wide(x)
        x = torch.relu(x)
        return self.narrow(x)


def test_peaks_by_hand():
    weights, value, output = 4 * (10 * 100 + 100 * 5), 4 * 8 * 100, 4 * 8 * 5
    found = peaks([Steps(), Steps()], Call((torch.ones(8, 10),), {}))
    assert found.each == [weights + 2 * value] * 2
    assert found.together == 2 * weights + 2 * value + output


class Turned(Steps):
    def forward(self, x):
        return super().forward(x.t_().clone().T)


def test_networks_that_turn_their_input_have_peaks():
    found = peaks([Turned(), Turned()], Call((torch.ones(8, 10),), {}))
    assert found.each[0] == found.each[1]


def test_sizes_fill_vector_units():
    cpu = torch.device("cpu")
    sizes = [multiple_of(size, cpu) for size in (1, 3, 8, 16, 64, 512)]
    assert sizes == sorted(sizes)
    assert sizes[:2] == [1, 1]
    assert sizes[-1] in (4, 8, 16)
    assert multiple_of(512, torch.device("meta")) == 8


@pytest.mark.slow
def test_the_earliest_cut_in_reach_by_seconds(pair, monkeypatch):
    """With a clock that counts FLOPs the cut is that of a budget of FLOPs."""

    def clock(networks, call, **_):
        return [float(count_flops(network, call).total) for network in networks]

    monkeypatch.setattr(affording, "fastest", clock)
    monkeypatch.setattr(latency, "_clocked", counted)
    monkeypatch.setattr(CachedSeconds, "of", classmethod(lambda cls, device: cls()))
    settings = {**SETTINGS, "until": "auto", "max_cost": 1.5}
    found, wanted = (
        fxzip.compile_zip(*pair, X[:4], **settings, budget=name).report["auto"] for name in ("latency", "flops")
    )
    assert found["until"] == wanted["until"]
    assert found["cost"] == pytest.approx(wanted["cost"])


def test_the_recipe_of_a_budget():
    with pytest.raises(fxzip.OptionError, match="`budget` must be one of 'latency', 'flops', 'memory', 'parameters'"):
        fxzip.compile_zip(nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(2, 2), width="auto", budget="seconds")
    with pytest.raises(fxzip.OptionError, match="`budget` says what `max_cost` counts"):
        fxzip.compile_zip(nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(2, 2), budget="flops")
    assert Recipe.of("auto", "auto", calibrated=True).width.share == 1


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("whole", "kept"), [(0.98, "all"), (1.2, "few")])
@pytest.mark.slow
def test_a_choice_that_prices_misled_does_not_beat_the_whole_zip(pair, monkeypatch, whole, kept):
    """Widths that are far too small stand for prices of a busy machine."""
    right = affording.choose_widths

    def misled(observed, request, *rest, **named):
        return right(observed, Scaled(0.25) if isinstance(request, Budget) else request, *rest, **named)

    def spent(session, network, budget, **named):
        return whole if network.get_parameter("trunk.stem.0.weight").shape == pair[0].stem[0].weight.shape else 0.9

    monkeypatch.setattr(affording, "choose_widths", misled)
    monkeypatch.setattr(affording, "spent_by", spent)
    settings = {"data": [X], "progress": False, "width": "auto", "max_cost": 1.0, "budget": "latency"}
    report = fxzip.compile_zip(*pair, X[:4], **settings).report
    narrow = [space["kept"] < space["size"] for space in report["spaces"]]
    assert not any(narrow) if kept == "all" else all(narrow)
    assert report["budget"]["spent"] == (whole if kept == "all" else 0.9)
    assert any("keeps all features" in note for note in report["notes"]) == (kept == "all")

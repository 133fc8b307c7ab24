"""Whether a zip is good, as its report says it: held-out inputs, latency, warnings."""

import copy
import re
import time
import warnings
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import fxzip
from fxzip.calibration.holdout import HeldOut, hold_out, one_of
from fxzip.calibration.sources import Calibration
from fxzip.compiler import timing
from fxzip.compiler.timing import fastest
from fxzip.tracing.calls import Call, as_call

X = torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = list(X.split(32))


def pair(*classes):
    return [randomise(Residual(n), seed) for seed, n in enumerate(classes or (4, 5))]


def mlp(seed, width=6, outputs=3):
    net = nn.Sequential(
        nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, outputs),
    )  # fmt: skip
    return randomise(net, seed)


class Watching:
    """A refit that changes nothing and notes what it is given."""

    def __init__(self):
        self.passes = []

    def __call__(self, zipped, plan, data):
        for _ in range(2):
            self.passes.append(torch.cat([call.args[0] for call in data]))
        return zipped


def rows(x):
    return {tuple(row.flatten()[:6].tolist()) for row in x}


# held-out inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [BATCHES, torch.utils.data.DataLoader(X, batch_size=16, shuffle=True)])
def test_a_tenth_of_the_inputs_is_kept_out_of_all_fits(data):
    """A loader that shuffles gives another order in every pass."""
    watching = Watching()
    zipped = fxzip.compile_zip(*pair(), X[:2], data=data, method="zip", refit=watching, progress=False)
    first, second = map(rows, watching.passes)
    assert len(first) == 90
    assert first == second
    assert zipped.report["agreement"]["inputs"] == [10, 10]


def test_agreement_is_that_of_the_inputs_held_out():
    models = pair()
    zipped = fxzip.compile_zip(*models, X[:2], data=BATCHES, progress=False)
    found = zipped.report["agreement"]
    wanted = fxzip.agreement(zipped, models, X[one_of(torch.arange(100), 10, 9)])
    for head, own in zip(found["heads"], wanted.heads, strict=True):
        assert head["same_class"] == own.same_class
        assert head["relative_error"] == pytest.approx(own.relative_error, rel=1e-6)
        assert head["r_squared"] == pytest.approx(own.r_squared, rel=1e-6)
    shares = " / ".join(f"{100 * own.same_class:.1f} %" for own in wanted.heads)
    line = str(zipped.report).splitlines()[0]
    assert re.match(r"2 networks in one: \d\.\d\dx the FLOPs of one, 0\.\d\dx of both; \d+\.\d\dx the latency, ", line)
    assert line.endswith(f"; heads agree with their originals on {shares} of 10 held-out inputs")
    assert line == zipped.report.headline


def test_with_data_of_its_own_a_head_is_compared_on_that():
    sources = fxzip.PerModel([X[:60]], [X[60:]])
    found = fxzip.compile_zip(*pair(), X[:2], data=sources, method="zip", refit="repair", progress=False).report
    assert found["agreement"]["inputs"] == [6, 4]
    assert found.headline.endswith("of 6 / 4 held-out inputs")


def test_with_data_of_its_own_a_model_is_run_on_no_inputs_of_another():
    """They may be none that it takes: words of another vocabulary, say."""
    tables = [nn.Sequential(nn.Embedding(size, 4), nn.Flatten(), nn.Linear(12, 3)) for size in (5, 9)]
    words = [torch.randint(size, (40, 3), generator=torch.Generator().manual_seed(size)) for size in (5, 9)]
    programs = [fxzip.tracing.trace(model, words[0][:2]) for model in tables]
    held = HeldOut.of([(0, as_call(words[0])), (1, as_call(words[1]))], programs)
    assert [[expected is not None for expected in own] for own in held.expected] == [[True, False], [False, True]]
    assert held.inputs == (40, 40)


def test_outputs_that_are_no_classes():
    models = [mlp(seed, outputs=1) for seed in range(3)]
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    report = fxzip.compile_zip(models, x[:2], data=[x], progress=False).report
    assert all(head["same_class"] is None for head in report["agreement"]["heads"])
    assert re.search(r"x of all 3; .*; heads are off their originals by [\d. /e+%]+ \(R² ", report.headline)


def test_nothing_is_held_out_on_request():
    watching = Watching()
    zipped = fxzip.compile_zip(*pair(), X[:2], data=BATCHES, refit=watching, hold_out=False, progress=False)
    assert len(rows(watching.passes[0])) == 100
    assert zipped.report["agreement"] is None
    assert "held-out" not in zipped.report.headline


def test_models_of_one_batch_size_hold_out_one_batch_at_least():
    class OneSize(nn.Module):
        def forward(self, x):
            return x.reshape(4, 3).clone()

    x = torch.randn(4, 3)
    program = fxzip.tracing.trace(OneSize(), x)
    calibration = Calibration.of([x + i for i in range(5)], program.call, 2, False)
    rest, held = hold_out(calibration, [program, program], every=10)
    assert [float((call.args[0] - x).mean()) for _, call in held.calls] == pytest.approx([4])
    assert len(list(rest("x"))) == 4
    alone = Calibration.of([x], program.call, 2, False)
    assert hold_out(alone, [program, program], every=10) == (alone, None)


def test_inputs_that_are_alike_are_held_out_as_often_as_they_were_chosen():
    x = torch.ones(50, 3)
    program = fxzip.tracing.trace(nn.Linear(3, 2), x[:2])
    rest, held = hold_out(Calibration.of([x], as_call(x[:2]), 2, False), [program, program], every=10)
    assert held.size == 5
    assert [len(call.args[0]) for call in rest("x")] == [45]


# latency -------------------------------------------------------------------------------------------------------------


def test_latency_is_measured(monkeypatch):
    """By a clock that counts the products of convolutions, all of which are shared: what else the machine does is not
    in it."""
    now = 0.0

    def count(module, _, output):
        nonlocal now
        if isinstance(module, nn.Conv2d) and isinstance(output, torch.Tensor):
            now += output.numel() * module.weight.shape[1:].numel()

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    counting = register_module_forward_hook(count)
    try:
        report = fxzip.compile_zip(*pair(), X[:16], data=BATCHES, method="zip", refit=None, progress=False).report
    finally:
        counting.remove()
    seconds = report["latency"]
    assert seconds["side_by_side"] == sum(seconds["originals"]) > 0
    assert seconds["originals"] == [seconds["zipped"]] * 2


def test_timing_leaves_no_trace():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return x + torch.rand(1)

    net, state = Counting(), torch.get_rng_state()
    x = torch.ones(2)
    assert fastest([net], Call((x,), {}))[0] > 0
    assert net.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_no_network_is_always_timed_behind_the_same_one():
    """What ran before leaves its weights in the caches."""
    ran = []

    class Noted(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            ran.append(self.name)
            return x

    fastest([Noted(name) for name in "abc"], Call((torch.ones(2),), {}), rounds=20, seconds=60)
    for name in "abc":
        assert len({before for before, now in pairwise(ran) if now == name}) >= 2


def test_long_runs_are_timed_in_few_rounds():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.ran = 0

        def forward(self, x):
            self.ran += 1
            time.sleep(0.05)
            return x

    slow = Slow()
    assert fastest([slow], Call((torch.ones(2),), {}), rounds=20, seconds=0.01)[0] >= 0.05
    assert slow.ran == 2


# warnings ------------------------------------------------------------------------------------------------------------


def warned(*models, **settings):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        zipped = fxzip.compile_zip(list(models), torch.randn(4, 4), progress=False, **settings)
    texts = [str(w.message) for w in found if issubclass(w.category, fxzip.FxzipWarning)]
    assert set(texts) <= set(zipped.report.notes)
    return texts, zipped


def test_without_data():
    texts, _ = warned(mlp(0), mlp(1))
    assert len([text for text in texts if "no `data` was given" in text]) == 1
    assert not warned(mlp(0), mlp(1), method="weights")[0]


@pytest.mark.parametrize(("inputs", "few"), [(5, True), (50, False)])
def test_fewer_inputs_than_features(inputs, few):
    texts, _ = warned(mlp(0), mlp(1), data=[torch.randn(inputs, 4)])
    assert [("fewer than the 6 features" in text) for text in texts] == [True] * few


def test_graphs_that_diverge_early():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp(1, 16)

        def forward(self, x):
            return self.layers[2:](torch.tanh(self.layers[0](x)))

    texts, _ = warned(mlp(0, 16), Other(), data=[torch.randn(50, 4)])
    assert len(texts) == 1
    assert "since the graphs diverge: the first" in texts[0]
    assert "ReLU" in texts[0]
    assert "tanh" in texts[0]


def related():
    """Two networks that were trained on one frozen beginning."""
    first, second = mlp(0, 32), mlp(1, 32)
    second[0], second[2] = copy.deepcopy(first[0]), copy.deepcopy(first[2])
    return first, second


def test_layers_that_are_the_same_to_the_bit():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(3))
    texts, _ = warned(*related(), data=[x])
    [name] = re.findall(r"the models share their first layers, to the bit: `until='(\w+)'` is exact", " ".join(texts))
    assert name == "3"
    texts, zipped = warned(*related(), data=[x], until=name)
    assert not texts
    for found, model in zip(zipped(x), related(), strict=True):
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_a_search_takes_the_layers_that_are_the_same():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(3))
    texts, zipped = warned(*related(), data=[x], until="auto")
    assert zipped.report["auto"] == {"until": "3", "evaluations": {}}
    assert not texts
    for found, model in zip(zipped(x), related(), strict=True):
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)

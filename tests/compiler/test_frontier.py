"""`until="auto"`: the deepest cut that agrees, the earliest that is affordable; held-out inputs and agreement."""

import copy
import re
from itertools import pairwise
from math import ceil, log2

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import randomise
from models.networks import Residual, Segmenter
from torch import nn

import fxzip
from fxzip.analysis import flops
from fxzip.calibration.agreement import mean_closeness
from fxzip.calibration.holdout import HeldOut, hold_out, thinned
from fxzip.calibration.sources import Calibration
from fxzip.compiler.options import BestWithin, DeepestAgreeing, EarliestAffordable, FixedCut, cut_request
from fxzip.compiler.search import deepest
from fxzip.compiler.survey import cuts_and_trunks, survey
from fxzip.tracing import trace
from fxzip.tracing.calls import as_call

G = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 8, 8, generator=G)
DATA = [torch.randn(25, 3, 8, 8, generator=G) for _ in range(4)]


@pytest.fixture(scope="module")
def pair():
    return [randomise(Residual(4), 1), randomise(Residual(5), 2)]


@pytest.fixture(scope="module")
def relatives(pair):
    """Networks that drift apart with depth."""
    other, generator = copy.deepcopy(pair[0]), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + 0.8 * torch.randn(p.shape, generator=generator))
    return [pair[0], other]


@given(st.integers(0, 40), st.integers(-1, 39))
def test_bisection_finds_what_a_scan_finds(count, last):
    last = min(last, count - 1)
    asked = []
    assert deepest(count, lambda place: asked.append(place) or place <= last) == last
    assert len(asked) == len(set(asked)) <= 1 + ceil(log2(max(count, 1)))


# agreement -----------------------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Heads whose agreement with the originals is known."""

    def __init__(self, model, wrong, scale):
        super().__init__()
        self.model, self.wrong, self.scale = model, wrong, scale

    def forward(self, x):
        logits, image, count = self.model(x)
        first = torch.cat([-logits[: self.wrong], logits[self.wrong :]])
        return ((first, image * self.scale, count + (torch.arange(len(x)) < self.wrong)),)


class Scaled(nn.Module):
    """Logits smaller than those of the original, all else as it is."""

    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x):
        logits, image, count = self.model(x)
        return ((logits * self.scale, image, count),)


class Three(nn.Module):
    def forward(self, x):
        logits = x[:, :3]
        return logits, x[:, None], (x.sum(1) > 0).long()


def test_agreement_of_each_kind_of_output():
    model, x = Three(), torch.randn(20, 4)
    program = trace(model, x)
    held = HeldOut.of([(0, program.call)], [program])
    (whole,) = held.agreement(Shifted(model, 0, 1.0))
    assert whole == 1.0
    (found,) = held.agreement(Shifted(model, 5, 0.9))
    argmax, relative, equal = 15 / 20, 1 - 0.1, 15 / 20
    assert found == pytest.approx((argmax + relative + equal) / 3, abs=1e-6)
    (far,) = held.agreement(Shifted(model, 20, 5.0))
    assert far == 0.0
    (broken,) = held.agreement(Shifted(model, 0, float("nan")))
    assert broken == pytest.approx(2 / 3)


def test_closeness_tells_what_the_largest_value_does_not():
    """Of two heads with the same classes the one whose values are nearer is closer; of numbers their share counts."""
    model, x = Three(), torch.randn(20, 4)
    program = trace(model, x)
    held = HeldOut.of([(0, program.call)], [program])
    logits = model(x)[0]
    near, far, whole = (held.compared(Scaled(model, scale))[0] for scale in (0.9, 0.5, 1.0))
    assert near.score == far.score > 0.99
    assert whole.closeness == 1.0 > near.closeness > far.closeness
    lost = 0.25 * logits.square().mean() / logits.var(correction=0)
    assert far.closeness == pytest.approx(1 - float(lost) / 3, abs=1e-5)
    assert held.compared(Shifted(model, 20, float("nan")))[0].closeness == 0.0
    assert mean_closeness([near, far]) == pytest.approx((near.closeness + far.closeness) / 2)


def test_one_source_per_model_is_compared_with_its_own_model():
    a, b, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(8, 4)
    programs = [trace(a, x), trace(b, x)]
    both = fxzip.side_by_side([a, a], x)
    own = HeldOut.of([(0, as_call(x)), (1, as_call(x))], programs)
    assert [[e is not None for e in row] for row in own.expected] == [[True, False], [False, True]]
    assert own.agreement(both)[0] == 1.0
    assert own.agreement(both)[1] == float((a(x).argmax(1) == b(x).argmax(1)).double().mean())


def test_what_is_held_out_is_not_fitted_on():
    x = torch.arange(60.0).reshape(60, 1)
    programs = [trace(nn.Linear(1, 2), x[:2])] * 2
    for batches in ([x], x.split(7), [(part, 0) for part in x.split(20)]):
        fit, held = hold_out(Calibration.of(batches, as_call(x[:2]), 2, False), programs)
        kept = torch.cat([call.args[0] for call in fit("x")]).flatten()
        out = torch.cat([call.args[0] for _, call in held.calls]).flatten()
        assert [int(v) // 5 for v in out.tolist()] == list(range(12))
        assert held.size == 12
        assert sorted([*kept.tolist(), *out.tolist()]) == x.flatten().tolist()


def test_inputs_of_tasks_that_come_by_turns_are_held_out_alike():
    x = torch.arange(600.0)[:, None]
    programs = [trace(nn.Linear(1, 2), x[:2])] * 2
    for every, tasks in ((10, 2), (5, 5), (4, 2)):
        calibration = Calibration.of(x.split(50), as_call(x[:2]), 2, False)
        _, held = hold_out(calibration, programs, every=every)
        out = torch.cat([call.args[0] for _, call in held.calls]).flatten()
        part = thinned(calibration, programs, every=every)
        kept = torch.cat([call.args[0] for call in part("x")]).flatten()
        for chosen in (out, kept):
            assert len(chosen) == 600 // every
            shares = torch.bincount(chosen.long() % tasks, minlength=tasks) / len(chosen)
            assert 0.5 / tasks < shares.min()
            assert shares.max() < 1.7 / tasks


def test_a_shuffling_loader_is_read_once():
    x = torch.arange(60.0).reshape(60, 1)
    loader = torch.utils.data.DataLoader(x, batch_size=8, shuffle=True)
    fit, held = hold_out(Calibration.of(loader, as_call(x[:2]), 2, False), [trace(nn.Linear(1, 2), x[:2])] * 2)
    out = {float(v) for _, call in held.calls for v in call.args[0]}
    for _ in range(2):
        kept = {float(v) for call in fit("x") for v in call.args[0]}
        assert not kept & out
        assert len(kept | out) == 60


class OneSize(nn.Module):
    def forward(self, x):
        return x.reshape(4, 3).clone()


def test_models_of_one_batch_size_hold_out_whole_batches():
    x = torch.randn(4, 3)
    program = trace(OneSize(), x)
    assert not program.batch_axes
    data = [x + i for i in range(15)]
    fit, held = hold_out(Calibration.of(data, program.call, 2, False), [program, program])
    assert [len(call.args[0]) for _, call in held.calls] == [4, 4, 4]
    assert [float((call.args[0] - x).mean()) for _, call in held.calls] == pytest.approx([4, 7, 11])
    assert len(list(fit("x"))) == 12


def test_too_little_data_to_hold_out(pair):
    text = re.escape(
        '`until="auto"` holds out one of every 5 inputs of `data` and measures agreement on at least 10; found 4 of '
        "20. Pass at least 50 inputs."
    )
    with pytest.raises(fxzip.DataError, match=text):
        fxzip.compile_zip(*pair, X, data=[DATA[0][:20]], until="auto", progress=False)
    with pytest.raises(fxzip.DataError, match="found 0 of 2"):
        fxzip.compile_zip(*pair, X, until="auto", progress=False)


# cuts ----------------------------------------------------------------------------------------------------------------


def test_cuts_are_nested_named_and_priced(pair):
    found = survey(pair, as_call(X))
    cuts, trunks = cuts_and_trunks(found)
    assert [cut.until for cut in cuts] == [
        "stem", "layer1_0_relu", "layer1.0", "layer1_1_relu", "layer1", "layer2_0_relu", "layer2.0.bn2", "layer2.0",
        "layer2_1_relu", None,
    ]  # fmt: skip
    for small, large in pairwise(trunks):
        assert set(small.nodes) < set(large.nodes)
    assert [cut.cost for cut in cuts] == sorted((cut.cost for cut in cuts), reverse=True)
    for cut in cuts[::3]:
        flops = fxzip.compile_zip(*pair, X, until=cut.until, verify=False, progress=False).report["flops"]
        assert cut.cost == pytest.approx(flops["total"] / flops["originals"][0], rel=1e-9)
    assert {cut.until: cut.crossing for cut in cuts}["layer1"] == 1
    assert {cut.until: cut.crossing for cut in cuts}["layer2_0_relu"] == 2


def test_few_cuts_are_spread_over_the_cost(pair):
    cuts, _ = cuts_and_trunks(survey(pair, as_call(X)), limit=5)
    assert [cut.until for cut in cuts] == ["stem", "layer1.0", "layer1", "layer2.0", None]
    assert len(cuts_and_trunks(survey(pair, as_call(X)), limit=8)[0]) == 8


# the search ----------------------------------------------------------------------------------------------------------


def test_a_twin_is_shared_to_the_heads(pair):
    model = pair[0]
    zipped = fxzip.compile_zip(
        model, fxzip.relabel(model, X), X, data=DATA, method="permute", until="auto", progress=False
    )
    auto = zipped.report["auto"]
    assert auto["until"] is None
    assert auto["agreement"] == (1.0, 1.0)
    assert auto["evaluations"] == {None: 1.0}
    assert auto["held_out"] == 20


def test_the_deepest_cut_that_agrees(relatives):
    """The next deeper cut does not agree, and the zip is that of a fixed `until` without the held-out inputs."""
    pair, minimum = relatives, 0.62
    settings = {"method": "permute", "refit": "repair", "progress": False}
    zipped = fxzip.compile_zip(*pair, X, data=DATA, until="auto", min_agreement=minimum, **settings)
    auto = zipped.report["auto"]
    found = survey(pair, as_call(X))
    cuts, _ = cuts_and_trunks(found)
    names = [cut.until for cut in cuts]
    assert auto["until"] in names[:-1]
    assert min(auto["agreement"]) >= minimum
    assert len(auto["evaluations"]) <= 1 + ceil(log2(len(cuts)))
    place = names.index(auto["until"])
    assert auto["evaluations"][names[place + 1]] < minimum
    fit, held = hold_out(Calibration.of(DATA, as_call(X), 2, False), found.alignment.programs)
    again = fxzip.compile_zip(
        *pair, X, data=[c.args[0] for c in fit("x")], hold_out=False, until=auto["until"], **settings
    )
    torch.testing.assert_close(zipped(X), again(X), rtol=0, atol=0)
    assert held.agreement(again) == auto["agreement"]
    assert f"chose {auto['until']!r} of {len(cuts)} cuts" in str(zipped.report)


@pytest.mark.slow
def test_nothing_agrees(pair):
    text = (
        '`until="auto"` needs a cut whose heads all agree with the originals on 1.0 of the held-out inputs; the '
        "earliest of 10, 'stem', reaches 0"
    )
    with pytest.raises(fxzip.CutError, match=re.escape(text)):
        fxzip.compile_zip(*pair, X, data=DATA, method="average", until="auto", min_agreement=1.0, progress=False)


@pytest.mark.slow
def test_max_cost_takes_the_earliest_cut_in_reach(pair):
    found = survey(pair, as_call(X))
    cuts, _ = cuts_and_trunks(found)
    for limit in (1.5, 1.2):
        zipped = fxzip.compile_zip(*pair, X, data=DATA, until="auto", max_cost=limit, budget="flops", progress=False)
        flops = zipped.report["flops"]
        assert flops["total"] / flops["originals"][0] <= limit
        place = [cut.until for cut in cuts].index(zipped.report["auto"]["until"])
        assert cuts[place - 1].cost > limit
    with pytest.raises(
        fxzip.CutError, match=r"`max_cost=0\.5` must be in reach; .* has 1\.0.* times the FLOPs of the first"
    ):
        fxzip.compile_zip(*pair, X, data=DATA, until="auto", max_cost=0.5, budget="flops", progress=False)


@pytest.mark.slow
@pytest.mark.hours
def test_best_of_some_cuts_at_a_cost(pair):
    """With widths by need: no cut that was tried is closer, and the zip is that of the cut given by hand."""
    settings = {"width": "auto", "max_cost": 1.4, "budget": "flops", "refit": "repair", "progress": False}
    zipped = fxzip.compile_zip(*pair, X, data=DATA, until="auto", **settings)
    auto, flops = zipped.report["auto"], zipped.report["flops"]
    assert 1.2 < flops["total"] / flops["originals"][0] <= 1.4
    assert auto["cost"] == pytest.approx(flops["total"] / flops["originals"][0])
    found = survey(pair, as_call(X))
    fit, held = hold_out(Calibration.of(DATA, as_call(X), 2, False), found.alignment.programs)
    rest = [c.args[0] for c in fit("x")]
    assert 3 <= len(auto["evaluations"]) <= 8
    closeness = {}
    for until in auto["evaluations"]:
        again = fxzip.compile_zip(*pair, X, data=rest, hold_out=False, until=until, **settings)
        closeness[until] = mean_closeness(held.compared(again))
        if until == auto["until"]:
            assert held.agreement(again) == auto["agreement"]
            torch.testing.assert_close(zipped(X), again(X), rtol=0, atol=0)
    assert closeness[auto["until"]] == max(closeness.values())
    assert len(set(closeness.values())) > 1
    with pytest.raises(
        fxzip.CutError, match=r"`max_cost=0\.001` must be in reach; what has to keep its size takes more"
    ):
        fxzip.compile_zip(*pair, X, data=DATA, until="auto", **(settings | {"max_cost": 0.001}))


def doubled(seed):
    """A network of 8 hidden features, each of which it computes twice."""
    generator = torch.Generator().manual_seed(seed)
    first, second, third = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)
    with torch.no_grad():
        for layer in (first, second):
            layer.weight[:8] = torch.randn(8, layer.in_features, generator=generator) / layer.in_features**0.5
            layer.weight[8:], layer.bias[8:] = layer.weight[:8], layer.bias[:8]
        third.weight.copy_(torch.randn(4, 16, generator=generator))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third).eval()


def test_where_sharing_does_not_pay_each_network_is_narrowed():
    """Two networks at half the features are exact at half the cost; a trunk for both needs all of them."""
    models, x = [doubled(1), doubled(2)], torch.randn(400, 12, generator=torch.Generator().manual_seed(5))
    settings = {"data": [x], "width": "auto", "max_cost": 0.8, "budget": "flops", "progress": False}
    zipped = fxzip.compile_zip(*models, x[:4], until="auto", **settings)
    assert zipped.report["auto"]["until"] == 0
    assert zipped.report["flops"]["trunk"] == 0
    assert zipped.report.cost <= 0.8
    fresh = torch.randn(100, 12, generator=torch.Generator().manual_seed(6))
    for model, own in zip(models, zipped(fresh), strict=True):
        torch.testing.assert_close(own, model(fresh), rtol=1e-2, atol=1e-2)
    assert "chose no trunk of" in str(zipped.report)


@pytest.mark.parametrize("refit", ["lstsq", "repair", None])
@pytest.mark.thinned(3)
def test_nothing_is_shared_where_that_is_asked_for(pair, refit):
    zipped = fxzip.compile_zip(*pair, X, data=DATA, until=0, refit=refit, progress=False)
    for model, own in zip(pair, zipped(DATA[0]), strict=True):
        torch.testing.assert_close(own, model(DATA[0]), rtol=1e-4, atol=1e-5)
    assert zipped.report["spaces"] == zipped.report["cut"]["after"] == []
    assert "nothing is shared" in str(zipped.report)
    assert "saves none" in str(zipped.report)


def test_without_a_trunk_there_is_no_start(pair):
    with pytest.raises(fxzip.CutError, match="`until=0` shares nothing, but features behind `start` are merged"):
        fxzip.compile_zip(*pair, X, data=DATA, until=0, start="layer1", progress=False)


def test_heads_of_another_kind():
    models = [randomise(Residual(4), 1), randomise(Segmenter(5), 2)]
    zipped = fxzip.compile_zip(*models, X, data=DATA, until="auto", min_agreement=0.6, progress=False)
    assert min(zipped.report["auto"]["agreement"]) >= 0.6


@pytest.mark.parametrize(("settings", "message"), [
    ({"until": "layer1", "min_agreement": 0.9}, '`min_agreement=0.9` must go with `until="auto"`, which looks for a '
     "cut; found `until='layer1'`, a fixed one. Leave one of them out."),
    ({"min_agreement": 0.9, "max_cost": 1.2}, '`min_agreement=0.9` and `max_cost=1.2` must go with `until="auto"`'),
    ({"until": "auto", "min_agreement": 0.9, "max_cost": 1.2}, '`until="auto"` takes one goal: '),
    ({"until": "auto", "min_agreement": 98}, "`min_agreement` must lie in (0, 1]; found 98. Try 0.98."),
    ({"until": "auto", "max_cost": 0.0}, "`max_cost` must be positive"),
    ({"until": "auto", "width": "auto"}, '`until="auto"` with `width="auto"` needs `max_cost`: what the zip may take '
     "wherever the trunk ends; found no goal. Try `max_cost=1.3`, or leave `width` out."),
    ({"until": "auto", "width": "auto", "min_agreement": 0.9}, "found `min_agreement=0.9`. Try `max_cost=1.3`"),
])  # fmt: skip
def test_goals_that_contradict(pair, settings, message):
    with pytest.raises(fxzip.OptionError, match=re.escape(message)):
        fxzip.compile_zip(*pair, X, data=DATA, progress=False, **settings)


def test_goals_by_default():
    assert cut_request(None, None, None, by_need=False) == FixedCut()
    assert cut_request("auto", None, None, by_need=False) == DeepestAgreeing(0.98)
    assert cut_request("auto", None, 1.3, by_need=False) == EarliestAffordable(1.3)
    assert cut_request("auto", None, 1.3, by_need=True) == BestWithin(1.3)
    assert cut_request("layer1", None, 1.3, by_need=True) == FixedCut("layer1")


@pytest.mark.slow
def test_flops_of_each_model_are_counted_once(pair, monkeypatch):
    counted, original = [], flops.count_flops
    monkeypatch.setattr(flops, "count_flops", lambda module, call: (counted.append(module), original(module, call))[1])
    options = {"until": "auto", "width": "auto", "max_cost": 1.0, "budget": "flops"}
    zipped = fxzip.compile_zip(*pair, X, data=DATA, progress=False, **options)
    assert len(counted) == 2
    assert len(zipped.report["flops"]["originals"]) == 2

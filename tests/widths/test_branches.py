"""Heads that keep fewer features than their models had."""

import copy

import pytest
import torch
from models import randomise
from models.networks import Residual
from models.random_networks import random_network
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.calibration.observer import observe
from fxzip.compiler.survey import survey
from fxzip.matching import Merge
from fxzip.rewriting.zip_plan import planned
from fxzip.tracing.calls import as_call
from fxzip.widths.narrow_heads import behind, narrowed
from fxzip.widths.observed import Observed
from fxzip.widths.resizable import stiff_spaces

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def copies(size, more, generator):
    """So many features copied, and each read from one of its two places at random."""
    chosen = torch.randperm(size, generator=generator)[:more]
    merge = torch.eye(size, dtype=torch.float64)[torch.cat([torch.arange(size), chosen])]
    place = torch.arange(size)
    moved = torch.rand(more, generator=generator) < 0.5
    place[chosen[moved]] = size + moved.nonzero().flatten()
    return Merge(merge, torch.eye(size + more, dtype=torch.float64)[place], (size,), 1.0)


class Stages(nn.Module):
    """A stem; then a convolution with BatchNorm, a depthwise one, a residual block, and linear calls."""

    def __init__(self, classes, inner=6):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.conv = nn.Conv2d(6, inner, 3)
        self.norm = nn.BatchNorm2d(inner)
        self.depth = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.project = nn.Conv2d(inner, 6, 1)
        self.hidden = nn.Linear(6 * 16, inner)
        self.head = nn.Linear(inner, classes)

    def forward(self, x):
        x = F.relu(self.stem(x))
        skip = x[:, :, 1:-1, 1:-1]
        x = skip + self.project(F.relu(self.depth(F.relu(self.norm(self.conv(x))))))
        return self.head(F.relu(self.hidden(torch.flatten(F.relu(x), 1))))


def with_twins(narrow, generator):
    """`Stages` of 9 inner features, three of each inner layer copies of others; the function of `narrow`."""
    wide = randomise(Stages(narrow.head.out_features, 9)).double()
    tensors = {name: value.clone() for name, value in narrow.state_dict().items()}
    for first, readers in ((("conv", "norm", "depth"), "project"), (("hidden",), "head")):
        source = torch.cat([torch.arange(6), torch.randperm(6, generator=generator)[:3]])
        order = torch.randperm(9, generator=generator)
        source = source[order]
        for layer in first:
            for name in [n for n in tensors if n.startswith(layer + ".") and tensors[n].ndim]:
                tensors[name] = tensors[name][source]
        weight = tensors[f"{readers}.weight"]
        times = torch.bincount(source, minlength=6)
        tensors[f"{readers}.weight"] = weight[:, source] / times[source].reshape(1, -1, *[1] * (weight.ndim - 2))
    wide.load_state_dict(tensors)
    return wide


def twins(*classes):
    generator = torch.Generator().manual_seed(1)
    narrow = [randomise(Stages(n), seed).double() for seed, n in enumerate(classes)]
    return narrow, [with_twins(model, generator) for model in narrow]


def relative(found, wanted):
    return float(((found - wanted).norm() / wanted.norm()).detach())


def alone_of(found, k=0):
    trunk = found.whole_trunks[k]
    return Observed(trunk, observe(trunk, [as_call(X)]))


def names_behind(found, until, k=0):
    own = alone_of(found, k)
    return {own.trunk.spaces[0].spaces[s].name for s in behind(found.trunk(until), k, own.trunk)}


def test_the_networks_with_twins_compute_the_same():
    for narrow, wide in zip(*twins(4, 5), strict=True):
        assert relative(wide(X), narrow(X)) < 1e-12


@pytest.mark.parametrize("method", ["zip", "energy", "permute"])
def test_heads_without_their_redundant_features_compute_the_same(method):
    """The oracle: what a model has twice it may have once, without any refit."""
    models = twins(4, 5)[1]
    found = survey(models, as_call(X[:2]))
    trunk = found.trunk("stem")
    zipping = fxzip.rewriting.plan(trunk, observe(trunk, [as_call(X)]), fxzip.matching.resolve(method), {0: 12})
    own = {k: alone_of(found, k) for k in range(2)}
    kept = {k: {s: 6 for s in behind(trunk, k, one.trunk) if one.trunk.sizes(s) == (9,)} for k, one in own.items()}
    assert [len(sizes) for sizes in kept.values()] == [2, 2]
    zipped = fxzip.rewriting.rewrite(narrowed(zipping, own, kept, fxzip.matching.resolve(method)))
    for k in range(2):
        head = zipped.get_submodule(f"head_{k}")
        assert head.conv.weight.shape[0] == head.depth.groups == head.project.in_channels == head.norm.num_features == 6
        assert (head.hidden.out_features, head.head.in_features) == (6, 6)
    with torch.no_grad():
        assert max(relative(y, model(X)) for y, model in zip(zipped(X), models, strict=True)) < 1e-9


def test_by_need_heads_give_up_what_they_have_twice_first():
    models = twins(4, 5)[1]
    zipped = fxzip.compile_zip(
        *models, X[:2], data=[X], until="stem", width="auto", max_cost=1.55, budget="flops", hold_out=False
    )
    flops = zipped.report["flops"]
    assert flops["total"] <= 1.55 * flops["originals"][0]
    assert {own["name"] for head in zipped.report["narrowed"] for own in head} <= {"conv.weight", "hidden.weight"}
    assert all(own["kept"] < own["size"] for head in zipped.report["narrowed"] for own in head)
    with torch.no_grad():
        assert max(relative(y, model(X)) for y, model in zip(zipped(X), models, strict=True)) < 1e-3
    assert "head 0: conv.weight" in str(zipped.report)


@pytest.mark.parametrize("until", ["stem", "norm", "hidden", None])
def test_only_spaces_wholly_behind_the_cut_are_narrowed(until):
    found = survey([randomise(Stages(n), n).double() for n in (4, 5)], as_call(X[:2]))
    wanted = {"stem": {"conv.weight", "hidden.weight"}, "norm": {"hidden.weight"}, "hidden": set(), None: set()}
    assert names_behind(found, until) == wanted[until]


def test_features_beside_those_of_the_trunk_are_not_narrowed():
    class Between(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.first, self.second = nn.Linear(192, 8), nn.Linear(8, 7)
            self.third, self.head = nn.Linear(15, 6), nn.Linear(6, classes)

        def forward(self, x):
            x = F.relu(self.first(torch.flatten(x, 1)))
            x = torch.cat([x, F.relu(self.second(x))], 1)
            return self.head(F.relu(self.third(x)))

    models = [randomise(Between(n), n).double() for n in (4, 5)]
    assert names_behind(survey(models, as_call(X[:2])), "first") == {"third.weight"}
    zipped = fxzip.compile_zip(*models, X[:2], data=[X], until="first", width="auto", max_cost=1.2, budget="flops")
    assert [tuple(y.shape) for y in zipped(X[:3])] == [(3, 4), (3, 5)]


def test_a_layer_of_both_trunk_and_head_is_not_narrowed():
    class Shared(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 9)
            self.head = nn.Linear(9, classes)

        def forward(self, x):
            x = torch.tanh(self.again(torch.tanh(self.first(torch.flatten(x, 1)))))
            return self.head(torch.tanh(self.last(torch.tanh(self.again(x)))))

    found = survey([randomise(Shared(n), n).double() for n in (4, 5)], as_call(X[:2]))
    assert names_behind(found, "again") == {"last.weight"}


def test_a_size_that_is_written_into_the_code_of_a_head_stays():
    class Written(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(192, 8), nn.Linear(8, 12), nn.Linear(12, 14)
            self.head = nn.Linear(14, classes)

        def forward(self, x):
            x = F.relu(self.second(F.relu(self.first(torch.flatten(x, 1))))).view(-1, 12)
            return self.head(F.relu(self.third(x)))

    models = [randomise(Written(n), n).double() for n in (4, 5)]
    report = fxzip.compile_zip(
        *models, X[:2], data=[X], until="first", width="auto", max_cost=1.1, budget="flops"
    ).report
    assert sum("`second.weight` in head" in note for note in report["notes"]) == 2
    assert all(own["name"] == "third.weight" for head in report["narrowed"] for own in head)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["energy", "zip", "agglomerative", "average", "weights", "recover+zip"])
def test_every_method_leaves_narrow_heads_that_work(method):
    method = fxzip.baselines.Recover(fxzip.Zip()) if method == "recover+zip" else method
    models = [randomise(Residual(n), n).double() for n in (4, 5)]
    keeps = method in ("average", "weights")
    width = {} if keeps else {"width": "auto", "max_cost": 1.2, "budget": "flops"}
    zipped = fxzip.compile_zip(*models, X[:2], data=[X], until="layer1", method=method, refit="lstsq", **width)
    assert any(zipped.report["narrowed"]) != keeps
    single = copy.deepcopy(zipped).single(1)
    assert torch.allclose(single(X[:3]), zipped(X[:3])[1])


def test_without_least_squares_heads_stay_as_they_are():
    models = [randomise(Residual(n), n).double() for n in (4, 5)]
    settings = {"data": [X], "until": "layer1", "width": "auto", "max_cost": 1.4, "budget": "flops"}
    for refit in ("repair", None):
        zipped = fxzip.compile_zip(*models, X[:2], refit=refit, **settings)
        assert zipped.report["narrowed"] == [[], []]
        head = zipped.get_submodule("head_0.layer2.1").state_dict()
        state = models[0].layer2[1].state_dict()
        assert {name: value.shape for name, value in head.items()} == {n: v.shape for n, v in state.items()}
        kept = {
            name: value for name, value in head.items() if "bn" not in name
        }  # those get the statistics of what they read
        assert kept
        assert refit or all(torch.equal(value, state[name]) for name, value in kept.items())


@pytest.mark.slow
@pytest.mark.hours
def test_three_models_data_per_model_and_a_cut_that_is_looked_for():
    models = [randomise(Residual(n), n).double() for n in (4, 5, 3)]
    data = fxzip.PerModel(*([X + 0.1 * i] for i in range(3)))
    zipped = fxzip.compile_zip(models, X[:2], data=data, until="auto", width="auto", max_cost=1.2, budget="flops")
    flops = zipped.report["flops"]
    assert flops["total"] <= 1.2 * flops["originals"][0]
    assert [tuple(y.shape) for y in zipped(X[:3])] == [(3, 4), (3, 5), (3, 3)]


@pytest.mark.slow
def test_narrow_heads_lose_less_than_a_narrow_trunk():
    """At one cost, with models that have nothing in common but much in themselves."""
    models = twins(4, 5)[1]
    held = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(9)).double()

    def lost(until):
        zipped = fxzip.compile_zip(*models, X[:2], data=[X], until=until, width="auto", max_cost=1.3, budget="flops")
        with torch.no_grad():
            return sum(relative(y, model(held)) for y, model in zip(zipped(held), models, strict=True))

    assert lost("stem") < lost(None)


@pytest.mark.slow
def test_networks_with_nearly_everything_in_common_share_it():
    """The other end: fine-tunes of one network, for which a deep trunk is best at the cost of one."""
    first = randomise(Residual(4), 4).double()
    second, generator = copy.deepcopy(first), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(1 + 0.01 * torch.randn(p.shape, generator=generator))
    report = fxzip.compile_zip(
        first, second, X[:2], data=[X, X.flip(-1)], until="auto", width="auto", max_cost=1.05, budget="flops"
    ).report
    assert report["flops"]["trunk"] > 0.9 * report["flops"]["total"]
    assert min(report["auto"]["agreement"]) > 0.9


def widened(model, sample, seed):
    """The same function with copies of features wherever the number of features is free; and the sizes that were."""
    found = survey([model], as_call(sample))
    own, generator = found.whole_trunks.get(0), torch.Generator().manual_seed(seed)
    if own is None:
        return None
    spaces = own.spaces[0].spaces
    able = [s for s, space in enumerate(spaces) if space.legality == "free" and space.tie is None]
    wide = set(able) - set(stiff_spaces(own, able))
    merges = {
        s: copies(space.size, -(-space.size // 4) if s in wide else 0, generator) for s, space in enumerate(spaces)
    }
    network = fxzip.rewriting.rewrite(planned(own, merges, own.reach, kept={s: merges[s].size for s in wide})).single(0)
    return network, {(spaces[s].name, nth(spaces, s)): spaces[s].size for s in wide}


def nth(spaces, number):
    """Parts of one axis have one name."""
    return sum(other.name == spaces[number].name for other in spaces[:number])


def check_that_narrowing_takes_out_what_widening_put_in(seed):
    """Returns how many spaces were narrowed."""
    pair = [randomise(random_network(seed)[0], 2 * seed + k).double() for k in range(2)]
    x = torch.randn(256, 2, 6, generator=torch.Generator().manual_seed(seed)).double()
    wide = [widened(model, x[:2], seed + k) for k, model in enumerate(pair)]
    if None in wide:
        return 0
    models, sizes = zip(*wide, strict=True)
    assert max(relative(a(x), b(x)) for a, b in zip(pair, models, strict=True)) < 1e-9
    found = survey(models, as_call(x[:2]))
    trunk = found.trunk(next(n for n in found.alignment.pairs if "stem" in n))
    own, kept = {}, {}
    for k, alone in found.whole_trunks.items():
        own[k] = Observed(alone, observe(alone, [as_call(x)]))
        spaces = alone.spaces[0].spaces
        names = {s: (spaces[s].name.removeprefix("trunk."), nth(spaces, s)) for s in behind(trunk, k, alone)}
        alive = {s for s, seen in own[k].moments.items() if seen.alive.all()}  # the dead go with any others
        kept[k] = {s: sizes[k][name] for s, name in names.items() if name in sizes[k] and s in alive}
    statistics = observe(trunk, [as_call(x)])
    able = [s for s in statistics if trunk.spaces[0].spaces[s].legality == "free"]
    if stiff_spaces(trunk, able):  # then the trunk has no room for the features of both
        return 0
    both = {s: sum(statistics[s].sizes) for s in able}
    zipping = fxzip.rewriting.plan(trunk, statistics, fxzip.Energy(), both)
    zipped = fxzip.rewriting.rewrite(narrowed(zipping, own, kept, fxzip.Energy()))
    with torch.no_grad():
        lost = max(relative(y, model(x)) for y, model in zip(zipped(x), pair, strict=True))
    assert lost < 1e-6, (seed, lost)
    return sum(map(len, kept.values()))


@pytest.mark.slow
def test_narrowing_takes_out_what_widening_put_in():
    assert sum(check_that_narrowing_takes_out_what_widening_put_in(seed) for seed in range(12)) > 12


@pytest.mark.hours
@pytest.mark.slow
@pytest.mark.parametrize("block", range(4))
def test_narrowing_takes_out_what_widening_put_in_in_many_networks(block):
    assert sum(check_that_narrowing_takes_out_what_widening_put_in(seed) for seed in range(25 * block, 25 * block + 25))


class Beside(nn.Module):
    """A head whose last layer reads features of its own beside those of the trunk."""

    def __init__(self, classes, convolutional=False):
        super().__init__()
        self.convolutional = convolutional
        build = (lambda *sizes: nn.Conv2d(*sizes, 1)) if convolutional else nn.Linear
        self.first, self.second, self.third = build(3, 16), build(16, 20), build(20, 18)
        self.head = build(34, classes)

    def forward(self, x):
        x = F.relu(self.first(x if self.convolutional else x.mean((2, 3))))
        return self.head(torch.cat([x, F.relu(self.third(F.relu(self.second(x))))], 1))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("until", ["first", "auto"])
@pytest.mark.parametrize("convolutional", [False, True])
def test_features_that_the_last_layer_reads_beside_those_of_the_trunk(convolutional, until):
    models = [randomise(Beside(n, convolutional), n).double() for n in (4, 5)]
    settings = {"data": [X, X.flip(-1)], "until": until, "width": "auto", "budget": "flops"}
    zipped = fxzip.compile_zip(*models, X[:2], max_cost=1.3, **settings)
    inner = {"second.weight"} if zipped.report["spaces"] else {"first.weight", "second.weight", "third.weight"}
    assert {own["name"] for head in zipped.report["narrowed"] for own in head} <= inner
    assert zipped.report["flops"]["total"] <= 1.3 * zipped.report["flops"]["originals"][0]
    exact = fxzip.compile_zip(*models, X[:2], max_cost=9.0, **settings)
    with torch.no_grad():
        assert max(relative(y, model(X)) for y, model in zip(exact(X), models, strict=True)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("until", ["layer1", None])
def test_half_precision(dtype, until):
    models = [randomise(Residual(n), n).to(dtype) for n in (4, 5)]
    x = X.to(dtype)
    zipped = fxzip.compile_zip(*models, x[:2], data=[x], until=until, width="auto", max_cost=1.4, budget="flops")
    with torch.no_grad():
        assert all(y.dtype == dtype and bool(y.isfinite().all()) for y in zipped(x))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("cost", [0.9, 1.2, 1.6, 2.2])
@pytest.mark.parametrize("widths", [((16, 20), (12, 26)), ((12, 20), (16, 20))])
def test_models_of_unlike_widths_take_what_they_may(widths, cost):
    class Net(nn.Module):
        def __init__(self, classes, first, second):
            super().__init__()
            self.c1, self.c2 = nn.Conv2d(3, first, 3), nn.Conv2d(first, second, 3)
            self.c3, self.head = nn.Conv2d(second, 12, 3), nn.Linear(12, classes)

        def forward(self, x):
            return self.head(F.relu(self.c3(F.relu(self.c2(F.relu(self.c1(x)))))).mean((2, 3)))

    models = [randomise(Net(n, *sizes), n).double() for n, sizes in zip((4, 5), widths, strict=True)]
    zipped = fxzip.compile_zip(*models, X[:2], data=[X], until="c1", width="auto", max_cost=cost, budget="flops")
    flops = zipped.report["flops"]
    assert min(0.9 * cost, 1.5) < flops["total"] / flops["originals"][0] <= cost
    assert [tuple(y.shape) for y in zipped(X[:3])] == [(3, 4), (3, 5)]


def test_spaces_seen_at_hardly_any_positions_keep_their_size():
    models = [randomise(Stages(n), n).double() for n in (4, 5)]
    few = fxzip.compile_zip(
        *models, X[:2], data=[X[:2]], until="stem", width="auto", max_cost=1.9, budget="flops"
    ).report
    assert all(own["name"] != "hidden.weight" for head in few["narrowed"] for own in head)
    assert any("`hidden.weight` in head 0 keeps its 6 features: it was not observed" in note for note in few["notes"])

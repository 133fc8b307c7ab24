"""Elastic width: spaces of the trunk that keep more or fewer features than the first model has."""

import pytest
import torch
from models import randomise
from models.networks import Mixed, Residual
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.analysis.resizing import IrregularLayoutError, resized
from fxzip.analysis.spaces import Layout
from fxzip.widths.choose import overspent
from fxzip.widths.requests import Budget
from fxzip.widths.resizable import stiff_spaces

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Perceptron(nn.Module):
    """Flattens an image between a convolution and linear calls."""

    def __init__(self, classes, channels=6):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, 2)
        self.norm = nn.BatchNorm2d(channels)
        self.hidden = nn.Linear(9 * channels, 10)
        self.head = nn.Linear(10, classes)

    def forward(self, x):
        x = torch.flatten(F.relu(self.norm(self.conv(x))), 1)
        return self.head(F.relu(self.hidden(x)))


class HardCoded(nn.Module):
    """One space whose size is written into the code, one whose mean is taken, and one that is neither."""

    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.first = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.second = nn.Linear(12, 14)
        self.head = nn.Linear(14, classes)

    def forward(self, x):
        x = F.relu(self.conv(x)).mean((2, 3)).view(-1, 8)
        return self.head(F.relu(self.second(F.gelu(self.norm(self.first(x))))))


class Depthwise(nn.Module):
    def __init__(self, classes, channels=8):
        super().__init__()
        self.expand = nn.Conv2d(3, channels, 1)
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.project = nn.Conv2d(channels, 6, 1)
        self.head = nn.Linear(12, classes)

    def forward(self, x):
        x = self.project(F.relu6(self.norm(self.depth(F.relu6(self.expand(x))))))
        return self.head(torch.cat([x, F.relu(x)], 1).mean((2, 3)))


FAMILIES = {"residual": Residual, "perceptron": Perceptron, "depthwise": Depthwise, "hard-coded": HardCoded}


def pair(build, *sizes):
    models = [randomise(build(n), seed) for seed, n in enumerate(sizes or (4, 5))]
    return [model.double() for model in models]


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.thinned(4)
@pytest.mark.parametrize("method", ["zip", "energy", "permute", "agglomerative", "kmeans"])
@pytest.mark.parametrize("family", ["residual", "perceptron", "depthwise"])
def test_with_room_for_all_features_nothing_is_lost(family, method):
    """At twice the width two networks fit side by side: the zip must compute both exactly, without any refit."""
    models = pair(FAMILIES[family])
    x = X.double()
    zipped = fxzip.compile_zip(*models, x[:2], data=[x], method=method, width=2.0, refit=None)
    assert all(space["kept"] == 2 * space["size"] for space in zipped.report["spaces"])
    with torch.no_grad():
        assert max(relative(y, model(x)) for y, model in zip(zipped(x), models, strict=True)) < 1e-9


@pytest.mark.parametrize("until", ["layer1", "layer2.0.conv1"])
@pytest.mark.thinned(2)
def test_with_room_for_all_features_every_cut_is_exact(until):
    models = pair(Residual)
    x = X.double()
    zipped = fxzip.compile_zip(*models, x[:2], data=[x], width=2.0, until=until, refit=None)
    with torch.no_grad():
        assert max(relative(y, model(x)) for y, model in zip(zipped(x), models, strict=True)) < 1e-9


@pytest.mark.slow
@pytest.mark.thinned(3)
@pytest.mark.parametrize("refit", [None, "repair", "lstsq"])
@pytest.mark.parametrize("width", [0.5, 1.25, 1.5])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_width_runs_with_every_refit(family, width, refit):
    models = pair(FAMILIES[family])
    x = X.double()
    zipped = fxzip.compile_zip(*models, x[:2], data=[x], width=width, refit=refit)
    kept = {space["name"]: (space["size"], space["kept"]) for space in zipped.report["spaces"]}
    stiff = {note.split("`")[1] for note in zipped.report["notes"] if "keeps its" in note}
    assert stiff == ({"conv.weight", "first.weight"} if family == "hard-coded" else set())
    for name, (size, m) in kept.items():
        assert m == (size if name in stiff else round(width * size))
    assert [tuple(y.shape) for y in zipped(x[:3])] == [(3, 4), (3, 5)]
    for module in zipped.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else (
                module.out_channels, module.in_channels // module.groups)  # fmt: skip
            assert module.weight.shape[:2] == shape


@pytest.mark.slow
def test_a_wider_trunk_is_more_like_its_models():
    models = pair(Residual)
    x, held = X.double(), torch.randn(64, 3, 8, 8, dtype=torch.float64)
    errors = []
    for width in (0.5, 1.0, 1.5, 2.0):
        zipped = fxzip.compile_zip(*models, x[:2], data=[x], width=width)
        with torch.no_grad():
            errors.append(sum(relative(y, m(held)) for y, m in zip(zipped(held), models, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 < errors[0]


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("cost", "until"),
    [
        (0.6, None), (1.0, None), (1.4, None), (1.4, "layer1"), (1.5, "layer1"), (1.3, "layer2.0"),
        (1.6, "layer2.0.conv1"),
    ],
)  # fmt: skip
def test_width_by_need_takes_the_flops_that_it_may(cost, until):
    """Also where the trunk ends inside a residual stage, whose features the head reads in its own basis."""
    models = pair(Residual)
    x = X.double()
    zipped = fxzip.compile_zip(*models, x[:2], data=[x], width="auto", max_cost=cost, budget="flops", until=until)
    flops = zipped.report["flops"]
    assert 0.9 * cost < flops["total"] / flops["originals"][0] <= cost
    assert len({space["kept"] / space["size"] for space in zipped.report["spaces"]}) > 1


def test_what_widths_by_need_do_not_count_is_said():
    report = {"flops": {"total": 141, "originals": [100, 120]}}
    [note] = overspent(report, Budget(1.4))
    assert note.startswith(
        "the zip takes 1.410 of the first model's FLOPs, not 1.4: heads read features through a matrix"
    )
    assert overspent(report, Budget(1.41)) == overspent(report, None) == ()
    assert len(overspent(report, Budget())) == 1


def test_width_by_need_spends_on_what_is_read():
    """One hidden layer hardly passes anything on; it gives its FLOPs to the other."""

    def build(classes):
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes))

    models = pair(build)
    for model in models:
        with torch.no_grad():
            model[2].weight[:, 4:] = 0  # of the first layer only four features matter
    x = torch.randn(200, 6, dtype=torch.float64)
    zipped = fxzip.compile_zip(*models, x[:2], data=[x], width="auto", budget="flops")
    first, second = (space["kept"] for space in zipped.report["spaces"])
    assert first < 16 < second


def test_the_width_of_single_spaces():
    models = pair(Residual)
    x = X.double()
    name = fxzip.inspect(models[0], x[:2]).spaces[0].name
    zipped = fxzip.compile_zip(*models, x[:2], data=[x], width={name: 1.5})
    kept = {space["name"]: space["kept"] / space["size"] for space in zipped.report["spaces"]}
    assert kept.pop(name) == 1.5
    assert set(kept.values()) == {1.0}


def test_a_zip_of_another_width_is_an_ordinary_module():
    models = pair(Residual)
    x = X.double()
    zipped = fxzip.compile_zip(*models, x[:2], data=[x], width=1.5)
    again = fxzip.compile_zip(zipped, zipped, x[:2], data=[x], method="permute")
    for one, other in zip(zipped(x), again(x)[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(zipped.single(1)(x), zipped(x)[1])


def test_several_inputs_outputs_and_ties():
    models = [randomise(Mixed(n), seed).double() for seed, n in enumerate((3, 4))]
    call = (X.double(), torch.randint(0, 20, (64, 5)))
    zipped = fxzip.compile_zip(*models, call, width=2.0, method="zip", refit=None)
    for found, model in zip(zipped(*call), models, strict=True):
        wanted = model(*call)
        assert max(relative(found[key], wanted[key]) for key in wanted) < 1e-9


def test_stems_and_widths():
    models = pair(Residual)
    x = X.double()
    zipped = fxzip.compile_zip(*models, x[:2], data=[x], start="layer1", width=2.0, refit=None, method="zip")
    assert max(relative(y, model(x)) for y, model in zip(zipped(x), models, strict=True)) < 1e-9


def test_trials_find_what_cannot_be_resized():
    models = pair(HardCoded)
    found = fxzip.compiler.survey.survey(models, fxzip.tracing.calls.as_call(X[:2].double()))
    trunk = found.trunk()
    names = {space.name: s for s, space in enumerate(trunk.spaces[0].spaces)}
    stiff = stiff_spaces(trunk, sorted(names.values()))
    assert set(stiff) == {names["conv.weight"], names["first.weight"]}
    assert "shape" in stiff[names["conv.weight"]]
    assert "the output moves" in stiff[names["first.weight"]]


class HalvesApart(nn.Module):
    """The halves of a `chunk` that go separate ways; the width of one of them may be written into the code."""

    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed
        self.first, self.left, self.right = nn.Linear(5, 6), nn.Linear(3, 4), nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        halves = list(torch.relu(self.first(x)).chunk(2, -1))
        if self.fixed is not None:
            halves[self.fixed] = halves[self.fixed] + x.new_zeros(x.shape[0], 3)
        return self.head(torch.relu(self.left(halves[0]) + self.right(halves[1])))


@pytest.mark.parametrize(("fixed", "kept"), [(0, {3}), (1, {3}), (None, {6})])
def test_halves_of_a_chunk_keep_one_size(fixed, kept):
    models, x = [randomise(HalvesApart(fixed), seed).double() for seed in range(2)], torch.randn(8, 5).double()
    zipped = fxzip.compile_zip(models, x, method="zip", refit=None, width=2)
    assert {space["kept"] for space in zipped.report["spaces"] if space["name"] == "first.weight"} == kept
    assert all(found.shape == (8, 3) for found in zipped(x))


def layout(space, feature, occurrence):
    return Layout(*(torch.tensor(values) for values in (space, feature, occurrence)))


def test_layouts_grow_and_shrink_where_their_features_are():
    flat = layout([-1, 0, 0, 0, 0, 1], [-1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 1, 0])  # two positions of two channels
    assert resized(flat, {0: 3}).feature.tolist() == [-1, 1, 1, 0, 0, 2, 2, 0]
    assert resized(flat, {0: 1}).feature.tolist() == [-1, 0, 0, 0]
    twice = layout([0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1])  # two channels, concatenated with themselves
    assert resized(twice, {0: 3}).feature.tolist() == [0, 1, 2, 0, 1, 2]
    assert resized(twice, {0: 3}).occurrence.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "irregular",
    [
        layout([0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]),  # among those of another space
        layout([0, 0, 0], [0, 1, 0], [0, 0, 1]),  # not equally often
        layout([0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]),  # in another order the second time
    ],
)
def test_features_that_lie_among_others_keep_their_number(irregular):
    with pytest.raises(IrregularLayoutError, match=r"do not (lie side by side|occur equally often)"):
        resized(irregular, {0: 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 2.5}, r"`width` must lie in \(0, 2\]"),
        ({"width": 0}, r"`width` must lie in \(0, 2\]"),
        ({"width": "wide"}, '`width` must be a number, a dict of numbers by space, or "auto"'),
        ({"width": {"layer9": 1.5}}, "`width` must name spaces of the trunk"),
        ({"width": "auto", "max_cost": -1, "budget": "flops"}, "`max_cost` must be positive"),
        ({"width": "auto", "max_cost": 0.001, "budget": "flops"}, r"`max_cost=0\.001` cannot be reached"),
        ({"width": 1.25, "max_cost": 1.2}, 'must go with `until="auto"`'),
        ({"width": 1.25, "method": "average"}, "`average` keeps every feature"),
        ({"width": 1.25, "method": "weights"}, "`width` needs a method that keeps any number of features"),
        ({"width": 0.5, "method": "permute"}, "`permute` keeps the features of the first model"),
    ],
)
def test_bad_widths(arguments, message):
    models = pair(Residual)
    x = X.double()
    with pytest.raises((fxzip.InputError, fxzip.OptionError), match=message):
        fxzip.compile_zip(*models, x[:2], data=[x], **arguments)


class Sized(nn.Module):
    """Returns the size of what it computes beside the logits."""

    def __init__(self, classes, shape):
        super().__init__()
        self.first, self.second, self.head, self.shape = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, classes), shape

    def forward(self, x):
        h = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(h), self.shape(h)


@pytest.mark.parametrize("shape", [lambda h: h.shape[1], lambda h: h.shape])
def test_a_size_that_the_model_returns_stays(shape):
    a, b = Sized(2, shape).eval(), Sized(3, shape).eval()
    x = torch.randn(40, 6)
    zipped = fxzip.compile_zip(a, b, x, data=[x], method="zip", refit=None, width=2, progress=False)
    assert [size for _, size in zipped(x)] == [model(x)[1] for model in (a, b)]
    assert any("the model returns a size that goes by it" in note for note in zipped.report["notes"])

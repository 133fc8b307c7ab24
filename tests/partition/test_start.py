"""`start`: each model's own stem, a merge where the trunk begins, a trunk from there on."""

import copy
import re

import pytest
import torch
import torchvision
from models import randomise
from models.networks import Block, Mixed, Residual, Segmenter, torchvision_model
from torch import nn

import fxzip
from fxzip.rewriting.module import merge, part_of

G = torch.Generator().manual_seed(0)
X = torch.randn(30, 3, 8, 8, generator=G, dtype=torch.float64)
UNTOUCHED = X.clone()
SETTINGS = {"data": [X], "progress": False}


def both_are(model, zipped, *inputs, bound=1e-9):
    wanted = model(*inputs)
    for found in zipped(*inputs):
        torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)


class OtherStem(Residual):
    """The same network behind a stem of another make."""

    def __init__(self, classes=4, width=8):
        super().__init__(classes, width)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 5, 1), nn.GELU(), nn.Conv2d(5, width, 5, padding=2), nn.LayerNorm([width, 8, 8]), nn.Sigmoid()
        )


# twins ---------------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(4)
@pytest.mark.parametrize("method", ["permute", "zip"])
@pytest.mark.parametrize(
    "start",
    [
        "layer1.0.conv2",
        "layer2_0_relu_1",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("layer1", "layer1.1", "layer2", "layer2.1.conv2")),
    ],
)
@pytest.mark.parametrize("refit", [None, "repair", "lstsq"])
def test_a_relabelled_copy(start, method, refit):
    model = randomise(Residual(4), 1).double()
    twin = fxzip.relabel(model, X)
    zipped = fxzip.compile_zip(model, twin, X[:2], start=start, method=method, refit=refit, **SETTINGS)
    both_are(model, zipped, X, bound=1e-9 if refit is None else 1e-5)
    parts = {part_of(node) for node in zipped.graph.nodes}
    assert {"stem 0", "stem 1", "merge", "trunk"} <= parts


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("start", "until"), [("layer1", "layer1"), ("layer1.1", "layer2.0"), ("layer1", 0.5)])
def test_from_a_start_until_a_cut(start, until):
    model = randomise(Residual(4), 1).double()
    twin = fxzip.relabel(model, X)
    zipped = fxzip.compile_zip(model, twin, X[:2], start=start, until=until, method="permute", refit=None, **SETTINGS)
    both_are(model, zipped, X)
    flops = zipped.report["flops"]
    assert min(*flops["stems"], flops["trunk"], *flops["heads"]) > 0


def small_vit():
    return randomise(torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=4), 1)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "start"), [
    (lambda: torchvision_model("resnet18", 1), "layer2.1"),
    pytest.param(
        lambda: torchvision_model("densenet121", 1), "features.denseblock2.denselayer3", marks=pytest.mark.hours
    ),
    (lambda: torchvision_model("shufflenet_v2_x1_0", 1), "stage3"),
    (lambda: torchvision_model("mobilenet_v3_small", 1), "features.4"),
    (small_vit, "encoder.layers.encoder_layer_1"),
    (small_vit, "encoder.layers.encoder_layer_0.mlp"),
    pytest.param(lambda: torchvision_model("vgg16_bn", 1), "classifier", marks=pytest.mark.hours),
    pytest.param(lambda: torchvision_model("resnext50_32x4d", 1), "layer2", marks=pytest.mark.hours),
])  # fmt: skip
def test_relabelled_copies_of_known_networks(make, start):
    model = make().double()
    size = 32 if make is small_vit else 64
    x = torch.randn(4, 3, size, size, generator=G, dtype=torch.float64)
    twin = fxzip.relabel(model, x)
    zipped = fxzip.compile_zip(model, twin, x[:2], data=[x], start=start, method="permute", refit=None, verify=False,
                               progress=False)  # fmt: skip
    both_are(model, zipped, x)


def test_several_values_enter():
    words = torch.randint(20, (30, 3), generator=G)
    model = randomise(Mixed(), 1).double()
    sample = (X, words)
    twin = fxzip.relabel(model, sample)
    zipped = fxzip.compile_zip(model, twin, sample, data=[sample], start="join", method="permute", refit=None,
                               progress=False)  # fmt: skip
    both_are(model, zipped, X, words)


class Long(nn.Module):
    """A skip connection from the stem into the trunk, and one from the stem into the head."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.middle, self.last = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.linear = nn.Linear(8, classes)

    def forward(self, x):
        early = self.stem(x).tanh()
        y = self.first(early).tanh()
        y = self.middle(torch.cat([y, early], 1)).tanh()
        y = self.last(torch.cat([y, early], 1)).tanh()
        return self.linear(y.mean((2, 3)))


@pytest.mark.parametrize("until", [None, "middle", "last"])
def test_connections_around_the_start_and_the_trunk(until):
    model = randomise(Long(), 1).double()
    twin = fxzip.relabel(model, X)
    zipped = fxzip.compile_zip(model, twin, X[:2], start="first", until=until, method="permute", refit=None, **SETTINGS)
    both_are(model, zipped, X)


class Tied(nn.Module):
    """A weight that the stem and the trunk both read, without a module around it."""

    def __init__(self):
        super().__init__()
        self.weight, self.first = nn.Parameter(torch.empty(8, 8)), nn.Linear(4, 8)
        self.middle, self.linear = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = (self.first(x).tanh() @ self.weight).tanh()
        return self.linear((self.middle(x).tanh() @ self.weight).tanh())


@pytest.mark.parametrize("refit", [None, "lstsq"])
def test_weights_that_stem_and_trunk_share(refit):
    x = torch.randn(200, 4, generator=G, dtype=torch.float64)
    model = randomise(Tied(), 1).double()
    twin = fxzip.relabel(model, x)
    zipped = fxzip.compile_zip(
        model, twin, x[:2], data=[x], start="middle", method="permute", refit=refit, progress=False
    )
    both_are(model, zipped, x, bound=1e-9 if refit is None else 1e-4)


# stems of different makes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stems_of_different_makes():
    """A copy of the trunk behind another stem: matching finds nothing alike, but no stem is changed."""
    a, b = randomise(Residual(4), 1).double(), randomise(OtherStem(5), 2).double()
    with pytest.raises(fxzip.AlignError):
        fxzip.compile_zip(a, b, X[:2], **SETTINGS)
    for refit in (None, "batchnorm", "repair", "lstsq"):
        zipped = fxzip.compile_zip(a, b, X[:2], start="layer1", refit=refit, **SETTINGS)
        state = zipped.state_dict()
        for k, model in enumerate((a, b)):
            own = {name: value for name, value in state.items() if name.startswith(f"stem_{k}.")}
            assert len(own) == len(model.stem.state_dict())
            for name, value in own.items():
                torch.testing.assert_close(value, model.state_dict()[name.partition(".")[2]], rtol=0, atol=0)
        assert [tuple(y.shape) for y in zipped(X[:7])] == [(7, 4), (7, 5)]


def test_the_same_features_from_another_stem():
    """The same function by other calls: a stem that is the first's with an identity by 1×1 convolution behind it."""
    model = randomise(Residual(4), 1).double()
    other = fxzip.relabel(model, X)
    passed = nn.Conv2d(8, 8, 1, bias=False).double()
    with torch.no_grad():
        passed.weight.copy_(torch.eye(8).reshape(8, 8, 1, 1))
    other.stem = nn.Sequential(other.stem, passed)
    zipped = fxzip.compile_zip(model, other, X[:2], start="layer1", method="permute", refit=None, **SETTINGS)
    both_are(model, zipped, X)


def test_stems_and_heads_of_different_makes():
    a, b = randomise(OtherStem(4), 1).double(), randomise(Segmenter(5), 2).double()
    zipped = fxzip.compile_zip(a, b, X[:2], start="layer1", until="layer2", **SETTINGS)
    assert [tuple(y.shape) for y in zipped(X[:3])] == [(3, 4), (3, 5, 8, 8)]


def test_a_name_for_each_model():
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 1)
            self.body = nn.Sequential(
                nn.Sequential(Block(8, 8), Block(8, 8)), nn.Sequential(Block(8, 16, 2), Block(16, 16))
            )
            self.out = nn.Linear(16, 3)

        def forward(self, x):
            return self.out(self.body(self.patches(x)).mean((2, 3)))

    a, b = randomise(Residual(4), 1).double(), randomise(Renamed(), 2).double()
    zipped = fxzip.compile_zip(a, b, X[:2], start=("layer1", "body"), **SETTINGS)
    assert [tuple(y.shape) for y in zipped(X)] == [(30, 4), (30, 3)]
    assert zipped.report["cut"]["merged"] == [["stem_2", "patches"]]


@pytest.mark.slow
def test_three_models_of_different_widths():
    models = [randomise(m, k).double() for k, m in enumerate((Residual(4), OtherStem(3), Residual(5, 12)))]
    zipped = fxzip.compile_zip(models, X[:2], start="layer1", **SETTINGS)
    assert [y.shape[1] for y in zipped(X)] == [4, 3, 5]


def test_a_stem_that_writes_into_the_input():
    class Writes(OtherStem):
        def forward(self, x):
            x[:, 0] = 0
            return super().forward(x)

    a, b = randomise(Writes(4), 1).double(), randomise(Residual(4), 2).double()
    zipped = fxzip.compile_zip(a, b, X[:2].clone(), start="layer1", refit=None, **SETTINGS)
    names = {node.name: node for node in zipped.graph.nodes}
    assert any(part_of(node) == "stem 0" and node.target == "clone" for node in names.values())
    x = X[:4].clone()
    zipped(x)
    torch.testing.assert_close(x, X[:4])
    torch.testing.assert_close(X, UNTOUCHED)


# models with inputs of their own --------------------------------------------------------------------------------------

LARGE = torch.nn.functional.interpolate(X, scale_factor=2.0)
PAIRED = {"data": [(X, LARGE)], "progress": False}


class Large(Residual):
    """The network on images of twice the size."""

    def forward(self, image):
        return super().forward(nn.functional.avg_pool2d(image, 2))


def large_twin(model):
    """The same function of `LARGE` as the model's of `X`, on relabelled features."""
    twin = Large(4).double()
    twin.load_state_dict(fxzip.relabel(model, X).state_dict())
    return twin.eval()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("refit", [None, "repair", "lstsq"])
@pytest.mark.parametrize("until", [None, "layer2.0.conv1"])
def test_inputs_of_their_own(refit, until):
    model = randomise(Residual(4), 1).double()
    sample = fxzip.PerModel(X[:2], LARGE[:2])
    zipped = fxzip.compile_zip(model, large_twin(model), sample, start="layer1", until=until, method="permute",
                               refit=refit, **PAIRED)  # fmt: skip
    for count in (30, 7):
        both_are(model, lambda x: zipped(x, LARGE[: len(x)]), X[:count], bound=1e-9 if refit is None else 1e-5)
    torch.testing.assert_close(zipped.single(1)(X, LARGE), zipped(X, LARGE)[1])
    assert [node.name for node in zipped.graph.nodes if node.op == "placeholder"] == ["x", "image_of_1"]
    flops = zipped.report["flops"]
    assert flops["total"] == flops["trunk"] + sum(flops["heads"]) + sum(flops["stems"])
    assert flops["originals"][0] == flops["originals"][1]


@pytest.mark.slow
def test_inputs_of_other_kinds_and_their_data():
    class Words(Residual):
        def __init__(self):
            super().__init__(3)
            self.stem = nn.Embedding(11, 8)

        def forward(self, words, weight=None):
            rows = self.stem(words)
            rows = rows if weight is None else rows * weight[:, :, None]
            return self.linear(self.layer2(self.layer1(rows.mT.reshape(-1, 8, 8, 8))).mean((2, 3)))

    a, b = randomise(Residual(4), 1).double(), randomise(Words(), 2).double()
    words = {"words": torch.randint(11, (30, 64), generator=G),
             "weight": torch.rand(30, 64, generator=G, dtype=torch.float64)}  # fmt: skip
    labels = torch.randint(4, (30,), generator=G)
    found = []
    for batch in ((X, words), ((X, words), labels), [X, words, labels], fxzip.PerModel(X, words)):
        zipped = fxzip.compile_zip(
            a, b, fxzip.PerModel(X[:2], {key: value[:2] for key, value in words.items()}),
            start=("layer1", "layer1"), data=[batch], progress=False,
        )  # fmt: skip
        found.append(zipped(X, *words.values()))
        assert [tuple(y.shape) for y in found[-1]] == [(30, 4), (30, 3)]
        torch.testing.assert_close(found[-1], found[0])
    moved = zipped(X, words["words"].flip(0), words["weight"])
    assert all((y - z).abs().max() > 1e-3 for y, z in zip(moved, found[0], strict=True))  # merged: both heads see both
    backwards = fxzip.side_by_side([b, a], fxzip.PerModel({key: words[key] for key in ("weight", "words")}, X))
    given = backwards(words["weight"], words["words"], X)  # in the order of the sample
    torch.testing.assert_close(given, (b(**words), a(X)))


def test_an_export_of_models_with_inputs_of_their_own():
    model = randomise(Residual(4), 1).double()
    zipped = fxzip.compile_zip(model, large_twin(model), fxzip.PerModel(X[:2], LARGE[:2]), start="layer1", **PAIRED)
    rows = {0: torch.export.Dim("batch")}
    program = torch.export.export(copy.deepcopy(zipped), (X, LARGE), dynamic_shapes=(rows, rows))
    torch.testing.assert_close(program.module()(X[:3], LARGE[:3]), zipped(X[:3], LARGE[:3]))


@pytest.mark.parametrize(("sample", "settings", "error", "message"), [
    ((X, LARGE), {"start": None}, fxzip.InputError, "Models with inputs of their own (`sample_input` is a `PerModel`) "
     "share nothing at the input; say with `start` where the trunk begins."),
    ((X,), {}, fxzip.InputError, "`sample_input` as a `PerModel` must hold an input for each of the 2 models; "
     "found 1."),
    ((X[:3], LARGE), {}, fxzip.InputError, "must hold inputs that belong together, as many for each model; found "
     "batches of 3 and 30."),
    ((X, LARGE), {"data": fxzip.PerModel([X], [LARGE])}, fxzip.DataError, "found a `PerModel` of sources."),
    ((X, LARGE), {"data": [X]}, fxzip.DataError, "Batch 0 of `data` must hold the inputs of all 2 models that belong "
     "together, like (30, 3, 8, 8), (30, 3, 16, 16); found (30, 3, 8, 8)."),
    ((X, LARGE), {"data": [(X, LARGE), (X, LARGE[:4])]}, fxzip.DataError, "Batch 1 of `data` must hold inputs that "
     "belong together, as many of each model; found 4, 30."),
])  # fmt: skip
def test_inputs_that_do_not_belong_together(sample, settings, error, message):
    a, b = randomise(Residual(4), 1).double(), randomise(Large(4), 2).double()
    with pytest.raises(error, match=re.escape(message)):
        fxzip.compile_zip(a, b, fxzip.PerModel(*sample), **{"start": "layer1", **PAIRED, **settings})


def test_only_some_functions_take_inputs_of_their_own():
    a, b = randomise(Residual(4), 1).double(), randomise(Large(4), 2).double()
    with pytest.raises(fxzip.InputError, match="`barrier` needs one sample input that all models take; found a `PerM"):
        fxzip.barrier(a, b, fxzip.PerModel(X, LARGE), loss=lambda net: 0.0)


@pytest.mark.slow
def test_comparing_models_with_inputs_of_their_own():
    a, b = randomise(Residual(4), 1).double(), randomise(Large(4), 2).double()
    sample, settings = fxzip.PerModel(X, LARGE), {"methods": ["permute"], "progress": False}
    with pytest.raises(fxzip.InputError, match="share nothing at the input; say with `start` where"):
        fxzip.compare([a, b], sample, data=[(X, LARGE)], **settings)
    table = fxzip.compare([a, b], sample, data=[(X, LARGE)] * 7, start="layer1", **settings)
    assert [row["method"] for row in table] == ["side by side", "permute"]
    assert table[0]["agreement"] == 1.0
    assert table[1]["error"] is None


# merge, costs, the result as a module --------------------------------------------------------------------------------


def test_the_merge_node():
    """x* = Σ_k M_k x_k against dense matrices, along one axis and along two."""
    matrices = [
        torch.rand(6, n, generator=G, dtype=torch.float64) * (torch.rand(6, n, generator=G) > 0.5) for n in (6, 6)
    ]
    entries = [m.nonzero().T for m in matrices]
    rows = torch.cat([r for r, _ in entries])
    columns = torch.cat([c + 6 * k for k, (_, c) in enumerate(entries)])
    weights = torch.cat([m[r, c] for m, (r, c) in zip(matrices, entries, strict=True)])
    flat = [torch.randn(5, 6, generator=G, dtype=torch.float64) for _ in range(2)]
    wanted = sum(x @ m.T for x, m in zip(flat, matrices, strict=True))
    torch.testing.assert_close(merge(tuple(flat), rows, columns, weights, (1,), (6,)), wanted)
    shaped = tuple(x.reshape(5, 2, 3).movedim(0, 1) for x in flat)
    found = merge(shaped, rows, columns, weights, (0, 2), (2, 3))
    torch.testing.assert_close(found, wanted.reshape(5, 2, 3).movedim(0, 1))
    torch.testing.assert_close(merge(tuple(flat), rows, columns, weights, (), ()), sum(flat) / 2)


@pytest.mark.slow
def test_costs_count_the_stems():
    a, b = randomise(Residual(4), 1).double(), randomise(OtherStem(4), 2).double()
    report = fxzip.compile_zip(a, b, X[:2], start="layer1", **SETTINGS).report
    whole = fxzip.side_by_side([a, b], X[:2]).report
    for what in ("flops", "parameters"):
        c = report[what]
        assert c["total"] == c["trunk"] + sum(c["heads"]) + sum(c["stems"])
        assert c["originals"] == whole[what]["originals"]
        assert c["originals"][0] == c["stems"][0] + c["trunk"] + c["heads"][0]
    assert report["parameters"]["stems"] == [sum(p.numel() for p in m.stem.parameters()) for m in (a, b)]
    assert "trunk begins at `stem_2`, `stem_4`, merged" in str(report)
    assert str(report).count("stems") == 1
    assert "stems" not in str(fxzip.compile_zip(a, a, X[:2], **SETTINGS).report)


def test_the_result_is_an_ordinary_module():
    a, b = randomise(Residual(4), 1), randomise(OtherStem(3), 2)
    x = X.float()
    zipped = fxzip.compile_zip(a, b, x[:2], start="layer1", data=[x], progress=False)
    wanted = zipped(x)
    other = copy.deepcopy(zipped)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(zipped.state_dict())
    torch.testing.assert_close(other(x), wanted)
    torch.testing.assert_close(copy.deepcopy(zipped).double()(X)[1].float(), wanted[1], rtol=1e-3, atol=1e-4)
    for i in range(2):
        torch.testing.assert_close(zipped.single(i)(x), wanted[i])
    program = torch.export.export(zipped, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:3]), tuple(y[:3] for y in wanted), rtol=1e-4, atol=1e-5)
    sum(y.square().mean() for y in zipped.train()(x)).backward()
    assert all(p.grad is not None for p in zipped.parameters())


@pytest.mark.slow
def test_cuts_lie_behind_the_start():
    a, b = randomise(Residual(4), 1).double(), randomise(OtherStem(4), 2).double()
    call, options = fxzip.tracing.calls.as_call(X[:2]), fxzip.compiler.Options(start="layer1")
    found = fxzip.compiler.survey.survey([a, b], call, options)
    cuts, trunks = fxzip.compiler.survey.cuts_and_trunks(found)
    clean = [cut.until for cut in cuts if cut.crossing == 1]
    assert clean == ["layer1_0_relu", "layer1.0", "layer1", "layer2.0", None]  # around the first, heads read the stems
    for cut, trunk in list(zip(cuts, trunks, strict=True))[::2]:
        assert not set(trunk.nodes) & found.alignment.stem(0)
        zipped = fxzip.compile_zip(a, b, X[:2], start="layer1", until=cut.until, verify=False, refit=None, **SETTINGS)
        flops = zipped.report["flops"]
        assert cut.cost == pytest.approx(flops["total"] / flops["originals"][0])
    zipped = fxzip.compile_zip(a, b, X[:2], start="layer1", until="auto", max_cost=1.6, budget="flops", **SETTINGS)
    assert zipped.report["auto"]["cost"] <= 1.6


# mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"start": "layer9"}, "`start` must name a module or a node of the first model; found 'layer9'. The nearest valid"),
    ({"start": ("layer1", "body")}, "`start` must name a module or a node of model 1; found 'body'."),
    ({"start": ("layer1",)}, "`start` must be one name, or one for each of the 2 models; found 1 names."),
    ({"start": ("layer1", "layer2.0.conv2")}, "As many values must enter the trunk at `start` in each model; found "
     "[1, 2]."),
    ({"start": "stem"}, "`start` must leave each model layers of its own in front; in front of 'stem' model 0 has "),
    ({"start": "layer2", "until": "layer1"}, "`until` must lie behind `start`; 'layer1' lies in front of it. The first "
     "names behind it are 'layer2', 'layer2.0', 'layer2.0.down'."),
])  # fmt: skip
def test_starts_that_do_not_fit(settings, message):
    a, b = randomise(Residual(4), 1).double(), randomise(Residual(4), 2).double()
    with pytest.raises(fxzip.CutError, match=re.escape(message)):
        fxzip.compile_zip(a, b, X[:2], **settings, **SETTINGS)


def test_entries_must_look_alike():
    a, b = Residual(4), Residual(4)
    b.stem[0].stride = (2, 2)
    text = (
        "Values that are merged at `start` must look alike in all models, but for their features; of `stem_2` its "
        "shapes differ: (2, 8, 8, 8) and (2, 8, 4, 4). Choose another place, or another size of the sample input."
    )
    with pytest.raises(fxzip.CutError, match=re.escape(text)):
        fxzip.compile_zip(a, b, X[:2].float(), start="layer1", progress=False)


def test_entries_must_be_tensors():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(4, 2)

        def forward(self, x):
            low, high = self.first(x).chunk(2, 1)
            return self.last(low + high)

    x = torch.randn(3, 4)
    with pytest.raises(fxzip.CutError, match=r"`start` must lie where tensors are handed on; 'getitem' reads node "
                                             r"`chunk` of model 0, which is none\. Start behind it"):  # fmt: skip
        fxzip.compile_zip(Split(), Split(), x, start="getitem", progress=False)


def test_trunks_that_part_at_the_start():
    a = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU())
    b = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.ReLU())
    with pytest.raises(fxzip.AlignError, match="needs models that agree from `start` on; they part at the first node"):
        fxzip.compile_zip(a, b, torch.randn(4, 4), start="1", progress=False)


class Coupling(nn.Module):
    """The weights behind the first layer all write what the model returns."""

    def __init__(self):
        super().__init__()
        self.scale, self.a, self.b = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = x * self.scale
        return torch.cat([x[:, :3], x[:, 3:] + self.b(torch.relu(self.a(x[:, :3])))], 1)


def test_start_is_not_proposed_where_nothing_behind_it_can_be_shared():
    with pytest.raises(fxzip.AlignError, match="until=0"):
        fxzip.compile_zip(Coupling(), Coupling(), torch.randn(4, 6), progress=False)

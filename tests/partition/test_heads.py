"""Heads of all kinds on one trunk: what is not shared stays exactly as it was."""

import copy
from typing import NamedTuple

import pytest
import torch
from models import randomise
from models.networks import Residual, Segmenter
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxzip
from fxzip.analysis import relative_difference

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def zipped_of(*models, sample=X, **options):
    return fxzip.compile_zip(list(models), sample, data=[sample], progress=False, **options)


def same(found, expected, bound=1e-5):
    assert relative_difference(expected, found) <= bound


def test_heads_start_where_the_user_says():
    a, b = randomise(Residual(4), 1), randomise(Residual(6), 2)
    for cut, bound in (("stem", 2.0), ("layer1.0.conv1", 2.0)):
        zipped = zipped_of(a, b, until=cut)
        first, second = zipped(X)
        assert first.shape == (6, 4)
        assert second.shape == (6, 6)
        assert relative_difference(a(X), first) < bound
    flops = zipped.report["flops"]
    assert flops["originals"][0] < flops["total"] < flops["side_by_side"]


def test_identical_models_give_the_model():
    model = randomise(Residual())
    for method in ("zip", "permute", "average"):
        for output in zipped_of(model, copy.deepcopy(model), method=method)(X):
            same(output, model(X))


def test_classifier_and_segmenter():
    classifier = randomise(Residual(), 1)
    segmenter = randomise(Segmenter(), 2)
    segmenter.load_state_dict({k: v for k, v in classifier.state_dict().items() if "linear" not in k}, strict=False)
    zipped = zipped_of(classifier, segmenter, method="permute")
    classes, mask = zipped(X)
    same(classes, classifier(X))
    same(mask, segmenter(X))
    assert "part" in str(zipped.report)


@pytest.mark.parametrize(("first", "second"), [(8, 16), (16, 8)])
def test_widths_may_differ(first, second):
    a, b = randomise(Residual(4, first), 1), randomise(Residual(5, second), 2)
    zipped = zipped_of(a, b)
    assert [tuple(y.shape) for y in zipped(X[:3])] == [(3, 4), (3, 5)]
    assert dict(zipped.named_parameters())["trunk.layer1.0.conv1.weight"].shape[0] == first


def test_a_wider_twin_holds_the_narrow_model():
    """Every feature of a twice, halved where it is read: zipping it with a gives a."""
    a = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    b = nn.Sequential(nn.Linear(5, 14), nn.ReLU(), nn.Linear(14, 3)).double()
    with torch.no_grad():
        b[0].weight.copy_(a[0].weight.repeat(2, 1))
        b[0].bias.copy_(a[0].bias.repeat(2))
        b[2].weight.copy_(a[2].weight.repeat(1, 2) / 2)
        b[2].bias.copy_(a[2].bias)
    x = torch.randn(200, 5, dtype=torch.float64)
    for output in zipped_of(a, b, sample=x, method="zip", refit=None)(x):
        same(output, a(x), 1e-9)


def test_three_models():
    model = randomise(Residual())
    twins = [fxzip.relabel(model, X, seed=seed) for seed in (1, 2)]
    zipped = zipped_of(model, *twins)
    assert len(zipped(X)) == 3
    for output in zipped(X):
        same(output, model(X), 1e-4)


class Named(nn.Module):
    """Dict in, nested structure out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 8), nn.Linear(4, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, left: Tensor, right: Tensor) -> dict:
        y = F.relu(self.left(left) + self.right(right))
        return {"logits": self.out(y), "pair": (self.out(y).sum(1), y.mean())}


def test_dict_in_structures_out():
    sample = {"left": torch.randn(4, 3), "right": torch.randn(4, 4)}
    model = randomise(Named())
    zipped = fxzip.compile_zip(
        model, fxzip.relabel(model, sample), sample, data=[sample, (sample, 0)], until="relu", progress=False
    )
    first, second = zipped(**sample)
    assert list(first) == ["logits", "pair"]
    assert isinstance(second["pair"], tuple)
    same(second, model(**sample))


class Split(nn.Module):
    """The cut may fall between a split and its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(4, 12), nn.Linear(6, 5), nn.Linear(6, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(x).chunk(2, 1)
        n = left.size(1)
        return self.last(self.a(left.relu()) + self.b(right)) / n


@pytest.mark.parametrize("cut", ["first", "chunk", "a", "relu", "b"])
def test_a_cut_between_a_split_and_its_parts(cut):
    model, x = randomise(Split()).double(), torch.randn(40, 4, dtype=torch.float64)
    for output in zipped_of(model, fxzip.relabel(model, x), sample=x, until=cut)(x):
        same(output, model(x), 1e-9)


class InPlace(nn.Module):
    """The head writes into what the trunk hands over."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :, 0] = 0.0
        y.relu_()
        y += 1
        return self.out(y.mean((2, 3)))


@pytest.mark.parametrize("cut", ["conv", None])
def test_a_head_may_write_in_place(cut):
    model = randomise(InPlace())
    zipped = zipped_of(model, copy.deepcopy(model), until=cut, method="average")
    for output in zipped(X):
        same(output, model(X))


class Scaled(nn.Module):
    """A parameter over two labelled axes, and one that no axis labels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.features = nn.Linear(5, 6), nn.Linear(4, 7)
        self.table, self.scale = nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.tensor(1.5))
        self.back, self.out = nn.Linear(6, 1), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(self.features(x).transpose(1, 2)) + self.table
        return self.out(self.back(y.relu() * self.scale).squeeze(2))


@pytest.mark.parametrize("method", ["permute", "zip"])
def test_a_parameter_over_two_labelled_axes(method):
    model, x = Scaled().double().eval(), torch.randn(50, 5, 4, dtype=torch.float64)
    for output in zipped_of(model, fxzip.relabel(model, x), sample=x, method=method, refit=None)(x):
        same(output, model(x), 1e-9)


class Parted(nn.Module):
    """Behind `a` some features go another way than the others."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.b(self.way(self.a(x)))))


def written(h):
    h[..., :4].relu_()
    return h


def assigned(h):
    h[..., :4] = torch.tanh(h[..., :4])
    return h


WAYS = {
    "put together": lambda h: torch.cat([torch.relu(h[..., :4]), h[..., 4:]], -1),
    "padded": lambda h: h + torch.nn.functional.pad(torch.relu(h[..., :4]), (0, 4)),
    "written": written,
    "assigned": assigned,
    "left out": lambda h: torch.nn.functional.pad(h[..., 2:], (2, 0)),
    "in halves": lambda h: torch.cat([h.chunk(2, -1)[0].tanh(), h.chunk(2, -1)[1]], -1),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("way", WAYS)
def test_a_head_that_treats_some_features_by_themselves_gets_its_own_order(way):
    models = [Parted(own).double().eval() for own in (lambda h: h, WAYS[way])]
    x = torch.randn(64, 6, dtype=torch.float64)
    for order in (models, models[::-1]):
        zipped = fxzip.compile_zip(*order, x[:4], data=[x], method="permute", refit=None, width=2, until="a")
        for found, model in zip(zipped(x), order, strict=True):
            torch.testing.assert_close(found, model(x), rtol=1e-9, atol=1e-9)
        assert zipped.report["spaces"][0]["folded"] == [model.way is not WAYS[way] for model in order]


class States(nn.Module):
    """Heads that read the state of a recurrent layer, a tuple in a tuple."""

    def __init__(self, classes, passed):
        super().__init__()
        self.first, self.layers = nn.Linear(5, 6), nn.LSTM(6, 8, batch_first=True)
        self.second, self.head, self.passed = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, classes), passed

    def forward(self, x):
        h = torch.relu(self.first(x))
        _, state = self.layers(h)
        if self.passed:
            return self.head(self.second(h.flip(1), state)[0])
        return self.head(torch.tanh(state[0][0]) + state[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_items_of_tuples_in_tuples_are_handed_over(dtype):
    torch.manual_seed(0)
    net, x = States(3, False).to(dtype).eval(), torch.randn(64, 4, 5, dtype=dtype)
    twin = fxzip.relabel(net, x, seed=1)
    zipped = fxzip.compile_zip(net, twin, x, data=[x], method="permute", refit=None, until="layers", progress=False)
    assert zipped.report["cut"]["after"] == ["getitem_2", "getitem_4"]
    for output in zipped(x):
        torch.testing.assert_close(output, net(x), atol=1e-6, rtol=1e-5)


class State(NamedTuple):
    h: Tensor
    c: Tensor


@fx.wrap
def state_of(h):
    return State(h.tanh(), h.sigmoid())


@fx.wrap
def read(state):
    return state.h * state.c


@fx.wrap
def last(found):
    y, (h, c) = found
    return y[:, -1] + h[-1] * c[-1].tanh()


@fx.wrap
def counted(h):
    return h.tanh(), h.shape[1], h.sigmoid()


@fx.wrap
def spread(found):
    h, size, c = found
    return h * c * size


class Cells(nn.Module):
    """A recurrent cell that is given its own state, a tuple, again."""

    def __init__(self):
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(5, 6), nn.LSTMCell(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h, state = torch.relu(self.first(x)), None
        for step in range(3):
            state = self.cell(h[:, step], state)
        return self.head(state[0])


class Passed(nn.Module):
    """A function that takes what a call gives as it is."""

    def __init__(self, function):
        super().__init__()
        self.first, self.layers = nn.Linear(5, 6), nn.LSTM(6, 8, batch_first=True)
        self.head, self.function = nn.Linear(8, 3), function

    def forward(self, x):
        return self.head(self.function(self.layers, torch.relu(self.first(x))))


PASSED = {  # network, cut, how many values cross
    "the state of a layer": (lambda: States(3, True), "layers", 3),
    "a cell": (Cells, "cell_1", 3),
    "a tuple in a tuple": (lambda: Passed(lambda layers, h: last(layers(h))), "layers", 3),
    "a named tuple": (lambda: Passed(lambda layers, h: read(state_of(layers(h)[0])).amax(1)), "state_of", 2),
    "parts": (lambda: Passed(lambda layers, h: torch.cat(layers(h)[0].split(2, 1), 1).amax(1)), "split", 2),
}


@pytest.mark.parametrize("name", PASSED)
@pytest.mark.thinned(2)
def test_items_of_a_tuple_that_a_head_reads_as_it_is_are_handed_over(name, tmp_path):
    build, cut, crossing = PASSED[name]
    torch.manual_seed(0)
    net, x = build().double().eval(), torch.randn(64, 4, 5).double()
    twin = fxzip.relabel(net, x, seed=1)
    zipped = fxzip.compile_zip(net, twin, x, data=[x], method="permute", refit=None, until=cut, progress=False)
    assert len(zipped.report["cut"]["after"]) == crossing
    for output in zipped(x):
        torch.testing.assert_close(output, net(x))
    fxzip.save(zipped, tmp_path / "zip")
    again = fxzip.load(tmp_path / "zip", trust=[State, state_of, read, last])
    assert all(found.equal(output) for found, output in zip(again(x), zipped(x), strict=True))
    other = fxzip.compile_zip(net, build().double().eval(), x, data=[x], until=cut, progress=False)
    assert other.report["cut"]["after"] == zipped.report["cut"]["after"]
    assert all(output.isfinite().all() for output in other(x))


def test_what_is_no_plain_tuple_is_no_cut():
    """Of a number in it nothing says that it is always the same."""
    torch.manual_seed(0)
    a, b = (Passed(lambda layers, h: spread(counted(layers(h)[0])).amax(1)).eval() for _ in range(2))
    x = torch.randn(64, 4, 5)
    with pytest.raises(fxzip.CutError, match=r"at 'counted' node `counted` hands over several values in one\. Choose"):
        fxzip.compile_zip(a, b, x, data=[x], until="counted", progress=False)
    cuts = {share: fxzip.compile_zip(a, b, x, data=[x], until=share, progress=False) for share in (0.5, 1.0)}
    assert [cuts[share].report["cut"]["after"] for share in cuts] == [["relu"], ["amax"]]


class Asked(States):
    """Takes the state of a recurrent layer apart, as code does that goes with several kinds of layers."""

    def forward(self, x):
        y, state = self.layers(torch.relu(self.first(x)))
        h = state[0] if isinstance(state, tuple) else state
        return self.head(y.amax(1) + h[0])


def test_how_many_items_a_tuple_has_is_asked_where_it_is_made():
    """Heads that ask would run the layer again."""
    torch.manual_seed(0)
    a, b, x = Asked(3, False).eval(), Asked(4, False).eval(), torch.randn(64, 4, 5)
    zipped = fxzip.compile_zip(a, b, x, data=[x], refit=None, progress=False)
    assert zipped.report["cut"]["after"] == ["add"]
    called = [node.target for node in zipped.graph.nodes if node.op == "call_module"]
    assert called == ["trunk.first", "trunk.layers", "head_0.head", "head_1.head"]

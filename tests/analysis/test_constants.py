"""Constants and noise in the shape of features pin nothing; what does depend on the place still does."""

from functools import partial

import pytest
import torch
from test_rules import Bench, values
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.analysis import relative_difference
from fxzip.analysis.stillness import Still
from fxzip.analysis.unread import unread
from fxzip.tracing import trace


class Around(nn.Module):
    """Two layers around a function of features [B, 8] (or tokens [B, 5, 8])."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.h, self.function = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), function

    def forward(self, x):
        y = torch.relu(self.b(self.function(torch.relu(self.a(x)))))
        return self.h(y.mean(1) if y.ndim == 3 else y)


def built(function, seed=0):
    torch.manual_seed(seed)
    return Around(function).double().eval()


def cleared(x):
    x = x.clone()
    x[x < 0.2] = 0
    return x


def filled(x):
    y = torch.empty_like(x)
    y[1:], y[:1] = x[:-1], 0.5
    return y


def shifted(x):
    """Features move along positions, as in TSM: two forwards, two backwards, and the rest stays."""
    y = torch.zeros_like(x)
    y[:-1, :2], y[1:, 2:4], y[:, 4:] = x[1:, :2], x[:-1, 2:4], x[:, 4:]
    return y


def rows(x):
    return torch.arange(x.shape[0]) // 2


CONSTANTS = {
    "zeros_like": lambda x: x + torch.zeros_like(x),
    "new_zeros": lambda x: x + x.new_zeros(x.shape),
    "full": lambda x: x * torch.full(x.shape, 2.0, dtype=x.dtype),
    "full_like": lambda x: torch.maximum(x, torch.full_like(x, 0.1)),
    "ones_like of another": lambda x: x - torch.ones_like(x * 2),
    "where": lambda x: torch.where(x > 0.2, x, torch.zeros_like(x)),
    "masked_fill": lambda x: x.masked_fill(x < 0.1, -1.0),
    "clamp by itself": lambda x: torch.minimum(x, x.new_full((1, 1), 0.7).expand_as(x).contiguous()),
    "written by a mask": cleared,
    "written into a new tensor": filled,
    "shifted rows": lambda x: torch.cat([x[1:], torch.zeros_like(x[:1])]),
    "index_add": lambda x: torch.zeros_like(x).index_add(0, rows(x), x),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(0, rows(x)[:, None].expand_as(x).contiguous(), x),
    "scatter_reduce": lambda x: torch.zeros_like(x).scatter_reduce(0, rows(x)[:, None].expand_as(x), x, "amax"),
    "index_put": lambda x: torch.zeros_like(x).index_put((rows(x),), x, accumulate=True),
    "mask of the input": lambda x: x * (x.sum(1, keepdim=True) > 1).repeat(1, x.shape[1]),
    "gate of the input": lambda x: x + x.mean(1, keepdim=True).expand_as(x).clone().sigmoid(),
    "stack": lambda x: torch.stack([x, torch.zeros_like(x)], 1).sum(1),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_pin_nothing(name):
    """All features are shared, and a network zipped with a relabelled copy of itself is that network."""
    x = torch.randn(12, 6, dtype=torch.float64)
    model = built(CONSTANTS[name])
    spaces = fxzip.inspect(model, x).spaces
    assert [(space.name, space.size, space.legality) for space in spaces] == [
        ("a.weight", 8, "free"), ("b.weight", 8, "free"),
    ]  # fmt: skip
    assert twin_error(model, x) < 1e-12


def twin_error(model, x, method="permute"):
    twin = fxzip.relabel(model, x, seed=1)
    assert not torch.equal(twin.a.weight, model.a.weight)
    data = [torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))]
    zipped = fxzip.compile_zip(model, twin, x, data=data, method=method, refit=None, progress=False)
    with torch.no_grad(), Still():
        return max(relative_difference(model(x), output) for output in zipped(x))


SIZES = {
    "row of a weight": lambda m, x: x * m.b.weight[0].numel() ** -0.5,
    "shape of a row": lambda m, x: x / m.b.weight[3].shape[0],
    "zeros like a row": lambda m, x: x + torch.zeros_like(m.b.weight[:, 0]),
    "size of one feature": lambda m, x: x.view(x[:, 3].size(0), -1),
    "numbers of places": lambda m, x: x * x.sort(1).indices.shape[1],
    "type of a row": lambda m, x: (2 * x).type_as(m.b.weight[0]),
}


@pytest.mark.parametrize("name", SIZES)
def test_what_is_read_for_its_size_alone_pins_nothing(name):
    x = torch.randn(12, 6, dtype=torch.float64)
    model = built(None)
    model.function = partial(SIZES[name], model)
    assert all(space.size == 8 and space.legality == "free" for space in fxzip.inspect(model, x).spaces)
    assert twin_error(model, x) < 1e-12
    other = built(None, seed=1)
    other.function = partial(SIZES[name], other)
    found = fxzip.compile_zip(model, other, x, data=[x], refit=None, progress=False).report["cut"]
    assert (found["unmatched"], found["after"]) == ({}, ["relu_1"])


@torch.library.custom_op("constants::zeros_like", mutates_args=())
def misnamed(value: torch.Tensor) -> torch.Tensor:
    return value.cos()


@misnamed.register_fake
def _(value):
    return torch.empty_like(value)


def test_a_function_is_not_known_by_its_name_alone():
    x = torch.randn(12, 6, dtype=torch.float64)
    model = built(lambda x: x + misnamed(x[:, :1]))
    assert not unread(trace(model, x)) & {"getitem"}
    named = built(lambda x: x + torch.zeros_like(x[:, :1]))
    assert "getitem" in unread(trace(named, x))


NOISE = {
    "randn_like": lambda x: x + 0.3 * torch.randn_like(x),
    "randn": lambda x: x + 0.3 * torch.randn(x.shape, dtype=x.dtype),
    "rand": lambda x: x * (torch.rand(x.shape, dtype=x.dtype) + 0.5),
    "mask of rand": lambda x: x * (torch.rand_like(x) < 0.7),
    "normal_": lambda x: x + torch.empty_like(x).normal_(0, 0.1),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "dropout of whole features": lambda x: F.dropout1d(x[..., None], 0.5, training=True)[..., 0],
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "rrelu in train": lambda x: F.rrelu(x - 0.5, training=True),
    "rrelu": lambda x: F.rrelu(x - 0.5),
    "rrelu in place": lambda x: F.rrelu(x - 0.5, inplace=True),
    "drop path": lambda x: x + torch.relu(x - 0.3) * x.new_empty(x.shape[0], 1).bernoulli_(0.8).div_(0.8),
    "draws of a mean": lambda x: torch.normal(x, x.abs() + 0.1),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", NOISE)
def test_noise_pins_nothing(name, recwarn):
    x = torch.randn(12, 6, dtype=torch.float64)
    model = built(NOISE[name])
    assert [(s.name, s.size, s.legality) for s in fxzip.inspect(model, x).spaces] == [
        ("a.weight", 8, "free"), ("b.weight", 8, "free"),
    ]  # fmt: skip
    assert twin_error(model, x, "weights") < 1e-12
    assert not [w for w in recwarn if issubclass(w.category, fxzip.errors.PinnedSpaceWarning)]


class Twice(nn.Module):
    """One draw of noise on the features of two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 3)

    def forward(self, x):
        noise = torch.randn(x.shape[0], 8, dtype=x.dtype)
        return self.h(torch.relu(torch.cat([self.a(x) + noise, self.b(x) * noise], 1)))


def test_features_that_meet_the_same_noise_move_together():
    """Apart they would be correlated with other features than in the original."""
    spaces = fxzip.inspect(Twice(), torch.randn(5, 6)).spaces
    assert [(space.name, space.size) for space in spaces] == [("a.weight", 8)]


def test_a_temporal_shift_keeps_groups_of_features_apart():
    """Those that move forwards, backwards and not at all; each group may be permuted inside itself."""
    x = torch.randn(12, 6, dtype=torch.float64)
    model = built(shifted)
    spaces = fxzip.inspect(model, x).spaces
    assert [(space.name, space.size) for space in spaces] == [
        ("a.weight", 2), ("a.weight", 2), ("a.weight", 4), ("b.weight", 8),
    ]  # fmt: skip
    assert twin_error(model, x) < 1e-12


PLACES = {
    "a table": lambda x: x + torch.arange(8, dtype=x.dtype),
    "a mask by place": lambda x: x * (torch.arange(8) < 4),
    "two constants": lambda x: x + torch.cat([torch.zeros_like(x[:, :3]), torch.ones_like(x[:, 3:])], 1),
    "written in parts": lambda x: x + two_parts(x),
    "padded with another value": lambda x: x + F.pad(F.pad(torch.zeros_like(x[:, :4]), (0, 2)), (0, 2), value=1.0),
    "values of the input": lambda x: x + torch.zeros_like(x).index_put((rows(x),), x.mean(1, keepdim=True) * STEPS),
}
STEPS = torch.linspace(0, 1, 8, dtype=torch.float64)


def two_parts(x):
    y = torch.empty_like(x)
    y[:, :3], y[:, 3:] = 0.0, 1.0
    return y


@pytest.mark.parametrize("name", PLACES)
def test_constants_that_depend_on_the_place_pin(name, recwarn):
    """By their rule, not by the self-check."""
    inspection = fxzip.inspect(built(PLACES[name]), torch.randn(12, 6, dtype=torch.float64))
    assert [space.name for space in inspection.spaces] == ["b.weight"]
    assert not [w for w in recwarn if issubclass(w.category, fxzip.errors.PinnedSpaceWarning)]


def test_the_same_on_the_sample_is_not_the_same_everywhere():
    """An input that happens to be constant on the sample has features all the same."""
    bench = Bench(torch.add, [values(3, 5), torch.ones(3, 5)], [(1,), ()])
    assert bench.pinned()


class Padded(nn.Module):
    """Features of one layer are added to those of another beside places that hold nothing."""

    def __init__(self, pad):
        super().__init__()
        self.a, self.b, self.h, self.pad = nn.Linear(6, 4), nn.Linear(6, 8), nn.Linear(8, 3), pad

    def forward(self, x):
        return self.h(torch.relu(self.b(x) + self.pad(torch.relu(self.a(x)))))


@pytest.mark.parametrize(
    ("pad", "apart"),
    [
        (lambda x: F.pad(x, (2, 2)), True),
        (lambda x: torch.cat([x.new_zeros(x.shape[0], 2), x, x.new_zeros(x.shape[0], 2)], 1), True),
        (lambda x: torch.cat([x, x.new_ones(x.shape[0], 4)], 1), True),
        (lambda x: torch.cat([x.new_zeros(x.shape[0], 2), x, x.new_ones(x.shape[0], 2)], 1), False),
        (lambda x: F.pad(F.pad(x, (0, 2)), (0, 2), value=1.0), False),
        (lambda x: torch.cat([F.pad(x, (0, 2)).sigmoid(), x.new_zeros(x.shape[0], 2)], 1), False),
    ],
)
def test_places_beside_padding_move_if_the_padding_is_one_constant(pad, apart, recwarn):
    model, x = Padded(pad).double(), torch.randn(12, 6, dtype=torch.float64)
    found = fxzip.inspect(model, x)
    sizes = sorted(space.size for space in found.spaces)
    assert sizes == ([4, 4] if apart else [2, 4])
    assert twin_error(model, x) < 1e-12
    assert not [w for w in recwarn if issubclass(w.category, fxzip.errors.PinnedSpaceWarning)]


class OnImage(nn.Module):
    """A filter for each channel of the image, with a bias."""

    def __init__(self):
        super().__init__()
        self.filters, self.norm, self.head = nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.filters(x)))).mean((2, 3))


class OnTable(nn.Module):
    """A product with a fixed table, a bias of its own for each row of it, and a sum over these rows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(4, 3), persistent=False)
        self.weight, self.bias = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(4, 6))
        self.rows, self.head = nn.Linear(4, 1), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.relu(x * self.rows(torch.addmm(self.bias, self.table, self.weight).T).T))


@pytest.mark.parametrize(("model", "x", "spaces"), [(OnImage, (4, 5, 6, 6), []), (OnTable, (3, 1), ["bias"])])
def test_a_bias_of_a_product_that_cannot_move_cannot_move(model, x, spaces, recwarn):
    """By the rule of the product, not by the self-check."""
    torch.manual_seed(0)
    inspection = fxzip.inspect(model().double().eval(), torch.randn(x, dtype=torch.float64))
    assert [space.name for space in inspection.spaces] == spaces
    assert not [w for w in recwarn if issubclass(w.category, fxzip.errors.PinnedSpaceWarning)]

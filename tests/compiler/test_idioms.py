"""Idioms that used to stop features, or to merge them wrongly: a network zipped with a relabelled copy is itself."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.analysis import relative_difference


class Net(nn.Module):
    """Two layers around a function of features [16, 8], with parameters of its own."""

    def __init__(self, function, **parts):
        super().__init__()
        self.a, self.b, self.h, self.function = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.h(torch.relu(self.b(self.function(self, torch.relu(self.a(x))))))


def weights(*shape):
    return nn.Parameter(torch.randn(*shape) / 2)


def twin_error(model, inputs):
    call = inputs if isinstance(inputs, tuple) else (inputs,)
    twin = fxzip.relabel(model, inputs, seed=1)
    zipped = fxzip.compile_zip(model, twin, inputs, data=[inputs], method="permute", refit=None, progress=False)
    with torch.no_grad():
        return max(relative_difference(model(*call), output) for output in zipped(*call)), zipped


BOTH_WAYS = {
    "a weight and its transpose": (
        lambda net, x: F.linear(torch.sigmoid(F.linear(x, net.w)), net.w.t()), {"w": lambda: weights(5, 8)}, {5, 8}),
    "matrices on the left": (
        lambda net, x: (net.w.t() @ torch.sigmoid(net.w @ x.t())).t(), {"w": lambda: weights(5, 8)}, {5, 8}),
    "patterns that attend": (
        lambda net, x: torch.softmax(x @ net.w.t(), -1) @ net.w, {"w": lambda: weights(5, 8)}, {5, 8}),
    "a product with itself": (lambda net, x: x @ (net.w @ net.w.t()), {"w": lambda: weights(8, 5)}, {5, 8}),
    "two tied layers": (
        lambda net, x: F.linear(
            torch.tanh(F.linear(torch.tanh(net.v(torch.tanh(net.w(x)))), net.v.weight.t())), net.w.weight.t()),
        {"w": lambda: nn.Linear(8, 7), "v": lambda: nn.Linear(7, 5)}, {8, 7, 5}),
    "a kernel forwards and backwards": (
        lambda net, x: F.conv_transpose1d(
            torch.relu(net.w(x[..., None].expand(-1, -1, 4))), net.w.weight, stride=2, padding=1).mean(-1),
        {"w": lambda: nn.Conv1d(8, 5, 3, 2, 1)}, {5, 8}),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.thinned(2)
def test_a_parameter_used_both_ways_is_one_space_for_relabelling(name):
    function, parts, sizes = BOTH_WAYS[name]
    torch.manual_seed(0)
    net = Net(function, **{key: build() for key, build in parts.items()}).double().eval()
    x = torch.randn(64, 6, dtype=torch.float64)
    spaces = fxzip.inspect(net, x).spaces
    assert {space.size for space in spaces if space.legality == "relabel only"} == sizes
    assert any("one parameter writes it and is summed over along it" in space.reason for space in spaces)
    error, zipped = twin_error(net, x)
    assert error < 1e-12
    assert {space["size"] for space in zipped.report["spaces"]} >= sizes


def test_tied_networks_are_merged_by_permutations_only():
    """Of two unrelated autoencoders: the tied weight is the mean of weights in one order, whichever way it is read."""
    function, parts, _ = BOTH_WAYS["a weight and its transpose"]
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(Net(function, **{key: build() for key, build in parts.items()}).double().eval())
    x = torch.randn(256, 6, dtype=torch.float64)
    zipped = fxzip.compile_zip(*nets, x, data=[x], method="zip", refit=None, progress=False)
    merged, (first, second) = zipped.trunk.w, (net.w for net in nets)
    assert merged.shape == first.shape
    bound = (first.abs().max() + second.abs().max()) / 2
    assert merged.abs().max() <= bound
    norms = [w.norm() for w in (merged, first, second)]
    assert norms[0] <= (norms[1] + norms[2]) / 2 + 1e-12  # a mean of orthogonal images of both


PRODUCTS = {
    "U V": (lambda net, x: x @ (net.u @ net.v).t(), {"u": (8, 5), "v": (5, 8)}),
    "W + B A": (
        lambda net, x: F.linear(x, net.b.weight + net.u @ net.v, net.b.bias), {"u": (8, 4), "v": (4, 8)}),
    "queries through a layer": (lambda net, x: x + F.linear(net.u, net.b.weight).tanh().sum(0), {"u": (5, 8)}),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_parameters_are_free(name):
    function, shapes = PRODUCTS[name]
    torch.manual_seed(0)
    net = Net(function, **{key: weights(*shape) for key, shape in shapes.items()}).double().eval()
    x = torch.randn(64, 6, dtype=torch.float64)
    assert {space.legality for space in fxzip.inspect(net, x).spaces} == {"free"}
    assert twin_error(net, x)[0] < 1e-12


def convolutions(mode, dims):
    conv, pool = (nn.Conv1d, nn.Conv2d)[dims - 1], (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[dims - 1]
    layers = [conv(3, 8, 3, padding=1, padding_mode=mode), nn.ReLU(), conv(8, 8, 3, 2, 2, padding_mode=mode), nn.ReLU()]
    return nn.Sequential(*layers, pool(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.thinned(2)
def test_padding_is_movement(mode, dims):
    torch.manual_seed(0)
    net, x = convolutions(mode, dims).double().eval(), torch.randn(8, 3, *[8] * dims, dtype=torch.float64)
    assert [(s.name, s.size, s.legality) for s in fxzip.inspect(net, x).spaces] == [
        ("0.weight", 8, "free"), ("2.weight", 8, "free"),
    ]  # fmt: skip
    error, zipped = twin_error(net, x)
    assert error < 1e-12
    assert len(zipped.report["spaces"]) == 2


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.i, self.c, self.h = nn.Linear(6, 8), kind(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        state = None
        for step in range(3):
            state = self.c(torch.relu(self.i(x[:, step])), state)
        return self.h(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.thinned(2)
def test_recurrent_cells(kind):
    torch.manual_seed(0)
    net, x = Cells(kind).double().eval(), torch.randn(64, 3, 6, dtype=torch.float64)
    assert [(s.name, s.size, s.legality) for s in fxzip.inspect(net, x).spaces] == [
        ("i.weight", 8, "free"), ("c.weight_ih", 8, "free"),
    ]  # fmt: skip
    assert twin_error(net, x)[0] < 1e-12


class Sentences(nn.Module):
    """A classifier of sentences, in float32 as it is trained."""

    def __init__(self, kind, classes, **options):
        super().__init__()
        self.table, self.layers = nn.Embedding(30, 8), kind(8, 12, batch_first=True, **options)
        self.head = nn.Linear(12 * (1 + self.layers.bidirectional), classes)

    def forward(self, ids):
        return self.head(self.layers(self.table(ids))[0].amax(1))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False}])
@pytest.mark.thinned(3)
def test_recurrent_classifiers_share_all_but_their_heads(kind, options):
    torch.manual_seed(0)
    a, b = Sentences(kind, 3, **options).eval(), Sentences(kind, 4, **options).eval()
    ids = torch.randint(0, 30, (64, 5))
    zipped = fxzip.compile_zip(a, b, ids[:4], data=[ids], progress=False)
    assert zipped.report["cut"]["after"] == ["amax"]
    assert [(s["size"], s["legality"]) for s in zipped.report["spaces"]][:2] == [(8, "free"), (12, "free")]
    assert zipped.report["barriers"] == []
    assert twin_error(a, ids)[0] < 1e-6


class Prompts(nn.Module):
    """Learned rows in front of its own; here there are none."""

    def __init__(self):
        super().__init__()
        self.first, self.prompts, self.head = nn.Linear(6, 8), nn.Parameter(torch.empty(0, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.cat([self.prompts, torch.relu(self.first(x))]))


def test_a_parameter_without_rows():
    torch.manual_seed(0)
    error, zipped = twin_error(Prompts().double().eval(), torch.randn(20, 6, dtype=torch.float64))
    assert error < 1e-12
    assert zipped.report["cut"]["after"] == ["cat"]


class Bags(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.e, self.b, self.h = nn.EmbeddingBag(20, 8, mode=mode), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, rows):
        return self.h(torch.relu(self.b(torch.relu(self.e(rows)))))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode):
    torch.manual_seed(0)
    net, rows = Bags(mode).double().eval(), torch.randint(0, 20, (64, 5))
    assert [(s.name, s.size) for s in fxzip.inspect(net, rows).spaces] == [("e.weight", 8), ("b.weight", 8)]
    assert twin_error(net, rows)[0] < 1e-12


class Waves(nn.Module):
    """A diagonal state space model (Gu et al. 2022, S4D): complex parameters, transforms along time."""

    def __init__(self, width=8, states=4):
        super().__init__()
        self.i, self.o, self.h = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.step, self.c = nn.Parameter(torch.rand(width) - 2), nn.Parameter(torch.randn(width, states, 2))
        self.decay, self.wave = (nn.Parameter(torch.randn(width, states)) for _ in range(2))

    def forward(self, x):
        u = self.i(x).transpose(1, 2)
        length, a = u.shape[-1], -self.decay.exp() + 1j * self.wave
        step = a * self.step.exp()[:, None]
        scale = torch.view_as_complex(self.c) * (step.exp() - 1.0) / a
        kernel = 2 * torch.einsum("hn,hnl->hl", scale, torch.exp(step[..., None] * torch.arange(length))).real
        y = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        y = F.gelu(torch.fft.irfft(y, n=2 * length)[..., :length])
        return self.h(F.gelu(self.o(y.transpose(1, 2))).mean(1))


def test_a_state_space_model_with_transforms_along_time():
    torch.manual_seed(0)
    net, x = Waves().double().eval(), torch.randn(32, 7, 6, dtype=torch.float64)
    found = [(s.size, s.legality) for s in fxzip.inspect(net, x).spaces]
    assert sorted(found) == [(4, "relabel only"), (8, "free"), (8, "free")]  # states decay by a function of parameters
    assert twin_error(net, x)[0] < 1e-12


class Masked(nn.Module):
    """A layer on those rows of [B, T, C] that a mask [B, T] picks."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.h = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, mask):
        y = torch.relu(self.a(x))
        z = torch.zeros_like(y)
        z[mask] = self.b(y[mask])
        return self.h(z.mean(1))


def test_masks_of_fewer_axes_than_what_they_pick():
    torch.manual_seed(0)
    net = Masked().double().eval()
    inputs = torch.randn(16, 9, 6, dtype=torch.float64), torch.rand(16, 9) > 0.3
    assert [(s.name, s.size) for s in fxzip.inspect(net, inputs).spaces] == [("a.weight", 8), ("b.weight", 8)]
    assert twin_error(net, inputs)[0] < 1e-12


@pytest.mark.parametrize("taken", [lambda x, gate: x[gate], lambda x, gate: x[torch.where(gate)[0]]])
def test_the_trunk_ends_where_the_model_decides_how_many_rows_there_are(taken):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.g, self.b, self.h = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.h(torch.relu(self.b(taken(x, self.g(x)[:, 0] > 0))).sum(0, keepdim=True) + x)

    torch.manual_seed(0)
    labelling = fxzip.analysis.label(fxzip.tracing.trace(Gated(), torch.randn(16, 6)), fxzip.RULES)
    (barrier,) = labelling.barriers
    assert "is computed with parameters, so that each model takes others" in barrier.reason


def test_a_maximum_over_features_keeps_their_number():
    torch.manual_seed(0)
    nets = [Net(lambda net, x: x - x.amax(1, keepdim=True)).double().eval() for _ in range(2)]
    x = torch.randn(64, 6, dtype=torch.float64)
    zipped = fxzip.compile_zip(*nets, x, data=[x], width=1.5, method="zip", refit=None, progress=False)
    kept = {space["name"]: (space["size"], space["kept"]) for space in zipped.report["spaces"]}
    assert kept["a.weight"] == (8, 8)
    assert any("a maximum over its features depends on which there are" in str(note) for note in zipped.report["notes"])


def complex_weights(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=torch.complex64) / 2)


COMPLEX = {
    "a complex layer": (
        lambda net, x: torch.view_as_real(F.linear(torch.complex(x, x.roll(1, 0)), net.w)).pow(2).sum(-1),
        {"w": lambda: complex_weights(8, 8)}),
    "a spectral convolution": (
        lambda net, x: torch.fft.irfft(torch.einsum(
            "bix,iox->box", torch.fft.rfft(x[..., None] * torch.arange(1.0, 7.0).to(x)), net.w), n=6).amax(-1),
        {"w": lambda: complex_weights(8, 8, 4)}),
    "a state that turns": (
        lambda net, x: ((torch.exp(-net.rate.exp() + 1j * net.turn) * (x.to(net.w.dtype) @ net.w)) @ net.w.T).real,
        {"w": lambda: complex_weights(8, 6), "rate": lambda: weights(6), "turn": lambda: weights(6)}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_parameters_are_shared(name):
    function, parts = COMPLEX[name]
    torch.manual_seed(0)
    net = Net(function, **{key: build() for key, build in parts.items()}).eval()
    for part in net.parameters():
        part.data = part.data.to(torch.complex128 if part.is_complex() else torch.float64)
    error, zipped = twin_error(net, torch.randn(16, 6, dtype=torch.float64))
    assert error < 1e-9
    assert not any("ends earlier" in note for note in zipped.report["notes"])
    assert zipped.report["flops"]["trunk"] > 0.8 * zipped.report["flops"]["originals"][0]

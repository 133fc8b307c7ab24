"""Parameters that are met block by block: one weight per head, in every way to write it, and scales of heads.

Each block has features of its own: a zip with a copy whose blocks have orders of their own is the network.
"""

import copy

import pytest
import torch
from torch import nn

import fxzip
from fxzip.analysis import ParamLabels, analyse
from fxzip.analysis.rules import ConstraintStore
from fxzip.tracing import trace

HEADS, INNER, OUTER = 2, 4, 3
WAYS = {
    "einsum": lambda x, w: torch.einsum("...gc,gcd->...gd", x, w).flatten(-2),
    "bmm": lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1).reshape(len(x), -1),
    "matmul": lambda x, w: (x[..., None, :] @ w).flatten(1),
    "products": lambda x, w: (x[..., None] * w).sum(-2).flatten(-2),
}


class Heads(nn.Module):
    """A weight for each head, and with `scaled` a scale and a shift for each feature of a head in front of it."""

    def __init__(self, way="einsum", scaled=False, inner=INNER):
        super().__init__()
        self.way, self.scaled = WAYS[way], scaled
        self.a, self.o, self.h = nn.Linear(5, HEADS * inner), nn.Linear(HEADS * OUTER, 5), nn.Linear(5, 3)
        self.w = nn.Parameter(torch.randn(HEADS, inner, OUTER))
        self.scale = nn.Parameter(torch.rand(HEADS, inner) + 0.5)
        self.shift = nn.Parameter(torch.randn(HEADS, inner))

    def forward(self, x):
        x = torch.relu(self.a(x)).unflatten(-1, (HEADS, -1))
        if self.scaled:
            x = torch.tanh(x * self.scale + self.shift)
        return self.h(torch.relu(self.o(self.way(x, self.w))))

    def counterpart(self):
        """The same function: heads in another order, features of each head in an order of its own."""
        twin = copy.deepcopy(self)
        heads, inner = torch.tensor([1, 0]), self.w.shape[1]
        rows = torch.stack([torch.randperm(inner) for _ in range(HEADS)])
        columns = torch.stack([torch.randperm(OUTER) for _ in range(HEADS)])
        entering = (heads[:, None] * inner + rows).flatten()
        leaving = (heads[:, None] * OUTER + columns).flatten()
        with torch.no_grad():
            twin.a.weight.copy_(self.a.weight[entering])
            twin.a.bias.copy_(self.a.bias[entering])
            for own, values in ((twin.scale, self.scale), (twin.shift, self.shift)):
                own.copy_(values.flatten()[entering].view_as(own))
            for head, (row, column) in enumerate(zip(rows, columns, strict=True)):
                twin.w[head] = self.w[heads[head]][row][:, column]
            twin.o.weight.copy_(self.o.weight[:, leaving])
        return twin


X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).double()
SETTINGS = {
    "the defaults": {},
    "permutations": {"method": "permute", "refit": None},
    "ZipIt!": {"method": "zip", "refit": "repair"},
    "weights alone": {"method": "weights", "refit": None},
    "an early end": {"method": "permute", "refit": None, "until": 0.6},
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("way", [*WAYS, "scaled"])
def test_blocks_have_features_of_their_own(way, setting):
    model = Heads(scaled=True) if way == "scaled" else Heads(way)
    model, twin = model.double().eval(), model.double().counterpart().eval()
    y = model(X)
    torch.testing.assert_close(twin(X), y, rtol=0, atol=1e-12)
    zipped = fxzip.compile_zip(model, twin, X[:4], data=[X], progress=False, **SETTINGS[setting])
    for found in zipped(X):
        torch.testing.assert_close(found, y, rtol=0, atol=1e-9)


def test_how_features_lie_in_blocks():
    found = analyse(trace(Heads(scaled=True).double(), X[:4])).spaces
    spaces = {(space.name, space.size): space for space in found.spaces}
    assert spaces["scale", HEADS * INNER].blocks.shape == (HEADS, INNER)
    assert spaces["w", HEADS * OUTER].blocks.shape == (HEADS, OUTER)
    assert spaces["scale", HEADS * INNER].tie == spaces["w", HEADS * OUTER].tie is not None
    assert spaces["o.weight", 5].legality == "free"


def test_networks_with_heads_of_other_sizes():
    models = [Heads(scaled=True, inner=n).double().eval() for n in (4, 6)]
    zipped = fxzip.compile_zip(*models, X[:4], data=[X], progress=False)
    assert [value.shape for name, value in zipped.named_parameters() if name == "trunk.w"] == [(HEADS, 4, OUTER)]
    assert all(y.isfinite().all() for y in zipped(X))


def test_a_scale_over_features_that_are_seen_in_two_axes_has_no_blocks():
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.h, self.scale = nn.Linear(5, 6), nn.Linear(6, 3), nn.Parameter(torch.rand(2, 3))

        def forward(self, x):
            return self.h((torch.relu(self.a(x)).unflatten(-1, (2, 3)) * self.scale).flatten(1))

    (space,) = analyse(trace(Seen().double(), X[:4])).spaces.spaces
    assert (space.size, space.legality) == (6, "free")


def test_experts_that_read_the_same_features_keep_labels_by_axis():
    """Nothing that they read lies in blocks."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.h, self.w = nn.Linear(5, 6), nn.Linear(7, 3), nn.Parameter(torch.randn(2, 6, 7))

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.h(torch.bmm(x.expand(2, *x.shape), self.w).relu().sum(0))

    labels = analyse(trace(Experts().double(), X[:4])).spaces.labelling.params["w"]
    assert labels.order is None
    assert [field.numel() for field in labels.fields] == [2, 6, 7]


# how features come from an input [B, 5] and a weight, the weight's shape, and the axes that a view lays along one
LAID = {
    "bmm": (
        lambda x, w: torch.bmm(x.expand(HEADS, *x.shape), w).transpose(0, 1).flatten(1), (HEADS, 5, OUTER), (0, 2)),
    "einsum": (lambda x, w: torch.einsum("bc,hcd->bhd", x, w).flatten(1), (HEADS, 5, OUTER), (0, 2)),
    "features first": (lambda x, w: torch.einsum("bc,hcd->bdh", x, w).flatten(1), (HEADS, 5, OUTER), (2, 0)),
    "heads last": (lambda x, w: torch.einsum("bc,cdh->bhd", x, w).flatten(1), (5, OUTER, HEADS), (2, 1)),
    "matmul": (lambda x, w: (x @ w).transpose(0, 1).reshape(len(x), -1), (HEADS, 5, OUTER), (0, 2)),
    "heads of heads": (lambda x, w: torch.einsum("bc,ghcd->bghd", x, w).flatten(1), (3, HEADS, 5, OUTER), (0, 1, 3)),
    "a view of the weight": (lambda x, w: x @ w.transpose(0, 1).reshape(5, -1), (HEADS, 5, OUTER), (0, 2)),
    "a sum": (lambda x, w: x.sum(1, keepdim=True) + w[:, 0].reshape(-1), (HEADS, 5, OUTER), (0, 2)),
}  # fmt: skip


class Laid(nn.Module):
    """A weight with axes of heads and of their features, which a view lays along one: all of them may move freely."""

    def __init__(self, name, behind=False):
        super().__init__()
        self.way, shape, self.axes = LAID[name]
        self.a, self.w = nn.Linear(5, 5) if behind else nn.Identity(), nn.Parameter(torch.randn(shape))
        self.o, self.h = nn.Linear(self.w.numel() // 5, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.h(torch.relu(self.o(torch.tanh(self.way(torch.tanh(self.a(x)), self.w)))))

    def counterpart(self):
        """The same function, with the features in another order."""
        twin = copy.deepcopy(self)
        order = torch.randperm(self.o.in_features)
        with torch.no_grad():
            ends = range(len(self.axes))
            moved = self.w.movedim(self.axes, tuple(ends))
            shuffled = moved.flatten(0, ends[-1])[order].view(moved.shape)
            twin.w.copy_(shuffled.movedim(tuple(ends), self.axes))
            twin.o.weight.copy_(self.o.weight[:, order])
        return twin


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", LAID)
@pytest.mark.thinned(3)
def test_axes_that_a_view_lays_along_one_have_features_at_once(name, behind):
    torch.manual_seed(0)
    model = Laid(name, behind).double().eval()
    twin, other, y = model.counterpart(), Laid(name, behind).double().eval(), model(X)
    torch.testing.assert_close(twin(X), y, rtol=0, atol=1e-12)
    spaces = {(space.size, space.legality) for space in fxzip.inspect(model, X[:4]).spaces}
    assert (model.o.in_features, "free") in spaces
    for setting in SETTINGS.values():
        for found in fxzip.compile_zip(model, twin, X[:4], data=[X], progress=False, **setting)(X):
            torch.testing.assert_close(found, y, rtol=0, atol=1e-9)
    zipped = fxzip.compile_zip(model, other, X[:4], data=[X], progress=False, until="tanh_1")
    assert model.o.in_features in {space["size"] for space in zipped.report["spaces"]}


@pytest.mark.parametrize("setting", ["the defaults", "permutations"])
@pytest.mark.parametrize("order", ["hdc", "hcd", "dhc", "dch", "chd", "cdh"])
def test_a_head_sums_over_several_axes_of_a_weight_at_once(order, setting):
    """The features that it wants are given back in its weight, whatever the order of the weight's axes."""

    class Summing(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(HEADS, 5, 4))
            self.o = nn.Parameter(torch.randn([{"h": HEADS, "d": 4, "c": 7}[axis] for axis in order]))

        def forward(self, x):
            return torch.einsum(f"bhd,{order}->bc", torch.tanh(torch.einsum("bc,hcd->bhd", x, self.w)), self.o)

    torch.manual_seed(0)
    model = Summing().double().eval()
    twin = fxzip.relabel(model, X[:4])
    assert not torch.equal(twin.o, model.o)
    zipped = fxzip.compile_zip(model, twin, X[:4], data=[X], progress=False, **SETTINGS[setting])
    assert [(own["size"], own["folded"]) for own in zipped.report["spaces"]] == [(HEADS * 4, [True, True])]
    for found in zipped(X):
        torch.testing.assert_close(found, model(X), rtol=0, atol=1e-12)


class Crossed(nn.Module):
    """Features of two kinds, of two parameters, along one axis."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.s = nn.Linear(5, 4), nn.Linear(5, 3), nn.Parameter(torch.randn(3))
        self.o, self.h, self.way = nn.Linear(12, 6), nn.Linear(6, 3), way

    def forward(self, x):
        return self.h(torch.relu(self.o(torch.tanh(self.way(self, x)))))


CROSSED = {
    "outer": lambda s, x: torch.einsum("bi,bj->bij", s.a(x), s.b(x)).flatten(1),
    "the other way round": lambda s, x: torch.einsum("bi,bj->bji", s.a(x), s.b(x)).flatten(1),
    "scales": lambda s, x: (s.a(x)[:, None] * s.s[:, None]).flatten(1),
    "pairs by number": lambda s, x: torch.einsum("bi,bj->bij", s.a(x), s.b(x))[
        :, torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)],
    "pairs that lie anyhow": lambda s, x: torch.einsum("bi,bj->bij", s.a(x), s.b(x))[
        :, torch.arange(12) % 4, torch.tensor([0, 1, 2, 0, 1, 2, 2, 1, 0, 0, 0, 1])],
}  # fmt: skip


@pytest.mark.parametrize("name", CROSSED)
def test_features_of_two_parameters_along_one_axis(name):
    """The larger kind moves alike for all of the smaller one, which stays where both are read; where pairs are no grid
    none moves."""
    torch.manual_seed(0)
    model, other = (Crossed(CROSSED[name]).double().eval() for _ in range(2))
    twin, y = copy.deepcopy(model), model(X)
    order, grid = torch.tensor([2, 0, 3, 1]), model.o.weight.detach()
    if name != "pairs that lie anyhow":
        first = name in ("outer", "pairs by number")
        grid = grid.unflatten(1, (4, 3))[:, order] if first else grid.unflatten(1, (3, 4))[:, :, order]
        with torch.no_grad():
            twin.a.weight.copy_(model.a.weight[order])
            twin.a.bias.copy_(model.a.bias[order])
            twin.o.weight.copy_(grid.flatten(1))
    torch.testing.assert_close(twin(X), y, rtol=0, atol=1e-12)
    pinned = {space.name for space in fxzip.inspect(model, X[:4]).spaces}
    assert ("a.weight" in pinned) == (name != "pairs that lie anyhow")
    for found in fxzip.compile_zip(model, twin, X[:4], data=[X], progress=False, method="permute", refit=None)(X):
        torch.testing.assert_close(found, y, rtol=0, atol=1e-9)
    zipped = fxzip.compile_zip(model, other, X[:4], data=[X], progress=False, method="permute", refit=None, width=2)
    assert not torch.equal(*zipped(X))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["outer", "scales"])
def test_features_that_lie_across_others_are_observed_whatever_the_order_of_these(name, setting):
    """The trunk ends where both kinds have an order of their own, along one axis."""
    torch.manual_seed(0)
    model = Crossed(CROSSED[name]).double().eval()
    twin, y = copy.deepcopy(model), model(X)
    of_a, of_other = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    orders = {"a.weight": of_a, "a.bias": of_a, "b.weight": of_other, "b.bias": of_other, "s": of_other}
    with torch.no_grad():
        for path, order in orders.items():
            twin.get_parameter(path).copy_(model.get_parameter(path)[order])
        first, second = (of_a, of_other) if name == "outer" else (of_other, of_a)
        grid = model.o.weight.unflatten(1, (len(first), len(second)))
        twin.o.weight.copy_(grid[:, first][:, :, second].flatten(1))
    torch.testing.assert_close(twin(X), y, rtol=0, atol=1e-12)
    options = SETTINGS[setting] | {"until": "tanh"}
    for found in fxzip.compile_zip(model, twin, X[:4], data=[X], progress=False, **options)(X):
        torch.testing.assert_close(found, y, rtol=0, atol=1e-9)


class PerHead(nn.Module):
    """Attention with a weight for each head, all of which read the same features (as in TransformerLens)."""

    def __init__(self, joined):
        super().__init__()
        self.i, self.o, self.joined = nn.Linear(5, 8), nn.Linear(8, 3), joined
        self.q, self.k, self.v = (nn.Parameter(torch.randn(HEADS, 8, 4) / 3) for _ in range(3))
        self.back = nn.Parameter(torch.randn(HEADS, 4, 8) / 3)

    def forward(self, x):
        x = self.i(x)
        q, k, v = (torch.einsum("bpd,ndh->bpnh", x, w) for w in (self.q, self.k, self.v))
        z = torch.einsum("bnqk,bknh->bqnh", torch.einsum("bqnh,bknh->bnqk", q, k).softmax(-1), v)
        y = z.flatten(2) @ self.back.flatten(0, 1) if self.joined else torch.einsum("bqnh,nhd->bqd", z, self.back)
        return self.o(torch.tanh(x + y))


class Mixed(nn.Module):
    """Kernels mixed for each input (dynamic convolution): both axes of a kernel have features of their own."""

    def __init__(self, places):
        super().__init__()
        self.a, self.r, self.o = nn.Conv1d(1, 6, 1), nn.Linear(6, 4), nn.Linear(7, 3)
        self.w = nn.Parameter(torch.randn(4, 7, 6, *places) / 3)

    def forward(self, x):
        h = torch.relu(self.a(x[:, None]))
        w = torch.einsum("bk,koi...->boi...", self.r(h.mean(2)).softmax(-1), self.w)
        if w.ndim == 4:
            y = nn.functional.conv1d(h.reshape(1, -1, 5), w.flatten(0, 1), padding=1, groups=len(x)).view(len(x), 7, 5)
        else:
            y = torch.bmm(w, h)
        return self.o(torch.relu(y).mean(2))


class Scales(nn.Module):
    """Features at several scales, joined along one axis for a head, which folds one kind only."""

    def __init__(self):
        super().__init__()
        self.a, self.w, self.o = nn.Linear(5, 6), nn.Parameter(torch.randn(4, 6, 6) / 3), nn.Linear(28, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        y = torch.einsum("bpc,scd->bpsd", h, self.w)
        return self.o(torch.cat([y.flatten(2), torch.einsum("bpsd,bpd->bps", y, h)], -1))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("build", "shared"),
    [
        (lambda: PerHead(False), {("q", 8), ("v", 8)}),
        (lambda: PerHead(True), {("q", 8), ("back", 8)}),
        (lambda: Mixed(()), {("w", 7), ("r.weight", 4)}),
        (lambda: Mixed((3,)), {("a.weight", 6), ("r.weight", 4)}),
        (Scales, {("w", 4)}),
    ],
    ids=["heads", "joined heads", "mixed weights", "mixed kernels", "scales"],
)
@pytest.mark.thinned(2)
def test_what_einsum_lays_along_one_axis_and_takes_apart_again(build, shared, setting):
    torch.manual_seed(0)
    x = X if isinstance(build(), Mixed) else torch.randn(32, 6, 5, dtype=torch.float64)
    model = build().double().eval()
    twin = fxzip.relabel(model, x[:4], seed=1)
    options = {key: value for key, value in SETTINGS[setting].items() if key != "until"}
    zipped = fxzip.compile_zip(model, twin, x[:4], data=[x], progress=False, **options)
    assert shared <= {(space["name"], space["size"]) for space in zipped.report["spaces"]}
    for found in zipped(x):
        torch.testing.assert_close(found, model(x), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("shape", "blocks"), [([2, 3, 4], 0), ([3, 2, 4], 1), ([3, 4, 2], 2), ([2, 1, 3], 0), ([3, 2], 1)]
)
def test_a_parameter_and_its_kernel(shape, blocks):
    labels = ParamLabels.in_blocks(ConstraintStore(), shape, blocks)
    value = torch.randn(shape)
    kernel = labels.kernel(value)
    assert torch.equal(labels.natural(kernel), value)
    for field, (axis, run) in zip(labels.fields, labels.runs(), strict=True):
        assert run.unique().numel() == field.numel()
        assert len(run) == (kernel.shape[0] if axis == 0 else labels.groups * kernel.shape[1])


class Sink(nn.Module):
    """Attention whose softmax knows a score of each head that no token has (an attention sink)."""

    def __init__(self):
        super().__init__()
        self.i, self.o, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.sink = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = torch.tanh(self.i(x))
        q, k, v = (f(x).unflatten(-1, (4, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        none = self.sink[:, None, None].expand(x.shape[0], -1, x.shape[1], 1)
        scores = torch.cat([q @ k.mT, none], -1).softmax(-1)
        return self.c(torch.tanh(self.o((scores[..., :-1] @ v).transpose(1, 2).flatten(2))))

    def counterpart(self):
        twin, heads = copy.deepcopy(self), torch.tensor([2, 0, 3, 1])
        places = (heads[:, None] * 2 + torch.arange(2)).flatten()
        with torch.no_grad():
            twin.sink.copy_(self.sink[heads])
            for name in "qkv":
                getattr(twin, name).weight.copy_(getattr(self, name).weight[places])
                getattr(twin, name).bias.copy_(getattr(self, name).bias[places])
            twin.o.weight.copy_(self.o.weight[:, places])
        return twin


@pytest.mark.parametrize("setting", [name for name in SETTINGS if "until" not in SETTINGS[name]])
def test_a_parameter_that_only_a_softmax_reads_beside_the_scores_of_heads_moves_with_these(setting):
    x, model = torch.randn(64, 5, 6, dtype=torch.float64), Sink().double().eval()
    zipped = fxzip.compile_zip(model, model.counterpart(), x[:4], data=[x], until="o", **SETTINGS[setting])
    assert "sink" in {space["name"] for space in zipped.report["spaces"]}
    for found in zipped(x):
        torch.testing.assert_close(found, model(x), rtol=1e-6, atol=1e-6)

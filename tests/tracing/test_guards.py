"""Numbers, settings and sizes that a trace takes for granted: read by the graph, or checked whenever it runs."""

import math
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.calibration.shapes import other_shapes
from fxzip.tracing import difference, ladder, require, trace
from fxzip.tracing.model_builtins import recorded_len


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.t, self.b = nn.Linear(8, 16), nn.Embedding(1000, 16), nn.Linear(16, 8)

    def forward(self, x, step, scale=1.0, mode="plain", mask=None):
        scale = scale * 2 if scale > 2 else scale
        hidden = torch.relu(self.a(x) + self.t(torch.tensor([step])) + math.sqrt(step)) * scale
        return self.b(hidden if mask is None else hidden * mask)


def zipped_denoisers():
    torch.manual_seed(0)
    a, b = (Denoiser().double().eval() for _ in range(2))
    sample = (torch.randn(4, 8, dtype=torch.float64), 10, 1.0, "plain", None)
    zipped = fxzip.compile_zip(a, b, sample, method="permute", refit=None, width=2.0, progress=False)
    return a, b, zipped, sample


def test_a_number_is_an_argument():
    a, b, zipped, (x, *_) = zipped_denoisers()
    for network in (zipped, pickle.loads(pickle.dumps(zipped))):
        for step, scale in ((10, 1.0), (900, 1.0), (3, 0.25)):
            given = (x, step, scale, "plain", None)
            for k, model in enumerate((a, b)):
                torch.testing.assert_close(network(*given)[k], model(*given))
                torch.testing.assert_close(network.single(k)(*given), model(*given))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, 3.0, r"`bool` of `gt` at test_guards.py:\d+ must give what it gave .* traced, False; it gives True now"),
        (3, "other", "Argument `mode` must be what the network was traced with, 'plain'; found 'other'"),
        (4, torch.ones(4, 16), r"Argument `mask` must be .* traced with, None; found a tensor of shape \(4, 16\)"),
    ],
)
def test_what_is_built_in_is_checked(place, value, message):
    _, _, zipped, sample = zipped_denoisers()
    given = [*sample[:place], value, *sample[place + 1 :]]
    zipped.graph.eliminate_dead_code()
    zipped.recompile()
    for network in (zipped, zipped.single(1), pickle.loads(pickle.dumps(zipped))):
        with pytest.raises(fxzip.SpecializationError, match=message):
            network(*given)
    with pytest.raises(fxzip.FxzipError, match=f"{message}|Batch 0 of `data` must hold 5 inputs"):
        fxzip.compile_zip(Denoiser().double(), Denoiser().double(), sample, data=[given], progress=False)


class Uses(nn.Module):
    """A number used in one way."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(8, 16), nn.Linear(16, 3), how

    def forward(self, x, n):
        return self.b(self.how(torch.relu(self.a(x)), n))


READ = {
    "factor": lambda h, n: h * n + 1 / n,
    "full": lambda h, n: h + torch.full((1, 16), n),
    "compared": lambda h, n: torch.where(h > n, h, torch.zeros_like(h)),
    "tensor": lambda h, n: h * torch.tensor([n, n + 1]).sum(),
    "mask": lambda h, n: h * (torch.arange(16) < n),
    "math": lambda h, n: h * math.exp(-math.log(n + 1)),
    "clamped": lambda h, n: h.clamp(max=n) ** n,
}
BUILT_IN = {
    "slice": lambda h, n: torch.cat([h[:, :n], 2 * h[:, n:]], 1),
    "loop": lambda h, n: sum((h * k for k in range(n)), h),
    "index": lambda h, n: h * (1.0, 2.0, 3.0, 4.0, 5.0)[n],
    "name": lambda h, n: h * float(f"{n}"),
    "roll": lambda h, n: h.roll(n, 1),
    "table": lambda h, n: h * {2: 5.0, 3: 7.0}[n],
    "conversion": lambda h, n: h * float(n),
}


@pytest.mark.parametrize("how", READ)
def test_numbers_that_a_graph_reads(how):
    net = Uses(READ[how]).double().eval()
    x = torch.randn(4, 8, dtype=torch.float64)
    program = trace(net, (x, 2))
    for n in (2, 3, 5):
        torch.testing.assert_close(program.module(x, n), net(x, n))


def test_a_mask_by_a_number_keeps_features_in_place():
    """On the sample the mask is the same everywhere; for another number it is not."""
    a = Uses(READ["mask"]).double().eval()
    x = torch.randn(8, 8, dtype=torch.float64)
    twin = fxzip.relabel(a, (x, 16))
    torch.testing.assert_close(twin(x, 5), a(x, 5))


@pytest.mark.parametrize("how", BUILT_IN)
def test_numbers_that_are_built_in(how):
    net = Uses(BUILT_IN[how]).double().eval()
    x = torch.randn(4, 8, dtype=torch.float64)
    program = trace(net, (x, 2))
    torch.testing.assert_close(program.module(x, 2), net(x, 2))
    with pytest.raises(fxzip.SpecializationError, match=r"traced(, | with, )2.*3"):
        program.module(x, 3)


class Options(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x, options):
        return self.fc(x) * (2 if options["double"] else 1) + sum(options.get("add", ()))


@pytest.mark.parametrize("rung", ladder.RUNGS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"double": True, "add": []}, r"Argument `options\['double'\]` must be .*, False; found True"),
        (
            {"double": False, "add": [torch.ones(3)]},
            r"`options\['add'\]` must be .*, a list of 0; found a list",
        ),
        ({"double": False}, r"Argument `options` must be .*, a dict with \['double', 'add'\]; found a dict"),
    ],
)
def test_settings_in_containers(rung, options, message, monkeypatch):
    monkeypatch.setattr(ladder, "RUNGS", (rung,))
    net, x = Options().eval(), torch.randn(2, 8)
    program = trace(net, (x, {"double": False, "add": []}))
    torch.testing.assert_close(program.module(x, OrderedDict(double=False, add=())), net(x, {"double": False}))
    with pytest.raises(fxzip.SpecializationError, match=message):
        program.module(x, options)


class Sizes(nn.Module):
    """Python that looks at sizes, in one way."""

    def __init__(self, how, features=6):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(features, 16), nn.Linear(16, 3), how

    def forward(self, x):
        return self.b(self.how(torch.relu(self.a(x))).mean(1))


LOOKED_AT = {
    "loop": lambda h: torch.stack([h[:, t] * t for t in range(h.shape[1])], 1),
    "condition": lambda h: h * 2 if h.shape[1] > 8 else h,
    "int": lambda h: h[:, : int(h.shape[1] * 0.5)],
    "odd": lambda h: F.pad(h, (0, 0, 0, 1)) if h.size(1) % 2 else h,
    "rows": lambda h: torch.stack([row * k for k, row in enumerate(h.transpose(0, 1))], 1),
    "chunks": lambda h: torch.stack([part.sum(1) for part in h.split(4, 1)], 1),
    "unbind": lambda h: torch.stack(h.unbind(1)[::-1], 1) * len(h.unbind(1)),
}
DYNAMIC = {
    "len": lambda h: h * len(h.transpose(0, 1)),
    "len of the batch": lambda h: h.reshape(len(h), -1, 16) + len(h),
    "half": lambda h: h[:, : h.shape[1] // 2],
    "view": lambda h: h.reshape(h.shape[0], -1, 16) * h.shape[1],
    "positions": lambda h: h * torch.arange(h.shape[1])[None, :, None],
}


@pytest.mark.parametrize("how", LOOKED_AT)
@pytest.mark.thinned(2)
def test_sizes_that_python_looks_at(how):
    net = Sizes(LOOKED_AT[how]).double().eval()
    x, longer = (torch.randn(2, n, 6, dtype=torch.float64) for n in (6, 13))
    program = trace(net, x)
    torch.testing.assert_close(program.module(x), net(x))
    with pytest.raises(fxzip.SpecializationError, match=r"at test_guards.py:\d+ must give what it gave"):
        program.module(longer)
    with pytest.raises(
        fxzip.TraceError, match=r"every shape that `data` holds.*`data` of shape \(2, 13, 6\).*_guards\.py:\d+"
    ):
        fxzip.compile_zip(net, net, x, data=[x, longer], progress=False)


@pytest.mark.parametrize("how", DYNAMIC)
def test_sizes_in_the_graph(how):
    net = Sizes(DYNAMIC[how]).double().eval()
    x, longer = (torch.randn(2, n, 6, dtype=torch.float64) for n in (6, 13))
    zipped = fxzip.compile_zip(net, net, x, data=[x, longer], method="permute", refit=None, progress=False)
    assert zipped.report["checked_shapes"] == [[(None, 6, 6)], [(None, 13, 6)]]
    for given in (x, longer):
        torch.testing.assert_close(zipped(given)[1], net(given))


def test_len_is_what_it_was_after_a_trace():
    net = Sizes(DYNAMIC["len"]).double().eval()
    trace(net, torch.randn(2, 6, 6, dtype=torch.float64))
    assert "len" not in globals()
    assert recorded_len("abc") == 3


def test_export_is_dynamic_where_data_differ(monkeypatch):
    monkeypatch.setattr(ladder, "RUNGS", ("export",))
    net = Sizes(DYNAMIC["half"]).double().eval()
    x, longer = (torch.randn(2, n, 6, dtype=torch.float64) for n in (6, 12))
    zipped = fxzip.compile_zip(net, net, x, data=[x, longer], method="permute", refit=None, progress=False)
    torch.testing.assert_close(zipped(longer)[1], net(longer))


def test_guards_inside_a_head_and_at_a_cut():
    """What Python asks about a hidden value is asked in the zip, wherever the trunk ends."""
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Sizes(LOOKED_AT["condition"], 8)).eval() for _ in range(2))
    x = torch.randn(4, 5, 6)
    for until in ("1", None, "0"):
        zipped = fxzip.compile_zip(a, b, x, until=until, progress=False)
        assert any(node.target is require for node in zipped.graph.nodes)
        for network in (zipped, zipped.single(0), zipped.single(1)):
            network(x[:, :4])
            with pytest.raises(fxzip.SpecializationError, match="`bool` of `gt"):
                network(torch.randn(4, 9, 6))


def test_other_shapes_are_few_and_small():
    sample = fxzip.tracing.calls.as_call(torch.ones(4, 7))
    data = [torch.ones(5, n) for n in range(7, 40)]
    calls = other_shapes(fxzip.calibration.Calibration.of(data, sample, 2, False), sample)
    assert len(calls) == 16
    assert calls[0].args[0].shape == (2, 8)
    assert difference(calls[0].args[0], torch.ones(2, 8)) is None


class Optional(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, classes)

    def forward(self, x, mask=None, more=()):
        hidden = torch.relu(self.first(x))
        hidden = hidden if mask is None else hidden * mask[:, None]
        return self.head(hidden + sum(more))


@pytest.mark.parametrize("rung", ladder.RUNGS)
def test_none_in_the_place_of_a_tensor_is_named(rung, monkeypatch):
    monkeypatch.setattr(ladder, "RUNGS", (rung,))
    x, mask, more = torch.randn(40, 8), torch.rand(40), [torch.randn(40, 16)]
    sample = (x, mask, more)
    zipped = fxzip.compile_zip(Optional(2), Optional(3), sample, data=[sample], progress=False)
    assert [tuple(y.shape) for y in zipped(x, mask, more)] == [(40, 2), (40, 3)]
    for network in (zipped, zipped.single(1), pickle.loads(pickle.dumps(zipped))):
        with pytest.raises(fxzip.errors.SpecializationError, match=r"`mask` must be .* a tensor; found None"):
            network(x, None, more)
        with pytest.raises(fxzip.errors.SpecializationError, match=r"`more\[0\]` must be .* a tensor; found None"):
            network(x, mask, [None])


class Asks(nn.Module):
    """Python that asks something of the input."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(6, 16), nn.Linear(16, 3), how

    def forward(self, x):
        doubled = self.how(x)
        return self.b(torch.relu(self.a(x.to(self.a.weight.dtype)))) * (2 if doubled else 1)


RANKS = {
    "dim": lambda x: x.dim() == 2,
    "ndim": lambda x: x.ndim == 2,
    "len": lambda x: len(x.shape) == 2,
    "size": lambda x: len(x.size()) == 2,
    "hidden": lambda x: (x + 1).ndim == 2,
}
TYPES = {
    "dtype": lambda x: x.dtype == torch.float32,
    "method": lambda x: x.is_floating_point(),
    "function": lambda x: torch.is_floating_point(x),
}


@pytest.mark.parametrize("how", RANKS)
def test_numbers_of_axes_that_python_looks_at(how):
    net = Asks(RANKS[how]).eval()
    x = torch.randn(4, 6)
    graph = trace(net, x).module
    torch.testing.assert_close(graph(x[:3]), net(x[:3]))
    with pytest.raises(fxzip.SpecializationError, match=r"the number of axes of `x` .* traced, 2; it gives 3 now"):
        graph(x[None])


def test_a_model_that_asks_for_no_axes_takes_any():
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(4, 6)
    torch.testing.assert_close(trace(net, x).module(x[None]), net(x[None]))


def test_export_fixes_the_number_of_axes(monkeypatch):
    monkeypatch.setattr(ladder, "RUNGS", ("export",))
    graph = trace(Asks(RANKS["dim"]).eval(), torch.randn(4, 6)).module
    with pytest.raises(fxzip.SpecializationError, match="the number of axes of `x`"):
        graph(torch.randn(4, 6, 6))


@pytest.mark.parametrize("how", TYPES)
def test_dtypes_of_arguments_that_python_looks_at(how):
    net = Asks(TYPES[how]).eval()
    x = torch.randn(4, 6)
    graph = trace(net, x).module
    torch.testing.assert_close(graph(x), net(x))
    with pytest.raises(fxzip.SpecializationError, match=r"at test_guards.py:\d+ must give what it gave"):
        graph((x * 9).long())


def test_whether_a_size_is_in_a_shape():
    net = Asks(lambda x: 9 in x.shape).eval()
    graph = trace(net, torch.randn(4, 5, 6)).module
    for size in (4, 7):
        x = torch.randn(size, size, 6)
        torch.testing.assert_close(graph(x), net(x))
    with pytest.raises(fxzip.SpecializationError, match="`bool` of `eq"):
        graph(torch.randn(4, 9, 6))


class Rows(nn.Module):
    """Rows one after another, by slices, which are empty behind the last one."""

    def __init__(self, step):
        super().__init__()
        self.a, self.step = nn.Linear(6, 3), step

    def forward(self, x):
        return torch.cat([self.a(x[i : i + self.step]) for i in range(0, x.shape[0], self.step)])


@pytest.mark.parametrize("step", [1, 2])
def test_a_loop_over_the_rows_of_a_batch_is_refused(step):
    """Unrolled it is right at every batch that is smaller than the sample."""
    with pytest.raises(fxzip.TraceError, match=r"every batch size.*test_guards\.py:\d+.*calls on all rows at once"):
        trace(Rows(step).eval(), torch.randn(8, 6))


class Mixing(nn.Module):
    """A kernel for each input, in one grouped convolution: PyTorch looks at the number of groups before the call."""

    def __init__(self):
        super().__init__()
        self.mix, self.w = nn.Linear(3, 2), nn.Parameter(torch.randn(2, 4, 3, 1))

    def forward(self, x):
        kernels = torch.einsum("bk,koit->boit", self.mix(x.mean(2)), self.w)
        groups = len(x) if kernels.ndim == 4 else 1  # a condition, so that the trace needs example values
        return F.conv1d(x.reshape(1, -1, x.shape[2]), kernels.flatten(0, 1), groups=groups).view(len(x), 4, -1)


def test_as_many_groups_as_inputs():
    net = Mixing().eval()
    program = trace(net, torch.randn(4, 3, 5))
    assert program.rung == "symbolic with example values"
    for size in (1, 3, 9):
        x = torch.randn(size, 3, 5)
        torch.testing.assert_close(program.module(x), net(x))


def test_a_number_that_is_asked_for_being_a_tensor():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x, step):
            return self.a(x) * (step if torch.is_tensor(step) else torch.tensor([step + 1]))

    net, x = Timed().eval(), torch.randn(4, 6)
    graph = trace(net, (x, 3)).module
    torch.testing.assert_close(graph(x, 7), net(x, 7))
    with pytest.raises(fxzip.SpecializationError, match=r"`step` must be .* a number; found a tensor of shape \(\)"):
        graph(x, torch.tensor(7))


def scaled(factor):
    def scale(y):
        return y * factor

    return scale


class Times:
    def __init__(self, factor):
        self.factor = factor

    def __repr__(self):
        return f"Times({self.factor})"

    def __call__(self, y):
        return y * self.factor

    def twice(self, y):
        return y * self.factor * 2


FUNCTIONS = [
    (scaled(2.0), scaled(2.0), scaled(3.0)),
    *[(double, double, triple) for double, triple in [(lambda y: y * 2, lambda y: y * 3)]],
    (Times(2.0).twice, Times(2.0).twice, Times(3.0).twice),
    (Times(2.0), Times(2.0), Times(3.0)),
]


@pytest.mark.parametrize(("given", "alike", "other"), FUNCTIONS)
def test_functions_that_are_made_where_they_are_used(given, alike, other):
    class Applied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x, function):
            return function(self.a(x))

    net, x = Applied().eval(), torch.randn(4, 6)
    graph = trace(net, (x, given)).module
    torch.testing.assert_close(graph(x, alike), net(x, alike))
    with pytest.raises(fxzip.SpecializationError, match="Argument `function` must be what the network was traced with"):
        graph(x, other)

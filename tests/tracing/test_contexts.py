"""Names, contexts and functions that are given to modules: what surrounds a compile does not change it."""

import builtins
import functools
import pickle
import types

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxzip
from fxzip.tracing import ladder, trace
from fxzip.tracing.names import safe_names


class Branch(nn.Module):
    def __init__(self, name, within, classes=3):
        super().__init__()
        self.head, self.name, self.within, self.parts = nn.Linear(16, classes), name, within, nn.ModuleDict()
        (self.parts if within else self).add_module(name, nn.Linear(8, 16))
        self.get_submodule(name if not within else f"parts.{name}").register_buffer("class", torch.ones(16))

    def forward(self, x):
        layer = self.parts[self.name] if self.within else getattr(self, self.name)
        return self.head(torch.relu(layer(x)) * getattr(layer, "class"))


CODE = ['a"), RUN(), getattr(self, "a', 'q"]; RUN(); ["', '" + str(RUN()) + "', "x\nRUN()\n", "back\\"]


@pytest.mark.parametrize(
    "name", ["graph", "code", "meta", "_graph", "class_", "global", "a b", "0", "layer-1", "__", *CODE]
)
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("rung", ladder.RUNGS[:2])
@pytest.mark.thinned(3)
def test_names_are_data(name, within, rung, monkeypatch):
    ran = []
    monkeypatch.setattr(builtins, "RUN", lambda: ran.append(name), raising=False)
    monkeypatch.setattr(ladder, "RUNGS", (rung,))
    net = Branch(name, within).eval()
    x = torch.randn(4, 8)
    program = trace(net, x)
    torch.testing.assert_close(program.module(x), net(x))
    assert not ran
    assert "class" in name or any(key.endswith("class_") for key in program.persistent)


@pytest.mark.parametrize("name", ["graph", "class", "__", CODE[0]])
def test_names_in_a_zip(name, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(builtins, "RUN", lambda: ran.append(name), raising=False)
    a, b = (Branch(name, name != "graph", n).eval() for n in (3, 4))
    x = torch.randn(16, 8)
    zipped = fxzip.compile_zip(a, b, x, method="permute", refit=None, width=2.0, progress=False)
    fxzip.save(zipped, tmp_path / "zip")
    for network in (zipped, pickle.loads(pickle.dumps(zipped)), fxzip.load(tmp_path / "zip")):
        torch.testing.assert_close(network(x)[1], b(x))
    assert not ran


@pytest.mark.parametrize("name", ["graph", "class", "self", CODE[0]])
def test_a_relabelled_copy_of_a_network_with_any_names_is_the_network(name):
    net, x = Branch(name, name not in ("graph", "self")).double().eval(), torch.randn(40, 8, dtype=torch.float64)
    twin = fxzip.relabel(net, x)
    torch.testing.assert_close(twin(x), net(x))
    for output in fxzip.compile_zip(net, twin, x, data=[x], method="permute", refit=None, progress=False)(x):
        torch.testing.assert_close(output, net(x))


def test_export_writes_no_code_of_names(monkeypatch):
    ran = []
    monkeypatch.setattr(builtins, "RUN", lambda: ran.append(1), raising=False)
    monkeypatch.setattr(ladder, "RUNGS", ("export",))
    with pytest.raises(fxzip.TraceError, match="Names of modules must be such as code can hold"):
        trace(Branch(CODE[0], True), torch.randn(4, 8))
    assert not ran


def test_new_names_do_not_meet():
    names = safe_names(nn.ModuleDict({"a'": nn.ReLU(), 'a"': nn.ReLU(), "a_": nn.ReLU(), "if": nn.Linear(1, 1)}))
    assert names == {"a'": "a__", 'a"': "a___", "if": "if_", "if.weight": "if_.weight", "if.bias": "if_.bias"}


def test_new_names_are_safe_names_however_many_fall_together():
    given = nn.ModuleDict({"\\": nn.ReLU(), "{}": nn.ReLU(), "'": nn.ReLU(), '"': nn.ReLU()})
    names = safe_names(given)
    assert len(set(names.values())) == 4
    assert safe_names(nn.ModuleDict({name: nn.ReLU() for name in names.values()})) == {}


def test_arguments_that_are_no_names():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, **given):
            return self.fc(next(iter(given.values())))

    with pytest.raises(fxzip.TraceError, match="Names of arguments must be identifiers; found 'a, b=print'"):
        trace(Keywords(), {"a, b=print": torch.randn(2, 8)})


CONTEXTS = {
    "none": lambda: torch.enable_grad(),
    "no_grad": lambda: torch.no_grad(),
    "inference_mode": lambda: torch.inference_mode(),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def pair():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, n)).eval() for n in (2, 3)]


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_context_of_the_caller_does_not_matter(context):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    expected = fxzip.compile_zip(*pair(), x, data=[x], progress=False)(x)
    with CONTEXTS[context]():
        models, given = pair(), x.clone()  # inference tensors, in inference mode
        zipped = fxzip.compile_zip(*models, given, data=[given], progress=False)
        assert torch.is_inference_mode_enabled() == (context == "inference_mode")
        assert torch.is_autocast_enabled("cpu") == (context == "autocast")
    with torch.no_grad():
        torch.testing.assert_close(zipped(x), expected)
    sum(y.sum() for y in zipped(x)).backward()
    assert all(p.grad is not None for p in zipped.parameters())


def test_default_dtype_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        a, b = pair()
        x = torch.randn(64, 8)
        for settings in ({}, {"refit": "repair"}, {"method": "weights"}, {"method": "permute", "refit": None}):
            zipped = fxzip.compile_zip(a, b, x, data=[x], width=2.0 if "refit" in settings else 1.0, **settings)
            assert zipped(x)[0].dtype == torch.float64
        torch.testing.assert_close(zipped(x)[1], b(x))
    finally:
        torch.set_default_dtype(before)


def closure():
    net = nn.Module()
    net.a, net.b = nn.Linear(8, 16), nn.Linear(16, 3)
    net.forward = lambda x: net.b(net.a(x).relu())
    return net


def partial_function():
    net = nn.Module()
    net.a, net.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(own, x, scale):
        return own.b(own.a(x).relu()) * scale

    net.forward = functools.partial(forward, net, scale=3)
    return net


def method():
    net = closure()
    net.forward = types.MethodType(lambda self, x: self.b(self.a(x).relu()), net)
    return net


def wrapped():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    before = net.forward
    net.forward = lambda x: before(x) * 2
    return net


def wrapped_leaf():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    before = net[0].forward
    net[0].forward = lambda x: before(x) + 1
    return net


@pytest.mark.parametrize("build", [closure, partial_function, method, wrapped, wrapped_leaf])
def test_functions_given_to_a_module(build):
    torch.manual_seed(0)
    a, b = build().eval(), build().eval()
    before = [p.clone() for p in (*a.parameters(), *b.parameters())]
    x = torch.randn(16, 8)
    zipped = fxzip.compile_zip(a, b, x, method="permute", refit=None, width=2.0, progress=False)
    for k, model in enumerate((a, b)):
        torch.testing.assert_close(zipped(x)[k], model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(before, (*a.parameters(), *b.parameters()), strict=True))


def inside_a_trace(action):
    class Acts(nn.Module):
        def forward(self, x):
            action()
            return x

    torch.fx.symbolic_trace(Acts())


AROUND = {
    "transforms of `torch.func`": lambda action: torch.vmap(lambda x: (action(), x)[1])(torch.ones(2)),
    "a trace of `torch.fx`": inside_a_trace,
}


@pytest.mark.parametrize("around", AROUND)
def test_where_tensors_have_no_values_nothing_is_compiled(around):
    x = torch.randn(16, 8)
    models = pair()
    with pytest.raises(fxzip.InputError, match=f"must be called outside of {around}"):
        AROUND[around](lambda: fxzip.compile_zip(*models, x, progress=False))
    fxzip.compile_zip(*models, x, progress=False)


def test_fake_tensors_are_no_values():
    x = torch.randn(16, 8)
    models = pair()
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes, pytest.raises(fxzip.InputError, match="must be called outside of a `FakeTensorMode`"):
        fxzip.compile_zip(*models, x, progress=False)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 3)


def with_argument(name, body):
    scope = {}
    exec(f"def forward(self, x, {name}):\n    return {body}", {"torch": torch, "float": float}, scope)
    return type("Named", (Named,), {"forward": scope["forward"], "__deepcopy__": lambda net, memo: net})().eval()


@pytest.mark.parametrize(
    ("name", "body", "value"),
    [
        ("inf", "self.head(self.first(x)).clamp(max=float('inf')) + inf", -torch.ones(1)),
        ("nan", "torch.nan_to_num(self.head(self.first(x)) + nan, nan=float('nan'))", torch.ones(1)),
        ("device", "self.head(self.first(x.to(device)))", torch.device("cpu")),
        ("torch", "self.head(self.first(x)) + torch", torch.ones(1)),
    ],
)
def test_arguments_with_words_that_code_has_for_something_else(name, body, value):
    """What torch.fx writes would read the argument: `clamp(max = inf)`."""
    with pytest.raises(fxzip.FxzipError, match=f"Argument `{name}` has .*rename it"):
        trace(with_argument(name, body), (torch.randn(4, 8), value))


def test_such_words_are_fine_where_code_has_no_use_for_them():
    net, x = with_argument("device", "self.head(self.first(x.to(device)))"), torch.randn(4, 8)
    torch.testing.assert_close(trace(net, (x, "cpu")).module(x, "cpu"), net(x, "cpu"))

"""Arguments that are no tensors, and numbers of NumPy: what Python asks of them is checked at every call."""

import numpy as np
import pytest
import torch
from torch import fx, nn

import fxzip
from fxzip.rewriting.module import EmittedModule
from fxzip.tracing import ladder, trace

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(6, 8), nn.Linear(8, 3), function

    def forward(self, x, given):
        return self.b(self.function(torch.relu(self.a(x)), given))


ONE = torch.tensor(1.0)


def _most(x):
    return x.clamp(max=4) if isinstance(x, torch.Tensor) else x


ASKED = {  # function, value in the trace, others of which it gives the same, others of which it does not
    "truth": (lambda h, t: h * (t or 1), 3, (5,), (0,)),
    "no truth": (lambda h, t: h if not t else -h, 0, (), (3,)),
    "whole part": (lambda h, t: h * int(t), 5.4, (5.9,), (1.7,)),
    "type": (lambda h, t: h * 2 if isinstance(t, int) else h * t, 2, (5,), (2.0, 3.0)),
    "another type": (lambda h, t: h * 2 if isinstance(t, float) else h * t, 2.0, (5.0,), (3,)),
    "a function": (lambda h, t: t(h), torch.tanh, (), (torch.sin,)),
    "a module": (lambda h, t: t(h), nn.Tanh(), (nn.Tanh(),), (nn.ReLU(),)),
    "a slice": (lambda h, t: h + h[t].mean(0), slice(0, 2), (slice(0, 2),), (slice(2, 4),)),
    "an object": (lambda h, t: h * t.stop, range(3), (range(3),), (range(4),)),
    "a tensor": (lambda h, t: h * (t.clamp(max=4) if isinstance(t, torch.Tensor) else t), ONE, (9 * ONE,), (9.0,)),
    "no number": (lambda h, t: h * (t if isinstance(t, (int, float)) else t.clamp(max=4)), ONE, (9 * ONE,), (9.0,)),
    "is_tensor": (lambda h, t: h * (t.clamp(max=4) if torch.is_tensor(t) else t), ONE, (9 * ONE,), (9.0,)),
    "type of a tensor": (lambda h, t: h * (t.clamp(max=4) if type(t) is torch.Tensor else t), ONE, (9 * ONE,), (9.0,)),
    "type among others": (
        lambda h, t: h * (t.clamp(max=4) if type(t) in (torch.Tensor, nn.Parameter) else t),
        ONE,
        (9 * ONE,),
        (nn.Parameter(9 * ONE), 9.0),
    ),
    "a type of tensor": (
        lambda h, t: h * t.clamp(max=4) if isinstance(t, torch.FloatTensor) else h * t,
        ONE,
        (9 * ONE,),
        (9 * ONE.double(), 9.0),
    ),
    "no such type": (
        lambda h, t: h * t if isinstance(t, (list, torch.HalfTensor)) else h * t.clamp(max=4),
        ONE,
        (9 * ONE, 9 * ONE.double(), nn.Parameter(9 * ONE)),
        (9 * ONE.half(), 9.0),
    ),
    "no parameter": (
        lambda h, t: h * t if isinstance(t, nn.Parameter) else h * t.clamp(max=4),
        ONE,
        (9 * ONE, 9 * ONE.double()),
        (nn.Parameter(9 * ONE), 9.0),
    ),
    "a tensor or one of its kinds": (
        lambda h, t: h * t.clamp(max=4) if isinstance(t, nn.Parameter | torch.Tensor) else h * t,
        ONE,
        (9 * ONE, 9 * ONE.double(), nn.Parameter(9 * ONE)),
        (9.0,),
    ),
    "type of a number": (lambda h, t: h * 2 if type(t) is int else h * t, 2, (5,), (2.0, 3.0)),
    "type of what is computed": (
        lambda h, t: (h * t).clamp(max=4) if type(h * t) is torch.Tensor else h,
        ONE,
        (9 * ONE,),
        (),
    ),
    "axes of a tensor": (
        lambda h, t: h * t.reshape(-1, 1) if t.dim() else h * t,
        ONE,
        (9 * ONE,),
        (torch.ones(4), 9.0),
    ),
    "a computed tensor": (lambda h, t: _most(h * t), ONE, (9 * ONE,), ()),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_python_asks_of_an_argument_is_checked(name):
    function, first, same, others = ASKED[name]
    net = Net(function).double().eval()
    module = trace(net, (X, first)).module
    for given in (first, *same):
        torch.testing.assert_close(module(X, given), net(X, given))
    for given in others:
        with pytest.raises(fxzip.SpecializationError):
            module(X, given)


def test_type_is_pythons_own_for_all_else():
    def function(h, _):
        made = type("Made", (), {"factor": 2})
        plain = isinstance(made, type) and type(h.shape) is torch.Size and type([]) is list and issubclass(int, int)
        return h * made.factor if plain else h

    net = Net(function).double().eval()
    torch.testing.assert_close(trace(net, (X, ONE)).module(9 * X, ONE), net(9 * X, ONE))


class Scale(float):
    pass


NUMPY = {
    "a square root": lambda h, t: h / np.sqrt(8),
    "an attribute": lambda h, t: h * np.float32(0.5),
    "a size": lambda h, t: h.view(-1, np.int64(2), 4).flatten(1),
    "a class of one's own": lambda h, t: h * Scale(2),
    "the argument": lambda h, t: h * t,
}


@pytest.mark.parametrize("name", NUMPY)
def test_numbers_of_numpy_are_numbers(name):
    """torch.fx writes `np.float64(2.83)` into code that knows no `np`."""
    torch.manual_seed(0)
    model, given = Net(NUMPY[name]).double().eval(), np.float64(3.0)
    zipped = fxzip.compile_zip(
        model, model, (X, given), data=[(X, given)], method="permute", refit=None, progress=False
    )
    for value in (given, np.float64(4.0)) if name == "the argument" else (given,):
        for found in zipped(X, value):
            torch.testing.assert_close(found, model(X, value))


class Sizes(nn.Module):
    """Python that looks at a size, in one way."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(6, 8), nn.Linear(8, 3), function
        self.by_size = nn.ModuleDict({"9": nn.Linear(8, 8)})

    def forward(self, x):
        return self.b(self.function(self, torch.relu(self.a(x))).mean(1))


FOLLOWED = {
    "a function of NumPy": lambda net, h: h / np.sqrt(h.shape[1]),
    "divmod": lambda net, h: h * divmod(h.shape[1], 4)[1],
    "rounded": lambda net, h: h[:, : round(h.shape[1] * 0.7)],
}
ASKED_OF_SIZES = {
    "a key": lambda net, h: net.by_size[str(h.shape[1])](h) if str(h.shape[1]) in net.by_size else h,
    "a text": lambda net, h: h * float(f"{h.shape[1]}"),
    "in a set": lambda net, h: h * 2 if h.shape[1] in {9, 10} else h,
    "another function of NumPy": lambda net, h: h * np.cbrt(h.shape[1]),
}


@pytest.mark.parametrize("name", [*FOLLOWED, *ASKED_OF_SIZES])
def test_sizes_are_followed_or_checked(name):
    net = Sizes({**FOLLOWED, **ASKED_OF_SIZES}[name]).double().eval()
    short, long = X.new_ones(2, 5, 6), X.new_ones(3, 9, 6)
    module = trace(net, short).module
    torch.testing.assert_close(module(short), net(short))
    if name in FOLLOWED:
        torch.testing.assert_close(module(long), net(long))
    else:
        with pytest.raises(fxzip.SpecializationError):
            module(long)


def test_what_export_builds_in_is_checked(monkeypatch):
    """Sizes that are not dynamic are constants of the exported graph, and of others it only knows a range."""
    monkeypatch.setattr(ladder, "RUNGS", ("export",))
    short, middle, long, odd = (torch.randn(*shape, 6).double() for shape in ((2, 5), (4, 7), (2, 9), (3, 5)))
    fixed = trace(Sizes(lambda net, h: h * h.shape[1]).double().eval(), short).module
    fixed(odd)
    with pytest.raises(fxzip.SpecializationError, match=r"size of axis 1 of `x` at the input .* 5; it gives 7"):
        fixed(middle)
    net = Sizes(lambda net, h: h * 2 if h.shape[1] > 8 else h).double().eval()
    module = trace(net, short, others=[fxzip.tracing.calls.as_call(middle)]).module
    torch.testing.assert_close(module(odd), net(odd))
    with pytest.raises(fxzip.SpecializationError, match=r"`input 0\.size\(\)\[1\] <= 8` at the input must give"):
        module(long)


def test_functions_of_pytorch_in_a_zip_leave_tracing_alone():
    """torch.fx looks for what is marked as a call of one's own under its name, in every trace from then on."""
    graph = fx.Graph()
    given = graph.placeholder("x")
    graph.output(graph.call_function(torch.sym_max, (graph.call_method("size", (given, 0)), 3)))
    module = EmittedModule(nn.Module(), graph)
    assert module(torch.ones(5)) == 5
    fx.symbolic_trace(nn.ReLU())

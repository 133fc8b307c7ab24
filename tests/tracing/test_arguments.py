"""Arguments that are no tensors, and numbers of NumPy: what Python asks of them is checked at every call."""

import numpy as np
import pytest
import torch
from torch import nn

import fxzip
from fxzip.tracing import trace

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(6, 8), nn.Linear(8, 3), function

    def forward(self, x, given):
        return self.b(self.function(torch.relu(self.a(x)), given))


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

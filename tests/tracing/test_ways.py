"""What Python asks of a value in a model: a trace must take the branch that the model takes, on all inputs."""

import copy
import functools
import sys

import pytest
import torch
from models import questions
from torch import Tensor, fx, nn

import fxzip
from fxzip.tracing import trace
from fxzip.tracing.ways import entered, parting, watched


@functools.singledispatch
def is_tensor(value):
    return False


@is_tensor.register(Tensor)
def _(value):
    return True


def matched(value):
    match value:
        case Tensor():
            return True
    return False


def raises(function, *kinds):
    def question(value):
        try:
            function(value)
        except kinds:
            return True
        return False

    return question


class Asks(nn.Module):
    """A branch by a question about a hidden value. It shows on large inputs only."""

    def __init__(self, question, asked=True):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)
        self.question, self.asked = question, asked

    def forward(self, x):
        h = self.a(x)
        if bool(self.question(h)) == self.asked:
            h = h.clamp(max=50.0)
        return self.b(h)


FOLLOWED = {
    "callable": callable,
    "hasattr": lambda h: hasattr(h, "no_such"),
    "getattr": lambda h: getattr(h, "no_such", None) is None,
    "attribute error": raises(lambda h: h.no_such, AttributeError),
    "a loop": lambda h: any(callable(value) for value in (h, h)),
    "a text of a dtype": lambda h: str(h.dtype) == "torch.float32",
    "a table by dtype": lambda h: {torch.float32: True}.get(h.dtype, False),
    "match": matched,
    "singledispatch": is_tensor,
    "the same value": lambda h: h.contiguous() is h,
    "another file: isinstance": questions.is_tensor,
    "another file: callable": questions.can_be_called,
}
REFUSED = {
    "class": lambda h: h.__class__ is Tensor,
    "text": lambda h: "tensor" in f"{h}",
    "number": raises(lambda h: float(h.sum()), Exception),
    "number, by kind": raises(lambda h: float(h.sum()), TypeError, fx.proxy.TraceError),
    "content": raises(lambda h: bool((h > 0).any()), Exception),
    "a trace": lambda h: fx._symbolic_trace.is_fx_tracing(),
}


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("question", FOLLOWED)
@pytest.mark.thinned(2)
def test_questions_that_are_answered_as_the_model_does(question, asked):
    net = Asks(FOLLOWED[question], asked).eval()
    program = trace(net, torch.randn(4, 8))
    x = 1000 * torch.randn(5, 8)
    torch.testing.assert_close(program.module(x), net(x))


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("question", REFUSED)
@pytest.mark.thinned(2)
def test_questions_that_no_trace_answers(question, asked):
    with pytest.raises(fxzip.TraceError, match=r"at test_ways\.py:\d+"):
        trace(Asks(REFUSED[question], asked).eval(), torch.randn(4, 8))


def test_a_zip_of_networks_that_ask():
    torch.manual_seed(0)
    a = Asks(callable).eval()
    zipped = fxzip.compile_zip(a, copy.deepcopy(a), torch.randn(4, 8), progress=False)
    x = 1000 * torch.randn(5, 8)
    for output in zipped(x):
        torch.testing.assert_close(output, a(x), atol=1e-3, rtol=1e-4)


class Given(nn.Module):
    """A branch by a question about an argument."""

    def __init__(self, question):
        super().__init__()
        self.a, self.question = nn.Linear(8, 3), question

    def forward(self, x, given):
        return self.a(x) * (2 if self.question(given) else 1) + given


OF_ARGUMENTS = {
    "hasattr": lambda m: hasattr(m, "shape"),
    "getattr": lambda m: getattr(m, "shape", None) is None,
    "attribute error": raises(lambda m: m.shape, AttributeError),
    "class": lambda m: m.__class__ in (int, float),
    "number": raises(float, TypeError, ValueError, RuntimeError),
    "another file": questions.is_tensor,
}


@pytest.mark.parametrize("question", OF_ARGUMENTS)
@pytest.mark.parametrize("sample", [torch.ones(3), 2.0], ids=["tensor", "number"])
def test_questions_about_arguments_leave_guards(question, sample):
    net, x = Given(OF_ARGUMENTS[question]).eval(), torch.randn(4, 8)
    graph = trace(net, (x, sample)).module
    torch.testing.assert_close(graph(x, sample), net(x, sample))
    other = 2.0 if isinstance(sample, Tensor) else torch.ones(3)
    with pytest.raises(fxzip.SpecializationError, match="given"):
        graph(x, other)


class OnlyOnce(nn.Module):
    """A hook, a cache and an operator of its own: their code does not run in every trace."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(8, 16), nn.Linear(16, 3), None
        self.a.register_forward_hook(lambda module, given, result: result if callable(result) else None)

    def forward(self, x):
        if self.kept is None:
            self.kept = torch.arange(16) / 16
        return self.b(halved(self.a(x)) + self.kept)


@torch.library.custom_op("fxzip_tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x.clone() if callable(x) else x / 2


@halved.register_fake
def _(x):
    return torch.empty_like(x)


def test_code_that_only_one_run_executes_is_not_compared():
    net = OnlyOnce().eval()
    program = trace(net, torch.randn(4, 8))
    x = torch.randn(5, 8)
    torch.testing.assert_close(program.module(x), net(x))


class Called(nn.Module):
    """A `__call__` of its own, and a check that it leaves out where it is compiled."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 3)

    def __call__(self, *given):
        return super().__call__(*given)

    def forward(self, x):
        if not torch.compiler.is_compiling() and bool(x.isnan().any()):
            raise ValueError("not a number")
        return self.a(x)


def test_checks_that_a_model_leaves_out_where_it_is_compiled():
    net = Called().eval()
    program = trace(net, torch.randn(4, 8))
    assert program.rung == "export"
    x = torch.randn(5, 8)
    torch.testing.assert_close(program.module(x), net(x))


GRADIENTS = {
    "enabled": lambda h: torch.is_grad_enabled(),
    "required": lambda h: h.requires_grad,
    "made": lambda h: h.grad_fn is not None,
}


@pytest.mark.parametrize("question", GRADIENTS)
def test_what_a_model_does_with_gradients_only_is_named(question):
    net = Asks(GRADIENTS[question]).eval()
    message = r"where gradients are enabled it takes another way at test_ways\.py:\d+ in `forward`"
    with pytest.warns(fxzip.FxzipWarning, match=f"`model`: {message}"):
        program = trace(net, torch.randn(4, 8))
    assert program.strays.notes[0].startswith("where gradients are enabled")
    with torch.no_grad():
        x = 1000 * torch.randn(5, 8)
        torch.testing.assert_close(program.module(x), net(x))


def test_who_watches_python_already_goes_on():
    def debugger(frame, event, given):
        return None

    sys.settrace(debugger)
    try:
        trace(Asks(callable).eval(), torch.randn(4, 8))
        assert sys.gettrace() is debugger
    finally:
        sys.settrace(None)
    trace(Asks(callable).eval(), torch.randn(4, 8))
    assert sys.gettrace() is None


def test_ways_of_loops_and_generators():
    def counted(values):
        return sum(1 for value in values if value)

    with watched() as ways:
        for values in ([1, 0, 1], [1, 0, 1], [1, 1, 0]):
            entered(counted, values)
    assert parting(ways[0], ways[1]) == ""
    assert "in `<genexpr>`" in parting(ways[0], ways[2])

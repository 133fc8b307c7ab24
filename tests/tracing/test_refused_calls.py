"""What no graph of calls can hold is refused with a way out: calls that are given functions, gradients taken inside,
checks of values."""

import pytest
import torch
from torch import nn
from torch._higher_order_ops.while_loop import while_loop

import fxzip
from fxzip.errors import TraceError


class Given(nn.Module):
    """Calls that are given functions, gradients taken in `forward`, checks of values."""

    def __init__(self, how):
        super().__init__()
        self.a, self.h, self.how = nn.Linear(6, 8), nn.Linear(8, 3), how

    def forward(self, x):
        return self.how(self, x)


def forces(net, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (result,) = torch.autograd.grad(torch.tanh(net.a(x)).sum(), x)
    return result.detach()


GIVEN = {
    "cond": (
        lambda net, x: net.h(torch.cond(x.sum() > 0, torch.relu, torch.tanh, (net.a(x),))),
        r"calls `cond`, which is given functions.*`torch.where` in place of `torch.cond`",
    ),
    "while_loop": (
        lambda net, x: while_loop(lambda n, _: n < 3, lambda n, h: (n + 1, h.tanh()), (x.new_zeros(()), net.a(x)))[1],
        r"calls `while_loop`, which is given functions.*a loop of Python over a fixed number of steps",
    ),
    "gradients": (forces, r"pass the network that is differentiated, and take the gradients of what"),
    "distribution": (
        lambda net, x: torch.distributions.Categorical(logits=net.h(net.a(x)), validate_args=True).logits,
        r"check values where `validate_args=True`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_what_no_graph_of_calls_can_hold_is_refused_with_a_way_out(name):
    how, message = GIVEN[name]
    with pytest.raises(TraceError, match=message):
        fxzip.compile_zip(Given(how), Given(how), torch.randn(4, 6), progress=False)


@pytest.fixture
def checks():
    """Distributions check their arguments, as in a process that has compiled nothing yet."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(True)
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


def entropies(net, x):
    return torch.distributions.Categorical(logits=net.h(net.a(x))).entropy()


def test_distributions_do_not_check_inside_and_do_afterwards(checks):
    net, x = Given(entropies), torch.randn(64, 6)
    zipped = fxzip.compile_zip(net, net, x, data=[x], progress=False)
    torch.testing.assert_close(zipped(x)[0], net(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="Expected parameter logits"):
        torch.distributions.Categorical(logits=torch.full((1, 3), torch.nan))

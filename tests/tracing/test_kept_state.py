"""State that a model keeps between calls is named, whatever holds it; a cache is none."""

import copy

import pytest
import torch
from torch import nn

import fxzip
from fxzip.tracing import trace

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Keeping(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.first, self.last, self.step = nn.Linear(6, 8), nn.Linear(8, 3), step
        self.calls, self.seen, self.hidden, self.by_name = 0, [], None, {}
        self.register_buffer("mean", torch.zeros(1, 8))
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        return self.last(torch.relu(self.step(self, self.first(x))))


def hidden(net, h):
    result = h if net.hidden is None else h + net.hidden
    net.hidden = h.detach().mean(0)
    return result


def assigned_buffer(net, h):
    result = h + net.mean
    net.mean = h.mean(0, keepdim=True)
    return result


def written_buffer(net, h):
    net.mean.mul_(0.9).add_(h.mean(0, keepdim=True), alpha=0.1)
    return h - net.mean


def number(net, h):
    net.calls += 1
    return h * net.calls


def listed(net, h):
    net.seen.append(h.mean())
    return h + sum(net.seen)


def keyed(net, h):
    net.by_name["sum"] = net.by_name.get("sum", 0) + h.mean()
    return h + net.by_name["sum"]


def first_alone(net, h):
    if net.calls == 0:
        net.calls, net.hidden = 1, h.detach().mean(0)
    return h - net.hidden


def grown(net, h):
    new = h.mean(0, keepdim=True)
    net.hidden = new if net.hidden is None else torch.cat([net.hidden, new])
    return h + net.hidden.mean(0)


KEEPING = {hidden: "hidden", assigned_buffer: "mean", written_buffer: "mean", number: "calls", listed: "seen",
           keyed: "by_name", first_alone: "calls`, `hidden", grown: "hidden"}  # fmt: skip


@pytest.mark.parametrize("step", KEEPING)
def test_state_is_named(step):
    torch.manual_seed(0)
    net = Keeping(step).double().eval()
    before = copy.deepcopy(net.state_dict()), net.calls, list(net.seen), net.hidden, dict(net.by_name)
    with pytest.raises(fxzip.TraceError, match=f"keeps state between calls, in `{KEEPING[step]}`, and gives"):
        fxzip.compile_zip(net, net, X, data=[X], progress=False)
    torch.testing.assert_close(net.state_dict(), before[0], rtol=0, atol=0)
    assert (net.calls, net.seen, net.hidden, net.by_name) == before[1:]


def counted(net, h):
    net.calls += 1
    return h


def cached(net, h):
    if "scale" not in net.by_name:
        net.by_name["scale"] = torch.linspace(0, 1, 8, dtype=h.dtype)
    return h * net.by_name["scale"]


def noted(net, h):
    net.seen.append(h)
    net.hidden = h
    return h


@pytest.mark.parametrize("step", [counted, cached, noted])
def test_what_changes_nothing_is_no_state(step):
    torch.manual_seed(0)
    net = Keeping(step).double().eval()
    module = trace(net, X).module
    torch.testing.assert_close(module(X), net(X))


class Frozen(dict):
    """As packages keep a configuration: nothing may be written into it."""

    def update(self, *_, **__):
        raise TypeError("frozen")


def test_attributes_that_refuse_to_be_written_into_are_left_alone():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    net.config = Frozen(width=8)
    program = fxzip.tracing.trace(net, torch.randn(5, 4))
    assert net.config == {"width": 8}
    assert program.rung == "symbolic"

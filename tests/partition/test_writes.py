"""Writes in place through a view: whoever sees the memory afterwards depends on them, in the trunk and in the heads."""

import pytest
import torch
from models import randomise
from test_cuts import furthest, zips
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.partition.dependencies import dependencies


class Writing(nn.Module):
    def __init__(self, body, outputs=3, width=8):
        super().__init__()
        self.body = body
        self.a, self.b, self.c = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, width)
        self.g, self.o = nn.Linear(6, width // 2), nn.Linear(width, outputs)

    def forward(self, x):
        return self.body(self, x)


def _last(m, h):
    return m.o(torch.relu(m.b(h)))


def part(m, x):
    h = m.a(x)
    h[..., :4].relu_()
    return _last(m, h)


def columns(m, x):
    h = m.a(x)
    h[:, 2:5].add_(1)
    return _last(m, h)


def transposed(m, x):
    h = m.a(x)
    h.t()[:3].mul_(2)
    return _last(m, h)


def halves(m, x):
    h = m.a(x)
    first, second = h.chunk(2, -1)
    first.relu_()
    second.tanh_()
    return _last(m, h)


def pieces(m, x):
    h = m.a(x)
    h.view(-1, 2, 4).unbind(1)[0].sigmoid_()
    return _last(m, h)


def copied(m, x):
    h = m.a(x)
    h[:, :4].copy_(m.g(x))
    return _last(m, h)


def assembled(m, x):
    h = torch.zeros(x.shape[0], 8, dtype=x.dtype)
    h[:, :4] = m.g(x)
    h[:, 4:] = torch.tanh(m.g(x))
    return m.o(torch.relu(m.b(h)) + h)


def into_out(m, x):
    h = m.a(x)
    k = torch.empty_like(h)
    torch.mul(h, h, out=k)
    k[:, :3].neg_()
    return _last(m, k)


def by_index(m, x):
    h = m.a(x)
    h.index_put_((torch.tensor([0, 2]),), torch.zeros(8, dtype=x.dtype))
    return _last(m, h)


def added(m, x):
    h = m.a(x)
    h[:, :4] += m.g(x)
    return _last(m, h)


def between(m, x):
    """The view is made before, the write happens after, what reads the base."""
    h = m.a(x)
    view = h[:, :4]
    y = torch.relu(m.b(h))
    view.copy_(torch.tanh(m.c(y))[:, 4:])
    return m.o(y + h)


def overlapping(m, x):
    h = m.a(x)
    left, right = h[:, :5], h[:, 2:]
    left.relu_()
    y = m.b(h)
    right.mul_(2)
    return m.o(torch.relu(m.c(h) + y))


def inputs(m, x):
    h = torch.relu(m.a(x))
    x[:, :2].zero_()
    return m.o(h + torch.tanh(m.a(x)))


def masked(m, x):
    h = m.a(x)
    h[h < 0.1] = 0
    y = m.b(h)
    h.masked_fill_(y > 0, 0.5)
    return m.o(torch.relu(h) + y)


def flagged(m, x):
    h = m.a(x)
    F.relu(h[:, :4], inplace=True)
    y = m.b(h)
    F.hardtanh_(y[:, 3:])
    return m.o(y + h)


def reshaped(m, x):
    h = m.a(x)
    h.reshape(-1, 2, 4)[:, 1].tanh_()
    return _last(m, h)


def turned(m, x):
    """Calls that give a tensor another shape, not other values, while views of it are read."""
    h = m.a(x)
    view = h[:, None]
    view.squeeze_(1).t_()
    view.relu_()
    view.unsqueeze_(0)
    return m.o(torch.relu(m.b(h)) + view[0].t())


def quantiles(m, x):
    """Inside of these PyTorch takes an axis away in place."""
    h = m.a(x)
    return _last(m, h - h.quantile(0.3, 0, keepdim=True))


BODIES = [
    part, columns, transposed, halves, pieces, copied, assembled, into_out, by_index, added, between, overlapping,
    inputs, masked, flagged, reshaped,
]  # fmt: skip


def batch(rows):
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("body", BODIES)
def test_at_every_cut_writes_are_seen_by_whoever_reads_the_memory(body):
    check_at_every_cut(body)


@pytest.mark.parametrize("body", [turned, quantiles])
def test_calls_that_reshape_in_place_are_views(body):
    check_at_every_cut(body)


def check_at_every_cut(body):
    x = batch(64)
    model = randomise(Writing(body), 1).double()
    twin = fxzip.relabel(model, x[:4], seed=3, verify=False)
    errors = {cut: furthest(zipped, model, batch(5)) for cut, zipped in zips([model, twin], x)}
    assert len(errors) >= 3
    assert {cut: error for cut, error in errors.items() if error > 1e-9} == {}


@pytest.mark.parametrize("body", [part, added, overlapping])
def test_a_head_does_not_see_what_another_writes(body):
    """The whole compile, two models of their own, everything in the heads."""
    x = batch(64)
    models = [randomise(Writing(body), seed).double() for seed in (1, 2)]
    models[1].a.load_state_dict(models[0].a.state_dict())
    models[1].g.load_state_dict(models[0].g.state_dict())
    zipped = fxzip.compile_zip(*models, x[:4], data=[x], until="a", method="average", refit=None)
    with torch.no_grad():
        for found, model in zip(zipped(batch(5)), models, strict=True):
            torch.testing.assert_close(found, model(batch(5)), rtol=1e-9, atol=1e-9)
        for k, model in enumerate(models):
            torch.testing.assert_close(zipped.single(k)(batch(5)), model(batch(5)), rtol=1e-9, atol=1e-9)


def test_dependencies_know_who_sees_the_memory():
    graph = dependencies(fxzip.tracing.trace(Writing(overlapping).double(), batch(4)))
    assert graph.has_edge("relu_", "b")
    assert graph.has_edge("b", "mul_")
    assert graph.has_edge("mul_", "c")
    assert not graph.has_edge("relu_", "o")


def other_write(m, x):
    h = m.a(x)
    h[..., :4].tanh_()
    return _last(m, h)


def no_write(m, x):
    h = m.a(x)
    h[..., :4]
    return _last(m, h)


def read_before(m, x):
    h = m.a(x)
    y = m.b(h)
    h[..., :4].relu_()
    return m.o(torch.relu(y) + h)


def read_after(m, x):
    h = m.a(x)
    h[..., :4].relu_()
    return m.o(torch.relu(m.b(h)) + h)


@pytest.mark.parametrize("bodies", [(part, other_write), (part, no_write), (read_before, read_after)])
def test_models_part_where_they_write_different_things(bodies):
    x = batch(64)
    for first, second in (bodies, bodies[::-1]):
        models = [randomise(Writing(body), 1).double() for body in (first, second)]
        with pytest.raises(fxzip.CutError, match="the models part"):
            fxzip.compile_zip(*models, x[:4], data=[x], until="b", method="average", refit=None)
        zipped = fxzip.compile_zip(*models, x[:4], data=[x], method="average", refit=None)
        with torch.no_grad():
            for found, model in zip(zipped(batch(5)), models, strict=True):
                torch.testing.assert_close(found, model(batch(5)), rtol=1e-9, atol=1e-9)


class Remembering(nn.Module):
    """Writes into a buffer and reads it in the same call."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x):
        h = torch.relu(self.a(x))
        self.last.copy_(h.detach().mean(0))
        return self.o(torch.relu(self.b(h)) + self.last)


def test_what_is_written_into_a_buffer_is_each_models_own():
    x = batch(64)
    model = randomise(Remembering(), 1).double()
    twin = fxzip.relabel(model, x[:4], seed=3, verify=False)
    for _, zipped in zips([model, twin], x):
        assert furthest(zipped, model, batch(5)) < 1e-9
    other = randomise(Remembering(), 2).double()
    zipped = fxzip.compile_zip(model, other, x[:4], data=[x], refit=None, width=2)
    assert any("writes" in reason for reason in zipped.report["cut"]["ends"].values())

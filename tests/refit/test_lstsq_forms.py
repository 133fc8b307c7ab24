"""What is fitted does not depend on how a network is written: layouts in memory, ways to write a linear call.

The oracle is the same network in the plain way: contiguous values, `nn.Linear`. Both compute the same, so both must get
the same weights.
"""

from __future__ import annotations

import copy

import pytest
import torch
from models import randomise
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.refit.least_squares.lockstep import laid_out
from fxzip.tracing.calls import Call

close = torch.testing.assert_close
FIT = fxzip.LeastSquares(ridge=1e-3, scarce=0, least=10**9, turns=0)


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(net: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.rand(param.shape, generator=generator) - 0.5)
    return net.double().eval()


# Views in front of a head that starts with a residual sum

VIEWS = {
    "transpose": lambda h: h.flatten(2).transpose(1, 2),
    "permute": lambda h: h.permute(0, 2, 3, 1),
    "windows": lambda h: h.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 4, 4),
    "roll": lambda h: h.permute(0, 2, 3, 1).roll((1, 1), (1, 2)),
    "steps": lambda h: h.permute(0, 2, 3, 1)[:, ::2],
    "batch second": lambda h: h.flatten(2).permute(2, 0, 1),
}


class Tokens(nn.Module):
    """A convolution, a view with features last, and a residual body that a cut makes the head."""

    def __init__(self, classes: int, view: str, body: str, *, copied: bool) -> None:
        super().__init__()
        self.view, self.body, self.copied = view, body, copied
        self.conv, self.weight = nn.Conv2d(3, 4, 1), nn.Parameter(torch.empty(4, 4))
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = VIEWS[self.view](self.conv(x))
        h = h.contiguous() if self.copied else h
        return self.head(torch.tanh(getattr(self, self.body)(h)))

    def product(self, h: Tensor) -> Tensor:
        return h + h @ self.weight

    def linear(self, h: Tensor) -> Tensor:
        return h + self.one(h)

    def mlp(self, h: Tensor) -> Tensor:
        return h + self.three(F.gelu(self.two(h)))

    def normed(self, h: Tensor) -> Tensor:
        h = h + self.one(self.norm(h))
        return h + self.three(torch.relu(self.two(h)))

    def gated(self, h: Tensor) -> Tensor:
        return h + self.one(h) * torch.sigmoid(self.three(self.two(h)))

    def attended(self, h: Tensor) -> Tensor:
        return h + self.attention(h, h, h, need_weights=False)[0]


CASES = [
    *((view, body) for view in ("transpose", "permute") for body in ("product", "linear", "mlp", "normed", "gated")),
    *((view, "mlp") for view in VIEWS if view not in ("transpose", "permute")),
    ("transpose", "attended"), ("batch second", "attended"),
]  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("view", "body"), CASES)
def test_a_residual_head_behind_a_view_is_fitted_as_behind_a_copy(view: str, body: str) -> None:
    """Once the call of another number was taken for the target: a crash, or a head fitted to something else."""
    x = random(24, 3, 4, 4)
    found = []
    for copied in (False, True):
        nets = [filled(Tokens(2 + k, view, body, copied=copied), k) for k in range(2)]
        options = {"until": "conv", "method": "average", "refit": FIT, "verify": False, "progress": False}
        found.append(fxzip.compile_zip(*nets, x[:2], data=[x[:16], x[16:]], **options))
    assert len(found[0].meta["fxzip_fit"].fitted) == len(found[1].meta["fxzip_fit"].fitted) > 4
    for one, other in zip(found[0](x), found[1](x), strict=True):
        close(one, other, rtol=1e-6, atol=1e-7)


def test_a_residual_head_behind_a_view_gains() -> None:
    x = random(64, 3, 4, 4)
    nets = [filled(Tokens(3, "transpose", "linear", copied=False), k) for k in range(2)]
    options = {"until": "transpose", "method": "average", "verify": False, "progress": False}
    errors = []
    for refit in (None, FIT):
        zipped = fxzip.compile_zip(*nets, x[:2], data=[x], refit=refit, **options)
        errors.append([float((y - net(x)).norm()) for y, net in zip(zipped(x), nets, strict=True)])
    assert all(after < 0.8 * before for before, after in zip(*errors, strict=True))


@pytest.mark.parametrize("of", ["sample", "data"])
def test_data_may_lie_in_memory_otherwise_than_the_sample(of: str) -> None:
    nets = [filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2 + k)), k) for k in range(2)]
    x = random(30, 5, 3)
    across = x.transpose(0, 1).contiguous().transpose(0, 1)
    sample, data = (across[:4], x) if of == "sample" else (x[:4], across)
    plain, other = (
        fxzip.compile_zip(*nets, s, data=[d], method="average", refit=FIT, progress=False)
        for s, d in ((x[:4], x), (sample, data))
    )
    assert len(other.meta["fxzip_fit"].fitted) == len(plain.meta["fxzip_fit"].fitted)
    for one, own in zip(other(x), plain(x), strict=True):
        close(one, own, rtol=1e-8, atol=1e-9)


def test_a_call_is_laid_out_as_the_sample() -> None:
    sample = Call((torch.ones(2, 3, 4).permute(2, 0, 1), {"more": torch.ones(2, 2)}), {})
    call = laid_out(Call((torch.rand(5, 6, 7), {"more": torch.rand(3, 2).T.contiguous().T}), {}), sample)
    assert call.args[0].stride() == (1, 35, 5)
    assert call.args[1]["more"].is_contiguous()


# Ways to write a linear call


class Written(nn.Module):
    """A linear call on [batch, tokens, features], written in some way."""

    def __init__(self, way: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.way, self.linear = way, nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.way == "plain" else WAYS[self.way](x, self.linear.weight.t(), self.linear.bias)


WAYS = {
    "einsum": lambda x, w, b: torch.einsum("btc,cd->btd", x, w) + b,
    "einsum, dots": lambda x, w, b: b + torch.einsum("...c,cd->...d", x, w),
    "einsum, turned": lambda x, w, b: (torch.einsum("btc,cd->tbd", x, w) + b).transpose(0, 1),
    "product": lambda x, w, b: x @ w + b,
    "product of 4": lambda x, w, b: (x[:, None] @ w + b)[:, 0],
    "tensordot": lambda x, w, b: torch.tensordot(x, w, dims=([2], [0])) + b,
    "rows": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).view(*x.shape[:2], -1),
    "inner": lambda x, w, b: torch.inner(x, w.t()) + b,
    "batched": lambda x, w, b: torch.bmm(x, w.expand(x.shape[0], -1, -1)) + b,
    "function": lambda x, w, b: F.linear(x.transpose(0, 1), w.t(), b).transpose(0, 1),
    "convolution": lambda x, w, b: F.conv1d(x.mT, w.t()[..., None], b).mT,
    "added in place": lambda x, w, b: x.matmul(w).add_(b),
}  # fmt: skip


class Layers(nn.Module):
    """The call in the trunk, and as the head."""

    def __init__(self, classes: int, way: str) -> None:
        super().__init__()
        self.first, self.call, self.head = nn.Linear(3, 4), Written(way, 4, 6), Written(way, 6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.call(torch.tanh(self.first(x)))))


def zipped_way(way: str, x: Tensor, **options) -> fxzip.ZippedModule:
    nets = [filled(Layers(2 + k, way), k) for k in range(2)]
    given = {"method": "average", "refit": FIT, "verify": False, "progress": False, "until": "call", **options}
    return fxzip.compile_zip(*nets, x[:2], data=[x[:16], x[16:]], **given)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("way", WAYS)
def test_a_linear_call_is_fitted_however_it_is_written(way: str) -> None:
    x = random(24, 5, 3)
    found, plain = zipped_way(way, x), zipped_way("plain", x)
    assert not found.meta["fxzip_fit"].left
    for one, other in zip(found(x), plain(x), strict=True):
        close(one, other, rtol=1e-7, atol=1e-8)


class Odd(nn.Module):
    """What reads a weight and is not fitted."""

    def __init__(self, classes: int, way: str) -> None:
        super().__init__()
        self.way, self.first, self.head = way, nn.Linear(3, 4), nn.Linear(4, classes)
        shapes = {"heads": (2, 2, 4), "experts": (3, 4, 4), "kernel": (4, 4, 1, 1)}
        self.weight, self.bias = nn.Parameter(torch.empty(shapes.get(way, (4, 4)))), nn.Parameter(torch.empty(3, 1, 4))
        self.pair = nn.Bilinear(4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(getattr(self, self.way)(x)))

    def heads(self, x: Tensor) -> Tensor:
        return torch.einsum("bnhd,hdo->bno", x.unflatten(-1, (2, 2)), self.weight)

    def experts(self, x: Tensor) -> Tensor:
        return (x[:, None] @ self.weight + self.bias).mean(1)

    def kernel(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.conv2d(x.mT[..., None], self.weight))
        return F.conv_transpose2d(y, self.weight)[..., 0].mT

    def bilinear(self, x: Tensor) -> Tensor:
        return self.pair(x, torch.sin(x))

    def scaled(self, x: Tensor) -> Tensor:
        return x @ (self.weight / self.weight.norm(dim=0))

    def turned(self, x: Tensor) -> Tensor:
        return torch.einsum("btc,cd->dbt", x, self.weight).permute(1, 2, 0)

    def base(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return torch.tanh(y + self.bias[0, 0]) * torch.sigmoid(y)


@pytest.mark.parametrize("way", ["heads", "experts", "kernel", "bilinear", "scaled", "turned"])
def test_what_cannot_be_fitted_keeps_its_zipped_weights_and_is_named(way: str) -> None:
    x = random(24, 5, 3)
    nets = [filled(Odd(2 + k, way), k) for k in range(2)]
    options = {"method": "average", "verify": False, "progress": False}
    before = fxzip.compile_zip(*nets, x[:2], data=[x], refit=None, **options)
    after = fxzip.compile_zip(*nets, x[:2], data=[x], refit=FIT, **options)
    kept = "trunk.pair.weight" if way == "bilinear" else "trunk.weight"
    assert torch.equal(after.get_parameter(kept), before.get_parameter(kept))
    assert any(note.startswith("left as zipped, since") for note in after.report["notes"])
    assert "first" in after.meta["fxzip_fit"].fitted
    assert all(bool(y.isfinite().all()) for y in after(x))


@pytest.mark.parametrize("way", ["heads", "experts", "kernel", "bilinear", "scaled", "turned", "base"])
def test_twins_stay_exact_however_they_are_written(way: str) -> None:
    x = random(48, 5, 3)
    net = filled(Odd(3, way), 0)
    zipped = fxzip.compile_zip(net, copy.deepcopy(net), x[:2], data=[x], method="permute", progress=False)
    for found in zipped(x):
        close(found, net(x), rtol=1e-9, atol=1e-9)


class Cells(nn.Module):
    """A recurrent cell, step by step: what a later target needs lies several calls back."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.last = nn.Embedding(11, 6), nn.LSTMCell(6, 5), nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h, state = self.table(ids), None
        for step in range(3):
            state = self.cell(h[:, step], state)
        assert state is not None
        return self.last(state[0])


def test_values_that_are_asked_for_again_are_computed_from_the_inputs() -> None:
    models = [randomise(Cells(), seed).double() for seed in range(2)]
    ids = torch.randint(11, (64, 3), generator=torch.Generator().manual_seed(0))
    zipped = fxzip.compile_zip(models, ids[:4], data=[ids[:40], ids[40:]], until="cell_1", progress=False)
    assert "least squares" in " ".join(zipped.report.notes)
    assert all(found.shape == (64, 3) for found in zipped(ids))


class Mixer(nn.Module):
    """A call over the tokens: the channels, features of the trunk, lie across its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b, self.last = nn.Embedding(11, 6), nn.Linear(5, 4), nn.Linear(4, 5), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        h = h + self.b(F.silu(self.a(h.transpose(1, 2)))).transpose(1, 2)
        return self.last(h.mean(1))


@pytest.mark.parametrize("until", ["table", "a", "silu", None])
def test_features_of_the_trunk_that_lie_across_are_in_its_order(until: str | None) -> None:
    model = randomise(Mixer(), 0).double()
    ids = torch.randint(11, (96, 5), generator=torch.Generator().manual_seed(0))
    twin = fxzip.relabel(model, ids[:4], seed=3)
    assert not torch.equal(twin.get_parameter("table.weight"), model.table.weight)
    zipped = fxzip.compile_zip(model, twin, ids[:4], data=[ids], until=until, progress=False)
    for found in zipped(ids):
        close(found, model(ids), rtol=1e-6, atol=1e-6)

"""Rarer idioms: computed scales, parametrisations, complex weights, sparse experts, cells, loops, mapped functions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .building import LAST, Block, Chain, Draw, Stream, features, pointwise
from .spaces import Axis

ANY = ("vector", "tokens", "image")


class Conditioned(Block, takes=ANY):
    """A scale and a shift for each feature, computed from parameters alone."""

    def build(self, draw: Draw, x: Stream) -> None:
        first, second = Axis.new(draw.width(3, 6)), Axis.new(draw.width(3, 6))
        self.p = draw.parameter(first)
        self.a, self.act = draw.linear(first, second), draw.activation(second)
        self.b = draw.linear(second, Axis.join(x.axis, x.axis))
        self.image = x.kind == "image"

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.b(self.act(self.a(self.p))).chunk(2, -1)
        if self.image:
            scale, shift = scale[:, None, None], shift[:, None, None]
        return x * (1 + scale) + shift


class Parametrised(Block, takes=LAST):
    """A weight that a parametrisation of torch computes."""

    def build(self, draw: Draw, x: Stream) -> None:
        y, self.how = Axis.new(draw.width()), draw.choice(["weight_norm", "spectral_norm"])
        layer = nn.Linear(x.axis.size, y.size)
        draw.account.own(layer.bias, y)
        if self.how == "weight_norm":
            self.layer = parametrizations.weight_norm(layer)
            inner = self.layer.parametrizations.weight
            draw.account.own(inner.original0, y, 1)
            draw.account.own(inner.original1, y, x.axis)
        else:
            self.layer = parametrizations.spectral_norm(layer)
            inner = self.layer.parametrizations.weight
            draw.account.own(inner.original, y, x.axis)
            draw.account.own(inner[0]._u, y)
            draw.account.own(inner[0]._v, x.axis)
        self.act, self.out = draw.activation(y), x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


class Frozen(Block, takes=ANY):
    """A normalisation with statistics of its own, as detectors have it, or a fixed scale of each feature."""

    def build(self, draw: Draw, x: Stream) -> None:
        n, self.shape = x.axis.size, (1, -1, 1, 1) if x.kind == "image" else (-1,)
        for name in ("weight", "variance"):
            draw.buffer(self, name, torch.rand(n) + 0.5, x.axis)
        for name in ("bias", "mean"):
            draw.buffer(self, name, torch.randn(n) * 0.3, x.axis)

    def forward(self, x: Tensor) -> Tensor:
        w, b, v, m = (t.reshape(self.shape) for t in (self.weight, self.bias, self.variance, self.mean))
        scale = w * (v + 1e-5).rsqrt()
        return x * scale + (b - m * scale)


class Spectral(Block, takes=("tokens", "image")):
    """A product with complex weights in the frequencies of tokens or places."""

    def build(self, draw: Draw, x: Stream) -> None:
        y, self.n = Axis.new(draw.width()), x.length
        self.image, modes = x.kind == "image", x.length // 2 + 1
        self.by_hand = draw.coin()
        shape = (x.axis.size, y.size, modes, 2)
        self.w = draw.kernel(x.axis, y, modes, 2, inputs=x.axis.size, shape=shape)
        self.out = x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.view_as_complex(self.w)
        if self.image:
            return torch.fft.irfft(torch.einsum("bihm,iom->bohm", torch.fft.rfft(x), w), n=self.n)
        spectrum = torch.fft.rfft(x, dim=1)
        if self.by_hand:
            spectrum = (spectrum.transpose(1, 2)[:, :, None] * w).sum(1).transpose(1, 2)
        else:
            spectrum = torch.einsum("bmi,iom->bmo", spectrum, w)
        return torch.fft.irfft(spectrum, n=self.n, dim=1)


class Experts(Block, takes=("vector",)):
    """A mixture of layers: each row goes to the one of the greatest score, or to all by their scores."""

    def build(self, draw: Draw, x: Stream) -> None:
        n, y = draw.rng.randint(2, 3), Axis.new(draw.width())
        self.how = draw.choice(["soft", "masked", "dispatched", "gathered"])
        self.router = draw.linear(x.axis, Axis.fixed(n))
        if self.how == "gathered":
            self.w = draw.kernel(n, x.axis, y, inputs=x.axis.size)
        else:
            self.experts = nn.ModuleList(draw.linear(x.axis, y) for _ in range(n))
        self.out = x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        if self.how == "soft":
            return (torch.stack([e(x) for e in self.experts], 1) * scores[..., None]).sum(1)
        best = scores.argmax(-1)
        if self.how == "gathered":
            return torch.einsum("bi,bio->bo", x, self.w[best])
        if self.how == "masked":
            parts = [e(x) * (best == i)[:, None].to(x.dtype) for i, e in enumerate(self.experts)]
            return torch.stack(parts).sum(0)
        y = x.new_zeros(x.shape[0], self.out.axis.size)
        for i, expert in enumerate(self.experts):
            rows = torch.where(best == i)[0]
            y = y.index_add(0, rows, expert(x[rows]))
        return y


class Cells(Block, takes=("tokens",)):
    """Recurrent cells in a loop over tokens; the last state stands for all."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.how, y = draw.choice(["RNNCell", "LSTMCell"]), Axis.new(draw.rng.randint(3, 6))
        self.cell = getattr(nn, self.how)(x.axis.size, y.size)
        for name, value in self.cell.named_parameters():
            rows = Axis.join(*[y] * (4 if self.how == "LSTMCell" else 1))
            draw.account.own(value, rows, *([] if value.ndim == 1 else [x.axis if "ih" in name else y]))
        self.out = x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        state, states = None, []
        for token in x.unbind(1):
            state = self.cell(token, state)
            states.append(state[0] if self.how == "LSTMCell" else state)
        return torch.stack(states, 1)


class Mapped(Block, takes=LAST):
    """A layer that is mapped over the batch, or run row by row."""

    def build(self, draw: Draw, x: Stream) -> None:
        y, self.how = Axis.new(draw.width()), draw.choice(["vmap", "unbound", "rows", "checked"])
        self.w, self.b = draw.kernel(y, x.axis, inputs=x.axis.size), draw.parameter(y)
        self.out = x.with_axis(y)

    def one(self, row: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(row, self.w, self.b))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "vmap":
            return torch.func.vmap(self.one)(x)
        if self.how == "unbound":
            return torch.stack([self.one(row) for row in x.unbind(0)])
        if self.how == "rows":
            return torch.stack([self.one(x[i]) for i in range(len(x))])
        return self.one(x) if x.shape[0] > 1 else self.one(x[0])[None]


class Stripes(Block, takes=ANY):
    """Several writes in place: into stripes, through views of views, and into what a loop goes through."""

    def build(self, draw: Draw, x: Stream) -> None:
        n, self.dim = draw.rng.randint(6, 9), features(x)
        y = Axis.new(n)
        self.a, self.how = pointwise(draw, x, y), draw.choice(["view", "views", "loop", "copy", "out"])
        parts = y.cut(2, 2, n - 4)
        if self.how == "loop":
            y.fix()
        del parts
        self.out = x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        h = x.movedim(self.dim, 0)
        if self.how == "view":
            h[2:4].add_(1)
        elif self.how == "views":
            part = h[:4]
            part[:2].tanh_()
            part[2:] *= 2
        elif self.how == "loop":
            for i in range(3):
                h[i] += i
        elif self.how == "copy":
            h[:2].copy_(h[2:4].relu().sum(0, keepdim=True).expand_as(h[:2]))
        else:
            torch.sigmoid(h[:2].clone(), out=h[:2])
        return x


class Ordered(Block, takes=("image",)):
    """Efficient channel attention and its kin on images: the order of channels matters."""

    def build(self, draw: Draw, x: Stream) -> None:
        x.axis.fix()
        self.how = draw.choice(["eca", "response", "cumsum", "roll", "mask", "conv3d"])
        if self.how == "eca":
            self.w = draw.parameter(1, 1, 3)
        if self.how == "conv3d":
            self.w = draw.parameter(1, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "eca":
            gate = nn.functional.conv1d(x.mean((2, 3))[:, None], self.w, padding=1)[:, 0]
            return x * torch.sigmoid(gate)[:, :, None, None]
        if self.how == "conv3d":
            return nn.functional.conv3d(x[:, None], self.w, padding=(1, 0, 0))[:, 0]
        if self.how == "response":
            return nn.functional.local_response_norm(x, 3, alpha=1.0)
        if self.how == "mask":
            return x * (torch.arange(x.shape[1]) % 2 == 0).to(x.dtype)[:, None, None]
        return x.cumsum(1) if self.how == "cumsum" else x + x.roll(1, 1)


class Branches(Block, takes=ANY, wraps=True):
    """Two ways that meet in a weighted sum: the weights are parameters, one for each way."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.inner, y = Chain(draw, x), Axis.new(draw.width())
        self.a, self.b = pointwise(draw, x, y), pointwise(draw, self.inner.out, y)
        self.weights, self.how = draw.parameter(2), draw.choice(["softmax", "plain", "gate"])
        self.out = x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(self.inner(x))
        if self.how == "gate":
            gate = torch.sigmoid(self.weights[0])
            return gate * a + (1 - gate) * b
        w = self.weights.softmax(0) if self.how == "softmax" else self.weights
        return w[0] * a + w[1] * b

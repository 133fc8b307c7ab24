"""Blocks around other blocks: sums, gates, slices, concatenations, writes in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .building import Block, Chain, Draw, Stream, features, pointwise
from .spaces import Axis

ANY = ("vector", "tokens", "image")


class Residual(Block, takes=ANY, wraps=True):
    """A sum with what it reads, scaled in any way, normalised before, behind, or not at all."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.inner = Chain(draw, x)
        self.last = pointwise(draw, self.inner.out, x.axis)
        self.how = draw.choice(["sum", "sum", "gated", "scaled", "difference", "in place"])
        if self.how == "gated":
            self.gate = draw.parameter(1, shape=()) if draw.coin(0.7) else draw.parameter(1)
        if self.how == "scaled":
            self.scale = draw.parameter(x.axis, *([1, 1] if x.kind == "image" else []))

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.inner(x))
        if self.how == "gated":
            return x + torch.tanh(self.gate) * y
        if self.how == "scaled":
            return x + self.scale * y
        if self.how == "in place":
            y += x
            return y
        return x - y if self.how == "difference" else x + y


class Gate(Block, takes=ANY, wraps=True):
    """A product with a function of what it reads, or a mixture of both."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.inner = Chain(draw, x)
        self.last = pointwise(draw, self.inner.out, x.axis)
        self.how = draw.choice(["product", "mixture", "film", "maximum"])
        if self.how == "film":
            self.other = pointwise(draw, self.inner.out, x.axis)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        y = self.last(inner)
        if self.how == "product":
            return x * torch.sigmoid(y)
        if self.how == "mixture":
            return torch.lerp(x, torch.tanh(y), 0.3)
        return x * (1 + y) + self.other(inner) if self.how == "film" else torch.maximum(x, y)


class Halves(Block, takes=ANY):
    """A gated linear unit: two halves of one layer, taken apart in any way."""

    def build(self, draw: Draw, x: Stream) -> None:
        y, self.dim = Axis.new(draw.width(3, 8)), features(x)
        self.size = y.size
        self.how = draw.choice(["chunk", "split", "slice", "narrow", "view", "interleaved"])
        interleaved = torch.arange(y.size).repeat_interleave(2)
        both = y.moved(interleaved) if self.how == "interleaved" else Axis.join(y, y)
        self.a, self.act = pointwise(draw, x, both), draw.activation(y)
        self.out = x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        x, n, dim = self.a(x), self.size, self.dim
        if self.how == "chunk":
            a, b = x.chunk(2, dim)
        elif self.how == "split":
            a, b = x.split([n, n], dim)
        elif self.how == "slice":
            a, b = (x[:, :n], x[:, n:]) if dim == 1 else (x[..., :n], x[..., n:])
        elif self.how == "narrow":
            a, b = x.narrow(dim, 0, n), x.narrow(dim, n, n)
        elif self.how == "view":
            a, b = x.unflatten(dim, (2, n)).unbind(dim if dim == 1 else -2)
        else:
            a, b = (x[:, ::2], x[:, 1::2]) if dim == 1 else (x[..., ::2], x[..., 1::2])
        return self.act(a) * b


class Dense(Block, takes=ANY, wraps=True):
    """What it reads and what it computes of it, side by side."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.inner, y = Chain(draw, x), Axis.new(draw.rng.randint(1, 4))
        self.last, self.dim, self.first = pointwise(draw, self.inner.out, y), features(x), draw.coin()
        self.out = x.with_axis(Axis.join(x.axis, y) if self.first else Axis.join(y, x.axis))

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.inner(x))
        return torch.cat([x, y] if self.first else [y, x], self.dim)


class Parts(Block, takes=ANY, wraps=True):
    """A layer in halves that go separate ways and meet again side by side (C2f)."""

    def build(self, draw: Draw, x: Stream) -> None:
        n, self.dim = draw.rng.randint(2, 5), features(x)
        y = Axis.new(2 * n)
        self.a, self.act = pointwise(draw, x, y), draw.activation(y)
        self.how, self.size, self.short = draw.choice(["chunk", "slice", "uneven"]), n, draw.coin()
        self.at = n + (self.how == "uneven")
        first, second = y.cut(self.at, 2 * n - self.at)
        own = x.with_axis(second)
        self.inner = Chain(draw, own)
        third = second if self.short else Axis.new(n)
        self.last = pointwise(draw, self.inner.out, third)
        self.out = x.with_axis(Axis.join(first, second, third))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        if self.how == "chunk":
            a, b = x.chunk(2, self.dim)
        elif self.dim == 1:
            a, b = x[:, : self.at], x[:, self.at :]
        else:
            a, b = x[..., : self.at], x[..., self.at :]
        c = self.last(self.inner(b))
        return torch.cat([a, b, b + c if self.short else c], self.dim)


class Written(Block, takes=ANY):
    """A write in place through a view of some of the features."""

    def build(self, draw: Draw, x: Stream) -> None:
        y, self.dim = Axis.new(draw.width()), features(x)
        self.a = pointwise(draw, x, y)
        self.how = draw.choice(["relu", "add", "assign", "mul", "zero", "masked", "sub"])
        self.stop = draw.rng.randint(1, y.size - 1)
        y.cut(self.stop, y.size - self.stop)
        self.out = x.with_axis(y)
        if self.how == "sub":
            y.fix()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        part = x[:, : self.stop] if self.dim == 1 else x[..., : self.stop]
        if self.how == "relu":
            part.relu_()
        elif self.how == "add":
            part.add_(1)
        elif self.how == "mul":
            part *= 0.5
        elif self.how == "zero":
            part.zero_()
        elif self.how == "masked":
            x[x < 0] = 0
        elif self.how == "assign":
            if self.dim == 1:
                x[:, : self.stop] = torch.tanh(part)
            else:
                x[..., : self.stop] = torch.tanh(part)
        else:
            x.select(self.dim, 0).sub_(2)
        return x


class Numbers(Block, takes=ANY):
    """Parameters that are numbers: a scale and a shift for all features, or a weighted sum of two functions."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.a, self.b = draw.parameter(1, shape=(), shift=1.0), draw.parameter(1)
        self.how = draw.choice(["affine", "mixture", "power", "temperature"])

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "affine":
            return self.a * x + self.b
        if self.how == "mixture":
            return torch.sigmoid(self.b) * torch.tanh(x) + self.a * x
        if self.how == "power":
            return torch.sign(x) * (x.abs() + 1e-3) ** self.a.abs().clamp(0.5, 2)
        return x / (1 + self.b.exp())


class Twice(Block, takes=ANY):
    """One layer that is run twice: its inputs and outputs are the same features."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.layer, self.act, self.n = pointwise(draw, x, x.axis), draw.activation(x.axis), draw.rng.randint(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.n):
            x = self.act(self.layer(x))
        return x


class Statistics(Block, takes=ANY):
    """Features are compared with what all of them have together: a mean, a norm, a maximum, a softmax."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.how, self.dim = draw.choice(["mean", "norm", "maximum", "softmax", "sum", "deviation"]), features(x)

    def forward(self, x: Tensor) -> Tensor:
        d = self.dim
        if self.how == "mean":
            return x - x.mean(d, keepdim=True)
        if self.how == "norm":
            return nn.functional.normalize(x, dim=d)
        if self.how == "maximum":
            return x - x.amax(d, keepdim=True)
        if self.how == "softmax":
            return x + x.softmax(d)
        return (
            x + x.sum(d, keepdim=True).tanh() if self.how == "sum" else x / (1 + x.std(d, keepdim=True, correction=0))
        )

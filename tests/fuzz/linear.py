"""Linear layers on the last axis in the many forms in which they are written, with the weight as it is or computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .building import LAST, Block, Draw, Stream
from .spaces import Axis, Grouped

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def _bmm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    rows = x if x.ndim == 3 else x[None]
    return torch.bmm(rows, w.expand(rows.shape[0], -1, -1)).view(*x.shape[:-1], -1) + b


FORMS: dict[str, Form] = {  # x [..., i], w [i, o], b [o]
    "matmul": lambda x, w, b: x @ w + b,
    "transposed": lambda x, w, b: F.linear(x, w.t(), b),
    "transposed by hand": lambda x, w, b: x @ w.t().contiguous().t() + b,
    "einsum": lambda x, w, b: torch.einsum("...c,cd->...d", x, w) + b,
    "bias first": lambda x, w, b: b + torch.einsum("...c,cd->...d", x, w),
    "tensordot": lambda x, w, b: torch.tensordot(x, w, dims=1) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w).view(*x.shape[:-1], -1),
    "products": lambda x, w, b: (x[..., None] * w).sum(-2) + b,
    "bmm": _bmm,
    "in place": lambda x, w, b: x.matmul(w).add_(b),
    "scaled": lambda x, w, b: torch.einsum("...c,cd->...d", x, w) * b + b,
    "no bias": lambda x, w, b: torch.einsum("...c,cd->...d", x, w),
    "mean": lambda x, w, b: (x.unsqueeze(-1) * w).mean(-2) + b,
}


class Linear(Block, takes=LAST):
    """A weight [inputs, outputs] and a bias, in any form, and an activation."""

    def build(self, draw: Draw, x: Stream) -> None:
        y = Axis.new(draw.width())
        self.form = draw.choice(list(FORMS))
        self.weight, self.bias = draw.kernel(x.axis, y, inputs=x.axis.size), draw.parameter(y)
        self.act = draw.activation(y)
        self.out = x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(FORMS[self.form](x, self.weight, self.bias))


class Plain(Block, takes=LAST):
    """nn.Linear, with or without a bias, a normalisation and an activation in front or behind."""

    def build(self, draw: Draw, x: Stream) -> None:
        y = Axis.new(draw.width())
        self.linear = draw.linear(x.axis, y, bias=draw.coin(0.8))
        self.act = draw.activation(y)
        kinds = ["none", "layer", "rms"] + (["batch", "group"] if x.kind == "vector" else [])
        self.kind, self.first = draw.choice(kinds), draw.coin()
        if self.kind == "batch":
            self.norm = draw.affine(nn.BatchNorm1d(y.size), y)
        elif self.kind == "group":
            self.norm = draw.affine(nn.GroupNorm(1, y.size), y)
        elif self.kind == "layer":
            self.norm = draw.affine(nn.LayerNorm(y.size), y)
        elif self.kind == "rms":
            self.norm = draw.affine(nn.RMSNorm(y.size, eps=1e-6), y)
        else:
            self.norm = nn.Identity()
        self.out = x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.act(self.norm(x)) if self.first else self.norm(self.act(x))


class Computed(Block, takes=LAST):
    """A weight computed from parameters: low rank, with an adapter, normed, standardised, equalised, read twice."""

    def build(self, draw: Draw, x: Stream) -> None:
        y, rank = Axis.new(draw.width()), Axis.new(draw.rng.randint(2, 4))
        self.how = draw.choice(
            ["low rank", "adapter", "normed", "standardised", "equalised", "tied", "softmax", "masked"]
        )
        if self.how == "low rank":
            self.u, self.v = draw.parameter(y, rank), draw.kernel(rank, x.axis, inputs=x.axis.size)
        else:
            self.w = draw.kernel(y, x.axis, inputs=x.axis.size)
        if self.how == "adapter":
            self.u, self.v = draw.parameter(y, rank), draw.kernel(rank, x.axis, inputs=x.axis.size)
        if self.how == "normed":
            self.g = draw.parameter(y, 1)
        if self.how == "tied":
            self.c = draw.parameter(x.axis)
        self.bias = draw.parameter(y)
        self.act = draw.activation(y)
        self.out = x.with_axis(x.axis if self.how == "tied" else y)

    def weight(self) -> Tensor:
        if self.how == "low rank":
            return self.u @ self.v
        w = self.w
        if self.how == "adapter":
            return w + 0.5 * self.u @ self.v
        if self.how == "normed":
            return self.g * w / w.norm(dim=1, keepdim=True)
        if self.how == "standardised":
            return (w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True, correction=0) + 1e-3).sqrt()
        if self.how == "equalised":
            return w * (2 / w.shape[1]) ** 0.5
        if self.how == "softmax":
            return w.softmax(1)
        return w.tanh() if self.how == "masked" else w

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight()
        y = self.act(F.linear(x, w, self.bias))
        return F.linear(y, w.t(), self.c) if self.how == "tied" else y


class Expanded(Block, takes=LAST):
    """Functions of each feature with weights of their own (splines), a bilinear map, or a maximum of several maps."""

    def build(self, draw: Draw, x: Stream) -> None:
        y, k = Axis.new(draw.width()), draw.rng.randint(2, 3)
        self.how, self.k = draw.choice(["basis", "maxout", "bilinear", "embedding of a number"]), k
        if self.how == "basis":
            self.w = draw.kernel(y, x.axis, k, inputs=x.axis.size * k)
        elif self.how == "maxout":
            self.w = draw.kernel(y.moved(torch.arange(y.size).repeat_interleave(k)), x.axis, inputs=x.axis.size)
        elif self.how == "bilinear":
            self.w = nn.Bilinear(x.axis.size, x.axis.size, y.size)
            draw.account.own(self.w.weight, y, x.axis, x.axis)
            draw.account.own(self.w.bias, y)
        else:
            self.w, self.v = draw.parameter(x.axis, y), draw.parameter(x.axis, y)
        self.out = x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "basis":
            powers = torch.stack([torch.sin((i + 1) * x) for i in range(self.k)], -1)
            return torch.einsum("...ik,oik->...o", powers, self.w)
        if self.how == "maxout":
            return F.linear(x, self.w).unflatten(-1, (-1, self.k)).amax(-1)
        if self.how == "bilinear":
            return self.w(x, x)
        return (torch.sin(x[..., None] * self.w) * self.v).sum(-2)


class Diagonal(Block, takes=LAST):
    """A weight for each block of features, nothing between blocks, in several forms."""

    def build(self, draw: Draw, x: Stream) -> None:
        g, c, d = draw.rng.randint(2, 3), draw.rng.randint(2, 4), draw.rng.randint(2, 4)
        a = Axis.new(g * c)
        b = Axis.new(g * d, order=a.in_blocks(g))
        self.a, self.shape, self.act = draw.linear(x.axis, a), (g, c, d), draw.activation(a)
        self.w = draw.kernel(a, Grouped(b, g), inputs=c, shape=(g, c, d))
        self.how = draw.choice(["einsum", "bmm", "products"])
        self.out = x.with_axis(b)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x)).unflatten(-1, self.shape[:2])
        if self.how == "einsum":
            return torch.einsum("...gc,gcd->...gd", x, self.w).flatten(-2)
        if self.how == "bmm":
            rows = x.reshape(-1, *self.shape[:2]).transpose(0, 1)
            return torch.bmm(rows, self.w).transpose(0, 1).reshape(*x.shape[:-2], -1)
        return (x[..., None] * self.w).sum(-2).flatten(-2)

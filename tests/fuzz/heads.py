"""What networks return, and how: logits, one value, masks, decisions, several outputs in any container."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .building import Block, Draw, Stream, features, pointwise
from .spaces import Axis

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Output:
    """An output as many libraries give it."""

    logits: Any
    more: Any = None


WRAPPED = {
    "tensor": lambda y, z: y,
    "tuple": lambda y, z: (y, z),
    "list": lambda y, z: [y, z],
    "dict": lambda y, z: {"logits": y, "class": z},
    "ordered": lambda y, z: OrderedDict(logits=y, more=z),
    "user": lambda y, z: UserDict(logits=y, more=z),
    "named": lambda y, z: Pair(y, z),
    "dataclass": lambda y, z: Output(y, z),
    "nested": lambda y, z: {"a": (y, [z]), "b": Output(z)},
    "single": lambda y, z: Output(y),
}
AFTER = {
    "logits": lambda y, d: y,
    "probabilities": lambda y, d: y.softmax(d),
    "sigmoid": lambda y, d: y.sigmoid(),
    "decision": lambda y, d: y.argmax(d),
    "best": lambda y, d: y.topk(1, d).values,
    "mean": lambda y, d: y.mean(d),
    "energy": lambda y, d: y.logsumexp(d),
    "norm": lambda y, d: y.norm(dim=d),
}


class Head(Block):
    """The end of a network. `classes` is the only size that differs between tasks. A plain one gives logits."""

    def __init__(self, draw: Draw, stream: Stream, classes: int, *, plain: bool = False) -> None:
        self.classes, self.plain = classes, plain
        super().__init__(draw, stream)

    def build(self, draw: Draw, x: Stream) -> None:
        self.one = draw.coin(0.3) and not self.plain
        y = Axis.fixed(1 if self.one else self.classes)
        self.dim, self.kind = features(x), x.kind
        self.last, self.hidden = nn.Identity(), draw.coin(0.3) and not self.plain
        if self.hidden:
            h = Axis.new(draw.width())
            self.before, self.act = pointwise(draw, x, h), draw.activation(h)
            x = x.with_axis(h)
        self.last = pointwise(draw, x, y, bias=draw.coin(0.8))
        self.container = "tensor" if self.plain else draw.choice(["tensor"] * 8 + list(WRAPPED))
        self.after = "logits" if self.plain else draw.choice(["logits"] * 12 + list(AFTER))
        self.pooled = draw.coin() and x.kind != "vector"
        self.affine = draw.coin(0.1) and not self.plain
        if self.affine:
            draw.buffer(self, "mean", torch.randn(()).abs() + 0.5)
        self.second = draw.choice(["logits", "probabilities", "features", "mean"])
        if self.container not in ("tensor", "single") and self.second == "features":
            x.axis.fix()

    def forward(self, x: Tensor) -> Any:
        if self.hidden:
            x = self.act(self.before(x))
        if self.pooled:
            x = x.mean((2, 3), keepdim=True) if self.kind == "image" else x.mean(1, keepdim=True)
        y = self.last(x)
        if self.affine:
            y = y * self.mean + 2
        out = AFTER[self.after](y, self.dim)
        if self.container == "tensor":
            return out
        second = {"logits": y, "probabilities": y.softmax(self.dim), "features": x, "mean": y.mean(self.dim)}
        return WRAPPED[self.container](out, second[self.second])

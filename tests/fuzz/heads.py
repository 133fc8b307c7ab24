"""What networks return, and how: logits, one value, masks, decisions, several outputs in any container."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


SPECIAL = ("denoised", "early", "tied", "prototypes", "masked", "split", "rescaled", "sampled")


@dataclass(frozen=True, eq=False)
class Context:
    """What an end may read beside the last features: the input, features on the way, and the axis of an embedding."""

    start: Stream
    hidden: tuple[Stream, ...]
    table: Axis | None = None


class Head(Block):
    """The end of a network. `classes` is the only size that differs between tasks. A plain one gives logits."""

    def __init__(self, draw: Draw, stream: Stream, classes: int, context: Context, *, plain: bool = False) -> None:
        self.classes, self.plain, self.context = classes, plain, context
        super().__init__(draw, stream)
        del self.context

    def build(self, draw: Draw, x: Stream) -> None:
        self.special = "" if self.plain or draw.coin(0.7) else self.possible(draw.choice(SPECIAL), x)
        self.one = draw.coin(0.3) and not self.plain and self.special not in ("denoised", "split")
        y = Axis.fixed(5 if self.special == "denoised" else 1 if self.one else self.classes)
        self.dim, self.kind = features(x), x.kind
        self.hidden = draw.coin(0.3) and not self.plain and self.special not in ("tied", "prototypes")
        if self.hidden:
            h = Axis.new(draw.width())
            self.before, self.act = pointwise(draw, x, h), draw.activation(h)
            x = x.with_axis(h)
        self.end(draw, x, y)
        usual = self.plain or self.special != ""
        self.container = "tensor" if usual else draw.choice(["tensor"] * 8 + list(WRAPPED))
        self.after = "logits" if usual else draw.choice(["logits"] * 12 + list(AFTER))
        self.pooled = draw.coin() and x.kind != "vector" and self.special not in ("denoised", "masked")
        self.second = draw.choice(["logits", "probabilities", "features", "mean"])
        if self.container not in ("tensor", "single") and self.second == "features":
            x.axis.fix()

    def possible(self, special: str, x: Stream) -> str:
        """The special end, or none where the stream does not allow it."""
        start, table = self.context.start, self.context.table
        if special == "denoised" and (table is not None or (x.kind, x.length) != (start.kind, start.length)):
            return ""
        if special == "tied" and (table is None or table.size != x.axis.size or x.kind == "image"):
            return ""
        if special == "prototypes" and x.kind == "image":
            return ""
        if special == "masked" and (x.kind, x.length, start.kind == "image") != ("tokens", start.length, False):
            return ""
        return special

    def end(self, draw: Draw, x: Stream, y: Axis) -> None:
        """The modules that write the outputs."""
        if self.special == "tied":
            assert self.context.table is not None
            x.axis.tie(self.context.table)
            return
        if self.special == "prototypes":
            self.codes = draw.parameter(self.classes, x.axis, scale=1.0)
            return
        self.last = pointwise(draw, x, y, bias=draw.coin(0.8))
        if self.special == "sampled":
            self.spread = pointwise(draw, x, y)
        if self.special == "rescaled":
            for name in ("mean", "deviation"):
                draw.buffer(self, name, torch.rand(()) + 0.5)
        if self.special == "early":
            for stream in self.context.hidden:
                stream.axis.fix()

    def forward(self, x: Tensor, start: Tensor, hidden: list[Tensor], table: Any) -> Any:
        if self.hidden:
            x = self.act(self.before(x))
        if self.pooled:
            x = x.mean((2, 3), keepdim=True) if self.kind == "image" else x.mean(1, keepdim=True)
        if self.special == "tied":
            return x @ table.weight.t()
        if self.special == "prototypes":
            return -torch.cdist(x, self.codes if x.ndim == 2 else self.codes[None])
        y = self.last(x)
        if self.special:
            return self.special_end(x, y, start, hidden)
        out = AFTER[self.after](y, self.dim)
        if self.container == "tensor":
            return out
        second = {"logits": y, "probabilities": y.softmax(self.dim), "features": x, "mean": y.mean(self.dim)}
        return WRAPPED[self.container](out, second[self.second])

    def special_end(self, x: Tensor, y: Tensor, start: Tensor, hidden: list[Tensor]) -> Any:
        if self.special == "denoised":
            return start - y
        if self.special == "early":
            return y, *hidden
        if self.special == "masked":
            return y[(start if start.ndim == 2 else start[..., 0]) > 0]
        if self.special == "split":
            return tuple(part.squeeze(self.dim) for part in y.split(1, self.dim))
        if self.special == "rescaled":
            return y * self.deviation + self.mean
        return y, self.spread(x).clamp(max=3).exp()

"""Calls in which the order of features matters: they cannot move there. And movements, behind which they still can."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .building import LAST, Block, Draw, Stream


def _one_hot(x: Tensor) -> Tensor:
    return x + F.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype)


def _neighbours(x: Tensor) -> Tensor:
    rows = x.reshape(-1, 1, x.shape[-1])
    kernel = torch.tensor([[[0.5, 1.0, -0.5]]], dtype=x.dtype)
    return F.conv1d(rows, kernel, padding=1).reshape(x.shape)


FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "cumsum": lambda x: x.cumsum(-1),
    "sort": lambda x: x.sort(-1).values,
    "flip": lambda x: x + x.flip(-1),
    "roll": lambda x: x + x.roll(1, -1),
    "mask": lambda x: x * (torch.arange(x.shape[-1]) < 3).to(x.dtype),
    "fourier": lambda x: torch.fft.rfft(x, dim=-1).abs().repeat_interleave(2, -1)[..., : x.shape[-1]],
    "one hot": _one_hot,
    "diff": lambda x: F.pad(torch.diff(x, dim=-1), (1, 0)),
    "topk": lambda x: x.topk(x.shape[-1], -1).values,
    "neighbours": _neighbours,
    "pool": lambda x: F.avg_pool1d(x.reshape(-1, 1, x.shape[-1]), 3, 1, 1).reshape(x.shape),
    "response": lambda x: F.local_response_norm(x.reshape(-1, x.shape[-1], 1), 3, alpha=1.0).reshape(x.shape),
    "differences": lambda x: (x - torch.cat([x[..., 1:], x[..., :1]], -1)).abs(),
    "cummax": lambda x: x.cummax(-1).values,
    "positions": lambda x: x + torch.linspace(0, 1, x.shape[-1], dtype=x.dtype),
}


class Fixed(Block, takes=LAST):
    """The order of features matters."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.how = draw.choice(list(FIXED))
        x.axis.fix()

    def forward(self, x: Tensor) -> Tensor:
        return FIXED[self.how](x)


class Learned(Block, takes=LAST):
    """A convolution over features, as a gate or not: efficient channel attention."""

    def build(self, draw: Draw, x: Stream) -> None:
        x.axis.fix()
        self.w, self.gated = draw.parameter(1, 1, 3), draw.coin()

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv1d(x.reshape(-1, 1, x.shape[-1]), self.w, padding=1).reshape(x.shape)
        return x * torch.sigmoid(y) if self.gated else y


class Codes(Block, takes=LAST):
    """The nearest of some vectors, or the expert of the greatest score: which one it is is read by number."""

    def build(self, draw: Draw, x: Stream) -> None:
        n = draw.rng.randint(3, 5)
        self.how = draw.choice(["nearest", "expert", "chosen", "soft"])
        if self.how == "nearest":
            self.codes = draw.parameter(n, x.axis, scale=1.0)
        else:
            self.codes = draw.kernel(n, x.axis, inputs=x.axis.size)
            self.values = draw.parameter(n, x.axis, scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "nearest":
            distances = (x[..., None, :] - self.codes).square().sum(-1)
            return self.codes[distances.argmin(-1)] + 0.5 * x
        scores = x @ self.codes.t()
        if self.how == "soft":
            return scores.softmax(-1) @ self.values
        best = scores.argmax(-1)
        return x * self.values[best] if self.how == "expert" else x + F.embedding(best, self.values)


class Moved(Block, takes=LAST):
    """All features change places, once: behind that they are what they were."""

    def build(self, draw: Draw, x: Stream) -> None:
        n = x.axis.size
        self.how, places = draw.choice(["flip", "roll", "index", "cat"]), torch.arange(n)
        self.n = draw.rng.randint(1, n - 1) if n > 1 else 0
        if self.how == "index":
            draw.buffer(self, "places", torch.tensor(draw.rng.sample(range(n), n)))
        if self.how == "cat" and n > 1:
            first, second = x.axis.cut(self.n, n - self.n)
            self.out = x.with_axis(type(x.axis).join(second, first))
        else:
            self.out = x.with_axis(x.axis.moved(self(places)))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flip":
            return x.flip(-1)
        if self.how == "roll":
            return x.roll(self.n, -1)
        return x[..., self.places] if self.how == "index" else torch.cat([x[..., self.n :], x[..., : self.n]], -1)

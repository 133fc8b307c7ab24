"""Small networks in which heads, groups or pieces lie on an axis of their own somewhere, for cuts at every node.

Each entry of `CUTS` makes a model of so many outputs; `sample` gives its input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Tokens(nn.Module):
    """An embedding of tokens, one block, a pooled linear head. `block` takes and gives [batch, tokens, width]."""

    def __init__(self, outputs: int, block: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.embed, self.block, self.out = nn.Linear(5, width), block, nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.embed(x)).mean(1))


class Image(nn.Module):
    """A stem on images, one block, a pooled linear head. `block` takes and gives [batch, width, height, width]."""

    def __init__(self, outputs: int, block: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem, self.block, self.out = nn.Conv2d(3, width, 3, padding=1), block, nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(torch.relu(self.stem(x))).mean((2, 3)))


class Attention(nn.Module):
    """Attention by hand, heads on an axis of their own.

    kind: fused (q, k and v from one call), linear (keys and values are contracted first), decay (the same with one
    factor per head), covariance (features attend to features), queries (one key and value for all heads), temperature
    (one factor per head), gated (one gate per head from the tokens), talking (a linear map over heads), normed
    (LayerNorm inside heads), rotary (halves of a head are turned).
    """

    def __init__(self, kind: str, width: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.norm, self.back = nn.LayerNorm(width), nn.Linear(width, width)
        self.q = nn.Linear(width, 3 * width if kind == "fused" else width)
        shared = width // heads if kind == "queries" else width
        self.k, self.v = nn.Linear(width, shared), nn.Linear(width, shared)
        if kind in ("temperature", "decay"):
            self.factor = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        if kind == "gated":
            self.gate = nn.Linear(width, heads)
        if kind == "talking":
            self.talk = nn.Linear(heads, heads)
        if kind == "normed":
            self.inner = nn.LayerNorm(width // heads)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, c = x.shape
        if self.kind == "fused":
            q, k, v = self.q(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        q, k, v = (m(x).unflatten(-1, (-1, c // self.heads)).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.kind == "normed":
            q, k = self.inner(q), self.inner(k)
        if self.kind == "rotary":
            angle = torch.arange(t, dtype=x.dtype)[:, None] / 3
            q, k = (torch.cat([u * angle.cos() - w * angle.sin(), w * angle.cos() + u * angle.sin()], -1)
                    for u, w in (q.chunk(2, -1), k.chunk(2, -1)))  # fmt: skip
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self._heads(self.norm(x))
        if self.kind in ("linear", "decay"):
            state = F.elu(k).add(1).transpose(-2, -1) @ v
            if self.kind == "decay":
                state = state * self.factor
            y = (F.elu(q) + 1) @ state / t
        elif self.kind == "covariance":
            scores = F.normalize(q, dim=-2).transpose(-2, -1) @ F.normalize(k, dim=-2)
            y = v @ scores.softmax(-1).transpose(-2, -1)
        else:
            scores = q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5
            if self.kind == "temperature":
                scores = scores * self.factor
            if self.kind == "gated":
                scores = scores * torch.sigmoid(self.gate(x)).permute(0, 2, 1)[..., None]
            if self.kind == "talking":
                scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y = scores.softmax(-1) @ v
        return x + self.back(y.transpose(1, 2).reshape(b, t, c))


class Folded(nn.Module):
    """Attention by bmm, heads beside the batch on one axis: inside of it, outside, or behind the tokens."""

    def __init__(self, order: str, width: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.order, self.heads = order, heads
        self.q, self.k, self.v, self.back = (nn.Linear(width, width) for _ in range(4))

    def _fold(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        inner = c // self.heads
        if self.order == "outside":
            return torch.cat(x.split(inner, 2), 0)
        if self.order == "inside":
            return x.view(b, t, self.heads, inner).transpose(1, 2).reshape(b * self.heads, t, inner)
        return x.transpose(0, 1).reshape(t, b * self.heads, inner).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (self._fold(layer(x)) for layer in (self.q, self.k, self.v))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        if self.order == "outside":
            y = torch.cat(y.chunk(self.heads, 0), 2)
        elif self.order == "inside":
            y = y.view(b, self.heads, t, c // self.heads).transpose(1, 2).reshape(b, t, c)
        else:
            y = y.transpose(0, 1).reshape(t, b, c).transpose(0, 1)
        return x + self.back(y)


class Maxout(nn.Module):
    """The largest of several pieces, pieces on an axis of their own, behind or in front of the features."""

    def __init__(self, outer: bool, width: int = 8, pieces: int = 3) -> None:
        super().__init__()
        self.shape, self.axis = ((width, pieces), -1) if not outer else ((pieces, width), -2)
        self.wide, self.back = nn.Linear(width, width * pieces), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.wide(x).unflatten(-1, self.shape).amax(self.axis))


class BlockDiagonal(nn.Module):
    """Each group of features has a matrix of its own."""

    def __init__(self, groups: int = 4, width: int = 8, inner: int = 3) -> None:
        super().__init__()
        self.groups, self.weight = groups, nn.Parameter(torch.randn(groups, width // groups, inner))
        self.back = nn.Linear(groups * inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x).unflatten(-1, (self.groups, -1))
        return self.back(torch.einsum("...gc,gcd->...gd", x, self.weight).flatten(-2))


class Experts(nn.Module):
    """All experts run, each on an axis of its own, and are mixed by a gate."""

    def __init__(self, experts: int = 3, width: int = 8, inner: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, inner) / 3)
        self.down = nn.Parameter(torch.randn(experts, inner, width) / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("btc,ecd->bted", x, self.up))
        return x + (torch.einsum("bted,edc->btec", hidden, self.down) * self.gate(x).softmax(-1)[..., None]).sum(2)


class Edges(nn.Module):
    """Graph attention: one vector per head scores the pairs of nodes."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.map, self.back = heads, nn.Linear(width, width), nn.Linear(width, width)
        self.source, self.target = (nn.Parameter(torch.randn(heads, width // heads)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.map(x).unflatten(-1, (self.heads, -1))
        a, b = (h * self.source).sum(-1), (h * self.target).sum(-1)
        weight = F.leaky_relu(a[:, :, None] + b[:, None]).softmax(2)
        return self.back(F.elu(torch.einsum("bijh,bjhc->bihc", weight, h)).flatten(2))


class Gated(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(x).chunk(2, -1)
        return x + self.back(value * F.silu(gate))


class Mixer(nn.Module):
    def __init__(self, width: int = 8, tokens: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.over = nn.Sequential(nn.Linear(tokens, 10), nn.GELU(), nn.Linear(10, tokens))
        self.along = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(x)


class Axial(nn.Module):
    """Attention along rows, then along columns."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.rows, self.columns = (nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(b * h, w, c)
        rows = self.rows(rows, rows, rows, need_weights=False)[0].reshape(b, h, w, c)
        columns = rows.permute(0, 2, 1, 3).reshape(b * w, h, c)
        columns = self.columns(columns, columns, columns, need_weights=False)[0].reshape(b, w, h, c)
        return x + columns.permute(0, 3, 2, 1)


class Windows(nn.Module):
    """Attention inside windows of 4 x 4 with a bias per head."""

    def __init__(self, width: int = 8, heads: int = 4, side: int = 4) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(heads, side**2, side**2))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        s = self.side
        y = x.permute(0, 2, 3, 1).reshape(b, h // s, s, w // s, s, c).transpose(2, 3).reshape(-1, s * s, c)
        q, k, v = self.qkv(y).reshape(-1, s * s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = (((q @ k.transpose(-2, -1)) + self.bias).softmax(-1) @ v).transpose(1, 2).reshape(-1, s * s, c)
        y = self.back(y).reshape(b, h // s, w // s, s, s, c).transpose(2, 3).reshape(b, h, w, c)
        return x + y.permute(0, 3, 1, 2)


class Groups(nn.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self, width: int = 8, groups: int = 2, shuffle: bool = True) -> None:
        super().__init__()
        self.groups, self.shuffle = groups, shuffle
        self.one, self.norm = nn.Conv2d(width, width, 1, groups=groups), nn.GroupNorm(groups, width)
        self.two = nn.Conv2d(width, width, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        if self.shuffle:
            b, c, h, w = x.shape
            x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        return torch.relu(self.two(x))


class UNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 10, 3, 2, 1), nn.ConvTranspose2d(10, 6, 2, 2)
        self.join = nn.Conv2d(width + 6, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.join(torch.cat([x, torch.relu(self.up(torch.relu(self.down(x))))], 1)))


class Excite(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.less, self.more = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.more(F.silu(self.less(x.mean((2, 3), keepdim=True)))))


class SplitAttention(nn.Module):
    """Branches on an axis of their own, weighed against each other feature by feature (selective kernels)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.less, self.more = nn.Linear(width, 5), nn.Linear(5, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([torch.relu(self.a(x)), torch.relu(self.b(x))], 1)
        weight = self.more(torch.relu(self.less(both.sum(1).mean((2, 3))))).unflatten(1, (2, -1)).softmax(1)
        return (both * weight[..., None, None]).sum(1)


FOLDS = ("inside", "outside", "beside")
ATTENTIONS = (
    "fused", "linear", "decay", "covariance", "queries", "temperature", "gated", "talking", "normed", "rotary",
)  # fmt: skip
CUTS: dict[str, Callable[[int], nn.Module]] = {
    f"attention, {kind}": lambda n, kind=kind: Tokens(n, Attention(kind))
    for kind in ATTENTIONS
} | {
    f"heads {order} the batch": lambda n, order=order: Tokens(n, Folded(order)) for order in FOLDS
} | {
    "maxout": lambda n: Tokens(n, Maxout(False)),
    "maxout, outer pieces": lambda n: Tokens(n, Maxout(True)),
    "block-diagonal": lambda n: Tokens(n, BlockDiagonal()),
    "experts": lambda n: Tokens(n, Experts()),
    "graph attention": lambda n: Tokens(n, Edges()),
    "gated linear unit": lambda n: Tokens(n, Gated()),
    "mixer": lambda n: Tokens(n, Mixer()),
    "axial": lambda n: Image(n, Axial()),
    "windows": lambda n: Image(n, Windows()),
    "groups": lambda n: Image(n, Groups(shuffle=False)),
    "shuffle": lambda n: Image(n, Groups()),
    "u-net": lambda n: Image(n, UNet()),
    "squeeze-excite": lambda n: Image(n, Excite()),
    "split attention": lambda n: Image(n, SplitAttention()),
}  # fmt: skip


def sample(name: str, batch: int = 96) -> Tensor:
    """An input of a model of `CUTS`, in float64."""
    images = isinstance(CUTS[name](2), Image)
    shape = (batch, 3, 8, 8) if images else (batch, 6, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

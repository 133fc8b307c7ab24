"""A zoo of small networks: each entry of `ZOO` makes a model and a sample input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


def image(channels: int = 3, size: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def tokens(width: int = 8, length: int = 5, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))


def conv(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def head(width: int, classes: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class Subsample(nn.Module):
    """The shortcut without parameters: every other place, channels padded with zeros."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1, pad: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or i != o:
            self.shortcut = Subsample(o - i) if pad else nn.Sequential(nn.Conv2d(i, o, 1, stride), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


def resnet(pad: bool) -> nn.Module:
    return nn.Sequential(
        conv(3, 6), Residual(6, 6), Residual(6, 10, 2, pad), Residual(10, 10), Residual(10, 16, 2, pad), head(16)
    )


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(F.silu(self.down(gate))))


class Shuffle(nn.Module):
    """Split, transform one half, concatenate, shuffle channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(conv(half, half, 1), conv(half, half, 3, groups=half), conv(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        x = torch.cat([first, self.branch(second)], 1)
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(6 + 4 * i), nn.ReLU(inplace=True), nn.Conv2d(6 + 4 * i, 4, 3, padding=1))
            for i in range(3)
        )
        self.head = head(18)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(x)


class TwoByTwo(nn.Module):
    """Two inputs, two outputs, a module called twice, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 12), nn.Linear(3, 12)
        self.twice = nn.Linear(12, 12)
        self.wide, self.narrow = nn.Linear(12, 7), nn.Linear(7, 12)
        self.narrow.weight = nn.Parameter(self.wide.weight.t().contiguous())
        self.tied = nn.Linear(12, 7)
        self.tied.weight = self.wide.weight
        self.out = nn.Linear(7, 2)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        x = torch.tanh(self.left(a)) + torch.tanh(self.right(b))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        y = torch.tanh(self.wide(x))
        x = torch.tanh(self.narrow(y)) + x
        return {"first": self.out(torch.tanh(self.tied(x))), "second": x.sum(-1)}


class Attention(nn.Module):
    """kind: packed, separate, grouped (queries share keys), rotary."""

    def __init__(self, kind: str, width: int = 12, heads: int = 3, inner: int = 4) -> None:
        super().__init__()
        self.kind, self.heads, self.inner = kind, heads, inner
        self.norm = nn.LayerNorm(width)
        self.groups = 1 if kind == "grouped" else heads
        if kind == "packed":
            self.qkv = nn.Linear(width, 3 * heads * inner)
        else:
            self.q = nn.Linear(width, heads * inner)
            self.k, self.v = (nn.Linear(width, self.groups * inner) for _ in range(2))
        self.out = nn.Linear(heads * inner, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.inner).transpose(1, 2)

    def rotated(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.3, 1.0, 0.3])
        half = torch.cat([-x[..., 2:], x[..., :2]], -1)
        return x * angle.cos().to(x.dtype) + half * angle.sin().to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.kind == "packed":
            q, k, v = (self.split(part, self.heads) for part in self.qkv(y).chunk(3, -1))
            z = F.scaled_dot_product_attention(q, k, v)
        else:
            q, k, v = (
                self.split(self.q(y), self.heads),
                self.split(self.k(y), self.groups),
                self.split(self.v(y), self.groups),
            )
            if self.kind == "rotary":
                q, k = self.rotated(q), self.rotated(k)
            if self.kind == "grouped":
                k, v = k.repeat_interleave(self.heads, 1), v.repeat_interleave(self.heads, 1)
            z = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(self.inner), -1) @ v
        x = x + self.out(z.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class TwoGroups(Attention):
    """Four query heads on two key heads."""

    def __init__(self) -> None:
        super().__init__("grouped", heads=4)
        self.k, self.v, self.groups = nn.Linear(12, 8), nn.Linear(12, 8), 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.split(self.q(y), 4), self.split(self.k(y), 2), self.split(self.v(y), 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        z = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return x + self.out(z.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, block: nn.Module, width: int = 12) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Parameter(torch.randn(1, 5, width))
        self.block, self.norm, self.head = block, nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(x) + self.position)).mean(1))


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(12, 3, batch_first=True), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y)[0]


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.middle = conv(3, 6), conv(6, 8, stride=2), conv(8, 12, stride=2)
        self.up1, self.up2 = nn.ConvTranspose2d(12, 8, 2, 2), nn.ConvTranspose2d(8, 6, 2, 2)
        self.join1, self.join2, self.out = conv(16, 8), conv(12, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a)
        x = self.join1(torch.cat([self.up1(self.middle(b)), b], 1))
        return self.out(self.join2(torch.cat([self.up2(x), a], 1)))


class Mixer(nn.Module):
    """Two labelled axes at once: hidden tokens and hidden channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 10)
        self.tokens = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
        self.channels = nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 9), nn.GELU(), nn.Linear(9, 10))
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(x)).mean(1))


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Parameter(torch.randn(8, 3, 4)), nn.Parameter(torch.randn(8, 3, 4))
        self.v, self.o = nn.Parameter(torch.randn(8, 3, 4)), nn.Parameter(torch.randn(3, 4, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bhtd", x, w) for w in (self.q, self.k, self.v))
        z = torch.einsum("bhts,bhsd->bthd", torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1), v)
        return self.head(torch.einsum("bthd,hdo->bto", z, self.o))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(8, 6), nn.LSTM(6, 7, batch_first=True), nn.Linear(7, 3)
        self.hidden = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(torch.tanh(self.embed(x + self.hidden(x))))[0][:, -1])


@torch.library.custom_op("fxzip_tests::swirl", mutates_args=())
def swirl(x: Tensor) -> Tensor:
    """A call that no table knows: each feature is added to the next."""
    return x + x.roll(1, -1)


@swirl.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 9), nn.Linear(9, 6), nn.Linear(6, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.fxzip_tests.swirl(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.third(x)))


class Graph(nn.Module):
    """Messages along fixed edges, summed with index_add."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.message, self.update = nn.Linear(8, 10), nn.Linear(10, 6), nn.Linear(6, 10)
        self.head = nn.Linear(10, 3)
        self.register_buffer("source", torch.tensor([0, 1, 2, 3, 4, 0]))
        self.register_buffer("target", torch.tensor([1, 2, 3, 4, 0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        message = torch.relu(self.message(x[:, self.source]))
        total = torch.zeros(x.shape[0], x.shape[1], 6, dtype=x.dtype).index_add(1, self.target, message)
        return self.head((x + self.update(total)).sum(1))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 20), nn.Linear(20, 8)
        self.scale = nn.Parameter(torch.full((8,), 1e-6))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class Slices(nn.Module):
    """Writes into slices of a tensor made of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 4), nn.Linear(8, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], x.shape[1], 12, dtype=x.dtype)
        out[..., :4] = self.first(x)
        out[..., 5:11] = self.second(x)
        return self.head(torch.tanh(out)).sum(1)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed, self.gate, self.value = nn.Linear(8, 20), nn.Linear(8, 9), nn.Linear(8, 9)
        self.out, self.head = nn.Linear(10, 8), nn.Linear(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.glu(self.packed(x))) + self.head(F.silu(self.gate(x)) * self.value(x))


class View(nn.Module):
    """A flatten between convolution and linear call, by a size that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 5, 3, 2, 1), nn.Linear(80, 11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.head(torch.relu(self.fc(x.view(x.size(0), -1))))


def _norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.InstanceNorm2d(10, affine=True),
        nn.ReLU(), nn.Conv2d(10, 6, 1), nn.GroupNorm(1, 6), nn.PReLU(6), head(6),
    )  # fmt: skip


Entry = Callable[[], tuple[nn.Module, Any]]

ZOO: dict[str, Entry] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 3)),
                    torch.randn(4, 6)),
    "resnet": lambda: (resnet(False), image()),
    "resnet_padded": lambda: (resnet(True), image()),
    "grouped": lambda: (nn.Sequential(conv(3, 8), conv(8, 12, groups=4), conv(12, 8, 1), head(8)), image()),
    "depthwise": lambda: (nn.Sequential(conv(3, 8), conv(8, 8, groups=8), conv(8, 6, 1), head(6)), image()),
    "multiplied": lambda: (nn.Sequential(conv(3, 4), conv(4, 8, groups=4), conv(8, 6, 1), head(6)), image()),
    "squeeze_excite": lambda: (nn.Sequential(conv(3, 8), SqueezeExcite(8, 5), conv(8, 6), head(6)), image()),
    "gated": lambda: (Gated(), tokens()),
    "shuffle": lambda: (nn.Sequential(conv(3, 8), Shuffle(8), Shuffle(8), conv(8, 6), head(6)), image()),
    "dense": lambda: (Dense(), image()),
    "two_by_two": lambda: (TwoByTwo(), (torch.randn(4, 5), torch.randn(4, 3))),
    "attention_packed": lambda: (Transformer(Attention("packed")), tokens()),
    "attention_separate": lambda: (Transformer(Attention("separate")), tokens()),
    "attention_shared_key": lambda: (Transformer(Attention("grouped")), tokens()),
    "attention_grouped": lambda: (Transformer(TwoGroups()), tokens()),
    "attention_rotary": lambda: (Transformer(Attention("rotary")), tokens()),
    "attention_torch": lambda: (Transformer(TorchAttention()), tokens()),
    "norms": lambda: (_norms(), image()),
    "unet": lambda: (UNet(), image()),
    "generator": lambda: (nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.ConvTranspose2d(6, 8, 4), nn.BatchNorm2d(8),
                                        nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh()), torch.randn(2, 6)),
    "transposed_groups": lambda: (nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.ReLU(),
                                                nn.Conv2d(12, 2, 1)), image()),
    "mixer": lambda: (Mixer(), tokens()),
    "pixel_shuffle": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1),
                                            nn.PixelShuffle(2), nn.Conv2d(3, 3, 1)), image()),
    "einsum": lambda: (Einsum(), tokens()),
    "lstm": lambda: (Recurrent(), tokens()),
    "custom": lambda: (Custom(), torch.randn(4, 8)),
    "graph": lambda: (Graph(), tokens()),
    "weight_norm": lambda: (nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 9)), nn.ReLU(),
                                          parametrizations.spectral_norm(nn.Linear(9, 7)), nn.ReLU(), nn.Linear(7, 2)),
                            torch.randn(4, 6)),
    "layer_scale": lambda: (LayerScale(), image()),
    "slices": lambda: (Slices(), tokens()),
    "view": lambda: (View(), image()),
    "wavenet": lambda: (nn.Sequential(nn.Conv1d(2, 6, 2), nn.Tanh(), nn.Conv1d(6, 7, 2, dilation=2), nn.GLU(2),
                                      nn.Conv1d(7, 3, 1)), torch.randn(2, 2, 17)),
}  # fmt: skip

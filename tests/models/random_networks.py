"""Random networks: a walk over blocks that add, concatenate, split, gate, group, share, reshape and attend."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """One random block on features [batch, width, length]; `self.out` is the width it gives."""

    def __init__(self, rng: random.Random, width: int) -> None:
        super().__init__()
        kinds = [
            "residual",
            "dense",
            "split",
            "gated",
            "grouped",
            "depthwise",
            "shared",
            "mixed",
            "attention",
            "normed",
        ]
        kinds += ["shuffle", "scaled", "chunks", "padded", "written"]
        self.kind = rng.choice(kinds)
        self.width, self.out = width, width
        self.act = rng.choice([torch.relu, torch.tanh, F.silu, F.gelu])
        self.heads = rng.choice([h for h in (1, 2, 3, 4) if width % h == 0])
        getattr(self, "build_" + self.kind)(rng, width)

    def build_residual(self, rng: random.Random, n: int) -> None:
        inner = rng.randint(2, 7)
        self.a, self.b = nn.Conv1d(n, inner, rng.choice([1, 3]), padding="same"), nn.Conv1d(inner, n, 1)

    def do_residual(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(x)))

    def build_dense(self, rng: random.Random, n: int) -> None:
        inner = rng.randint(1, 5)
        self.a, self.out = nn.Conv1d(n, inner, 3, padding=1), n + inner

    def do_dense(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.act(self.a(x))], 1)

    def build_split(self, rng: random.Random, n: int) -> None:
        self.at = rng.randint(1, n - 1)
        self.a, self.b = nn.Conv1d(self.at, self.at, 1), nn.Conv1d(n - self.at, self.at, 1)

    def do_split(self, x: Tensor) -> Tensor:
        first, second = x.split([self.at, self.width - self.at], 1)
        return torch.cat([self.act(self.a(first)) + self.act(self.b(second)), second], 1)

    def build_gated(self, rng: random.Random, n: int) -> None:
        self.out = rng.randint(2, 8)
        self.a, self.packed = nn.Conv1d(n, 2 * self.out, 1), rng.random() < 0.5
        self.b = nn.Conv1d(n, self.out, 1)

    def do_gated(self, x: Tensor) -> Tensor:
        return F.glu(self.a(x), 1) if self.packed else self.a(x).chunk(2, 1)[0].sigmoid() * self.b(x.mean(2, True))

    def build_grouped(self, rng: random.Random, n: int) -> None:
        each = rng.randint(1, 3)
        self.a = nn.Conv1d(n, self.heads * each, 3, padding=1, groups=self.heads)
        self.out = self.heads * each

    def do_grouped(self, x: Tensor) -> Tensor:
        return self.act(self.a(x))

    def build_depthwise(self, rng: random.Random, n: int) -> None:
        self.a = nn.Conv1d(n, n, 3, padding=1, groups=n)

    def do_depthwise(self, x: Tensor) -> Tensor:
        return self.act(self.a(x))

    def build_shared(self, rng: random.Random, n: int) -> None:
        self.a, self.out = nn.Conv1d(n, n, 1), n
        self.b = nn.Conv1d(n, n, 1)

    def do_shared(self, x: Tensor) -> Tensor:
        return self.a(self.act(self.a(self.act(self.b(x)))))

    def build_mixed(self, rng: random.Random, n: int) -> None:
        inner = rng.randint(2, 6)
        self.a, self.b = nn.Linear(6, inner), nn.Linear(inner, 6)

    def do_mixed(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(x)))

    def build_attention(self, rng: random.Random, n: int) -> None:
        self.inner = rng.randint(1, 4)
        self.qkv, self.o = nn.Linear(n, 3 * self.heads * self.inner), nn.Linear(self.heads * self.inner, n)
        self.norm = nn.LayerNorm(n)
        self.order = rng.choice(["packed", "interleaved"])
        self.scaled, self.temperature = rng.random() < 0.5, nn.Parameter(torch.ones(self.heads, 1, 1))

    def do_attention(self, x: Tensor) -> Tensor:
        y = self.qkv(self.norm(x.transpose(1, 2)))
        shape = (3, self.heads, self.inner) if self.order == "packed" else (self.heads, 3, self.inner)
        y = y.view(*y.shape[:2], *shape)
        q, k, v = y.permute(2, 0, 3, 1, 4) if self.order == "packed" else y.permute(3, 0, 2, 1, 4)
        scores = q @ k.transpose(-1, -2)
        if self.scaled:
            scores = scores * self.temperature
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x + self.o(y).transpose(1, 2)

    def build_normed(self, rng: random.Random, n: int) -> None:
        self.out = n
        self.a = rng.choice(
            [nn.BatchNorm1d(n), nn.GroupNorm(self.heads, n), nn.GroupNorm(1, n), nn.InstanceNorm1d(n, affine=True)]
        )

    def do_normed(self, x: Tensor) -> Tensor:
        return self.act(self.a(x))

    def build_shuffle(self, rng: random.Random, n: int) -> None:
        pass

    def do_shuffle(self, x: Tensor) -> Tensor:
        b, n, length = x.shape
        return x.view(b, self.heads, n // self.heads, length).transpose(1, 2).reshape(b, n, length)

    def build_scaled(self, rng: random.Random, n: int) -> None:
        self.a, self.scale = nn.Conv1d(n, n, 1), nn.Parameter(torch.ones(n, 1))

    def do_scaled(self, x: Tensor) -> Tensor:
        return x + self.scale * self.a(x)

    def build_chunks(self, rng: random.Random, n: int) -> None:
        self.out = n // self.heads
        self.a = nn.Conv1d(self.out, self.out, 1)

    def do_chunks(self, x: Tensor) -> Tensor:
        total = 0
        for part in x.chunk(self.heads, 1):
            total = total + self.act(self.a(part))
        return total

    def build_padded(self, rng: random.Random, n: int) -> None:
        self.extra = rng.randint(1, 3)
        self.a, self.out = nn.Conv1d(n, n + self.extra, 1), n + self.extra

    def do_padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, self.extra)) + self.a(x)

    def build_written(self, rng: random.Random, n: int) -> None:
        self.at = rng.randint(1, n)
        self.a = nn.Conv1d(n, self.at, 1)

    def do_written(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, : self.at] = self.act(self.a(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "do_" + self.kind)(x)


class Network(nn.Module):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        width = rng.choice([4, 6, 8])
        self.stem, self.blocks = nn.Conv1d(2, width, 1), nn.ModuleList()
        self.reads: list[tuple[int, ...]] = []
        widths = [width]
        for _ in range(rng.randint(1, 6)):
            source = len(widths) - 1 if rng.random() < 0.8 else rng.randrange(len(widths))
            if widths[source] < 2:
                source = 0
            block = Block(rng, widths[source])
            mates = [i for i, w in enumerate(widths) if w == block.out and i != source]
            added = rng.choice(mates) if mates and rng.random() < 0.3 else -1
            self.blocks.append(block)
            self.reads.append((source, added))
            widths.append(block.out)
        self.flat = rng.random() < 0.5
        self.head = nn.Linear(widths[-1] * (6 if self.flat else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [torch.relu(self.stem(x))]
        for block, (source, added) in zip(self.blocks, self.reads, strict=True):
            y = block(values[source])
            values.append(y + values[added] if added >= 0 else y)
        x = values[-1]
        return self.head(x.flatten(1) if self.flat else x.mean(2))


def random_network(seed: int) -> tuple[nn.Module, Tensor]:
    """A network and a sample input, the same for the same seed."""
    return Network(random.Random(seed)), torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(seed))

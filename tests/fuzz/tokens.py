"""Attention, message passing, recurrent layers and mixtures over tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .building import Block, Draw, Stream
from .spaces import Axis


class Attention(Block, takes=("tokens",)):
    """Attention with several heads, written by hand in several forms, with one packed layer or three."""

    def build(self, draw: Draw, x: Stream) -> None:
        h, d, e = draw.rng.randint(1, 3), draw.rng.randint(2, 4), draw.rng.randint(2, 4)
        self.how = draw.choice(["softmax", "fused", "linear", "einsum", "one key"])
        self.heads, self.packed = h, draw.coin() and self.how != "one key"
        if self.how == "one key":
            k, v = Axis.new(d), Axis.new(e)
            q, o = (axis.moved(torch.arange(axis.size).repeat(h)) for axis in (k, v))
        else:
            q = Axis.new(h * d)
            order = q.in_blocks(h)
            k, o = q, Axis.new(h * e, order=order)
            v = o
        self.sizes = [q.size, k.size, v.size]
        if self.packed:
            self.qkv = draw.linear(x.axis, Axis.join(q, k, v))
        else:
            self.q, self.k, self.v = (draw.linear(x.axis, axis) for axis in (q, k, v))
        y = Axis.new(draw.width())
        self.o, self.out = draw.linear(o, y), x.with_axis(y)
        self.bias = draw.parameter(x.length, x.length) if draw.coin(0.3) else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(self.sizes, -1) if self.packed else (self.q(x), self.k(x), self.v(x))
        if self.how == "einsum":
            q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
            weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
            return self.o(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
        parts = [1 if self.how == "one key" and i else self.heads for i in range(3)]
        q, k, v = (t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in zip((q, k, v), parts, strict=True))
        return self.o(self.mixed(q, k, v).transpose(1, 2).flatten(2))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.how == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        if self.how == "linear":
            q, k = q.softmax(-1), k.softmax(-2)
            return q @ (k.transpose(-2, -1) @ v)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if self.bias is not None:
            scores = scores + self.bias
        return scores.softmax(-1) @ v


class Module(Block, takes=("tokens",)):
    """nn.MultiheadAttention, on tokens alone or on learned queries."""

    def build(self, draw: Draw, x: Stream) -> None:
        h, d = draw.rng.randint(1, 3), draw.rng.randint(2, 3)
        e, q = Axis.new(h * d), Axis.new(h * d)
        v = Axis.new(h * d, order=q.in_blocks(h))
        self.a = draw.linear(x.axis, e)
        self.module = nn.MultiheadAttention(h * d, h, batch_first=True)
        with torch.no_grad():
            self.module.in_proj_bias.normal_(0, 0.3)
            self.module.out_proj.bias.normal_(0, 0.3)
        draw.account.own(self.module.in_proj_weight, Axis.join(q, q, v), e)
        draw.account.own(self.module.in_proj_bias, Axis.join(q, q, v))
        y = Axis.new(h * d)
        draw.account.own(self.module.out_proj.weight, y, v)
        draw.account.own(self.module.out_proj.bias, y)
        n = draw.rng.randint(2, 3)
        self.queries = draw.parameter(1, n, e, scale=1.0) if draw.coin(0.4) else None
        self.out = Stream("tokens", y, n if self.queries is not None else x.length)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        q = x if self.queries is None else self.queries.expand(x.shape[0], -1, -1)
        return self.module(q, x, x, need_weights=False)[0]


class Mixer(Block, takes=("tokens",)):
    """A small network over tokens, for each feature alike, added to what it reads."""

    def build(self, draw: Draw, x: Stream) -> None:
        hidden = Axis.new(draw.width())
        self.a = draw.linear(Axis.fixed(x.length), hidden)
        self.b = draw.linear(hidden, Axis.fixed(x.length))
        self.act, self.added = draw.activation(hidden), draw.coin(0.7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.act(self.a(x.transpose(1, 2)))).transpose(1, 2)
        return x + y if self.added else y


class Tokens(Block, takes=("tokens",)):
    """Positions are added, or tokens put in front: one of their own, or prompts that layers compute of parameters."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.how, self.n = draw.choice(["positions", "token", "prompts", "table"]), draw.rng.randint(1, 3)
        n = x.length
        if self.how == "positions":
            self.p = draw.parameter(1, n, x.axis)
        elif self.how == "token":
            self.p, n = draw.parameter(1, 1, x.axis), n + 1
        elif self.how == "table":
            self.p = nn.Embedding(n, x.axis.size)
            draw.account.own(self.p.weight, n, x.axis)
        else:
            hidden, inner = Axis.new(draw.width()), Axis.new(draw.width())
            self.p, n = draw.parameter(self.n, inner), n + self.n
            self.a, self.b, self.act = draw.linear(inner, hidden), draw.linear(hidden, x.axis), draw.activation(hidden)
        self.out = Stream("tokens", x.axis, n)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "positions":
            return x + self.p
        if self.how == "table":
            return x + self.p(torch.arange(x.shape[1]))
        p = self.p if self.how == "token" else self.b(self.act(self.a(self.p)))[None]
        return torch.cat([p.expand(x.shape[0], -1, -1), x], 1)


class Messages(Block, takes=("tokens",)):
    """Message passing over fixed edges: a sum over neighbours by index_add, scatter_add or a matrix."""

    def build(self, draw: Draw, x: Stream) -> None:
        edges = torch.tensor([[draw.rng.randrange(x.length) for _ in range(2 * x.length)] for _ in range(2)])
        draw.buffer(self, "edges", edges)
        y = Axis.new(draw.width())
        self.how, self.act = draw.choice(["index_add", "scatter", "matrix", "mean"]), draw.activation(y)
        self.own, self.neighbour = draw.linear(x.axis, y), draw.linear(x.axis, y, bias=False)
        self.out = x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        sent = self.neighbour(x)
        source, target = self.edges
        if self.how == "index_add":
            total = torch.zeros_like(sent).index_add(1, target, sent[:, source])
        elif self.how == "scatter":
            at = target[None, :, None].expand(sent.shape[0], -1, sent.shape[2])
            total = sent.new_zeros(sent.shape).scatter_add(1, at, sent[:, source])
        else:
            matrix = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype).index_put(
                (target, source), torch.ones_like(source, dtype=x.dtype), accumulate=True
            )
            total = matrix @ sent
            if self.how == "mean":
                total = total / matrix.sum(1, keepdim=True).clamp(min=1)
        return self.act(self.own(x) + total)


class Recurrent(Block, takes=("tokens",)):
    """A recurrent layer or cell."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.how, n = draw.choice(["RNN", "GRU", "LSTM", "cell", "hand", "unbound"]), draw.rng.randint(3, 6)
        y = Axis.new(n)
        self.out = x.with_axis(y)
        if self.how in ("hand", "unbound"):
            self.a, self.b = draw.linear(x.axis, y), draw.linear(y, y, bias=False)
            return
        gates = {"GRU": 3, "LSTM": 4, "cell": 3}.get(self.how, 1)
        module = (
            nn.GRUCell(x.axis.size, n)
            if self.how == "cell"
            else getattr(nn, self.how)(x.axis.size, n, batch_first=True)
        )
        for name, value in module.named_parameters():
            rows = Axis.join(*[y] * gates)
            draw.account.own(value, rows, *([] if value.ndim == 1 else [x.axis if "ih" in name else y]))
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        if self.how not in ("hand", "unbound", "cell"):
            return self.module(x)[0]
        states = []
        state = torch.zeros(x.shape[0], self.out.axis.size, dtype=x.dtype)
        for token in x.unbind(1) if self.how == "unbound" else [x[:, t] for t in range(self.out.length)]:
            state = self.module(token, state) if self.how == "cell" else torch.tanh(self.a(token) + self.b(state))
            states.append(state)
        return torch.stack(states, 1)


class Along(Block, takes=("tokens",)):
    """A convolution along the tokens, or a causal one by hand."""

    def build(self, draw: Draw, x: Stream) -> None:
        y = Axis.new(draw.width())
        self.mode = draw.choice(["zeros", "circular", "replicate", "causal"])
        settings = {} if self.mode == "causal" else {"padding": 1, "padding_mode": self.mode}
        self.conv, self.act = draw.conv(x.axis, y, 3, dims=1, **settings), draw.activation(y)
        self.out = x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = F.pad(x, (2, 0)) if self.mode == "causal" else x
        return self.act(self.conv(x)).transpose(1, 2)


class Pooled(Block, takes=("tokens",)):
    """From tokens to a vector."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.how = draw.choice(["mean", "first", "max", "weights", "last", "flat"])
        self.out = Stream("vector", x.axis)
        if self.how == "weights":
            self.a = draw.linear(x.axis, Axis.fixed(1))
        if self.how == "flat":
            y = Axis.new(draw.width())
            axis = x.axis.moved(torch.arange(x.axis.size).repeat(x.length))
            self.a, self.out = draw.linear(axis, y), Stream("vector", y)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "weights":
            return (self.a(x).softmax(1) * x).sum(1)
        if self.how == "flat":
            return self.a(x.flatten(1))
        return {"mean": x.mean(1), "first": x[:, 0], "max": x.amax(1), "last": x[:, -1]}[self.how]

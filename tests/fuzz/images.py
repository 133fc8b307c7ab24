"""Convolutions and what stands around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .building import Block, Draw, Stream
from .spaces import Axis


def _norm(draw: Draw, axis: Axis) -> nn.Module:
    kind = draw.choice(["none", "batch", "batch", "group", "instance"])
    if kind == "batch":
        return draw.affine(nn.BatchNorm2d(axis.size), axis)
    if kind == "group":
        return draw.affine(nn.GroupNorm(1, axis.size), axis)
    if kind == "instance":
        return draw.affine(nn.InstanceNorm2d(axis.size, affine=True), axis)
    return nn.Identity()


class Conv(Block, takes=("image",)):
    """A convolution with any padding, a normalisation and an activation."""

    def build(self, draw: Draw, x: Stream) -> None:
        y, mode = Axis.new(draw.width()), draw.choice(["zeros", "zeros", "circular", "reflect", "replicate"])
        self.by_hand = draw.coin(0.3)
        size = draw.choice([1, 3])
        padding = size // 2
        self.mode = {"zeros": "constant"}.get(mode, mode)
        settings = {} if self.by_hand else {"padding": padding, "padding_mode": mode}
        self.pad = [padding] * 4
        self.conv = draw.conv(x.axis, y, size, bias=draw.coin(0.7), **settings)
        self.norm, self.act = _norm(draw, y), draw.activation(y)
        self.out = x.with_axis(y)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_hand and self.pad[0]:
            x = F.pad(x, self.pad, mode=self.mode)
        return self.act(self.norm(self.conv(x)))


class Depthwise(Block, takes=("image",)):
    """A filter for each channel."""

    def build(self, draw: Draw, x: Stream) -> None:
        mode = draw.choice(["zeros", "circular", "reflect"])
        n = x.axis.size
        self.conv = nn.Conv2d(n, n, 3, padding=1, padding_mode=mode, groups=n)
        draw.account.own(self.conv.weight, x.axis, 1, 3, 3)
        draw.account.own(self.conv.bias, x.axis)
        self.norm, self.act = _norm(draw, x.axis), draw.activation(x.axis)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Groups(Block, takes=("image",)):
    """Two grouped convolutions, with or without a shuffle of channels between them, or a normalisation of groups."""

    def build(self, draw: Draw, x: Stream) -> None:
        g, c, d = draw.rng.randint(2, 3), draw.rng.randint(2, 4), draw.rng.randint(2, 4)
        a = Axis.new(g * c)
        b = Axis.new(g * d, order=a.in_blocks(g))
        self.how, self.g = draw.choice(["grouped", "shuffled", "normed", "unfolded"]), g
        self.a, self.act = draw.conv(x.axis, a), draw.activation(a)
        self.b = draw.conv(a, b, 3, groups=g, padding=1)
        self.norm = draw.affine(nn.GroupNorm(g, g * d), b) if self.how == "normed" else nn.Identity()
        if self.how == "shuffled":
            b = b.moved(torch.arange(g * d).view(g, d).t().flatten())
        if self.how == "unfolded":
            b = b.moved(torch.arange(g * d).view(g, d).flip(1).flatten())
        self.out = x.with_axis(b)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.b(self.act(self.a(x))))
        if self.how == "shuffled":
            x = x.unflatten(1, (self.g, -1)).transpose(1, 2).flatten(1, 2)
        if self.how == "unfolded":
            x = x.unflatten(1, (self.g, -1)).flip(2).flatten(1, 2)
        return x


class Squeeze(Block, takes=("image",)):
    """A gate for each channel from the means of all."""

    def build(self, draw: Draw, x: Stream) -> None:
        y = Axis.new(draw.rng.randint(2, 4))
        self.conv = draw.coin()
        layer = (lambda i, o: draw.conv(i, o)) if self.conv else draw.linear
        self.a, self.b, self.act = layer(x.axis, y), layer(y, x.axis), draw.activation(y)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=self.conv)
        gate = torch.sigmoid(self.b(self.act(self.a(mean))))
        return x * (gate if self.conv else gate[:, :, None, None])


class Tied(Block, takes=("image",)):
    """A kernel and its transpose: a tied autoencoder."""

    def build(self, draw: Draw, x: Stream) -> None:
        y, size = Axis.new(draw.width()), draw.choice([1, 3])
        self.a = draw.conv(x.axis, y, size, padding=size // 2, bias=False)
        self.act, self.back = draw.activation(y), draw.coin(0.7)
        self.out = x if self.back else x.with_axis(y)
        self.padding = size // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.a(x))
        return F.conv_transpose2d(y, self.a.weight, padding=self.padding) if self.back else y


class UpDown(Block, takes=("image",)):
    """A change of resolution and back, with a skip connection: a small U-Net."""

    def build(self, draw: Draw, x: Stream) -> None:
        y, z = Axis.new(draw.width()), Axis.new(draw.width())
        self.down = draw.conv(x.axis, y, 2, stride=2)
        self.kind, self.act = draw.choice(["transposed", "nearest", "bilinear", "shuffle"]), draw.activation(y)
        if self.kind == "transposed":
            self.up = draw.conv_transpose(y, z, 2, stride=2)
        elif self.kind == "shuffle":
            self.up = draw.conv(y, z.moved(torch.arange(z.size).repeat_interleave(4)))
        else:
            self.up = draw.conv(y, z)
        self.cat = draw.coin()
        self.last = nn.Identity() if self.cat else draw.conv(z, x.axis)
        self.out = x.with_axis(Axis.join(x.axis, z)) if self.cat else x

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.act(self.down(x)))
        if self.kind in ("nearest", "bilinear"):
            y = F.interpolate(y, size=x.shape[-2:], mode=self.kind)
        if self.kind == "shuffle":
            y = F.pixel_shuffle(y, 2)
        return torch.cat([x, y], 1) if self.cat else x + self.last(y)


class Pool(Block, takes=("image",)):
    """Pooling, or a normalisation of the last axis between two permutations."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.how = draw.choice(["max", "average", "layer", "local"])
        if self.how == "layer":
            self.norm = draw.affine(nn.LayerNorm(x.axis.size), x.axis)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "layer":
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.how == "max":
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1) if self.how == "average" else x / (1 + x.square().mean(1, keepdim=True)).sqrt()


class Shift(Block, takes=("image",)):
    """Parts of the channels are moved along a spatial axis (temporal shift)."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.n = max(x.axis.size // 4, 1)
        self.how = draw.choice(["rolled", "written", "where"])
        x.axis.cut(self.n, self.n, x.axis.size - 2 * self.n)

    def forward(self, x: Tensor) -> Tensor:
        n = self.n
        if self.how == "rolled":
            return torch.cat([x[:, :n].roll(1, 2), x[:, n : 2 * n].roll(-1, 2), x[:, 2 * n :]], 1)
        y = torch.zeros_like(x) if self.how == "written" else x.new_zeros(x.shape)
        y[:, :n, :-1] = x[:, :n, 1:]
        y[:, n : 2 * n, 1:] = x[:, n : 2 * n, :-1]
        y[:, 2 * n :] = x[:, 2 * n :]
        return y


class Flat(Block, takes=("image",)):
    """From an image to a vector: all places side by side, or means over places."""

    def build(self, draw: Draw, x: Stream) -> None:
        self.flat, places = x.axis.size * x.length**2 <= 100 and draw.coin(), x.length**2
        if self.flat:
            axis = x.axis.moved(torch.arange(x.axis.size).repeat_interleave(places))
            y = Axis.new(draw.width())
            self.linear = draw.linear(axis, y)
            self.out = Stream("vector", y)
        else:
            self.how = draw.choice(["mean", "max", "pool"])
            self.out = Stream("vector", x.axis)

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            return self.linear(x.flatten(1))
        if self.how == "mean":
            return x.mean((2, 3))
        return x.amax((2, 3)) if self.how == "max" else F.adaptive_avg_pool2d(x, 1).flatten(1)


class Patches(Block, takes=("image",)):
    """From an image to tokens."""

    def build(self, draw: Draw, x: Stream) -> None:
        y = Axis.new(draw.width())
        self.conv = draw.conv(x.axis, y, 2, stride=2)
        self.how = draw.choice(["flatten", "permute", "view"])
        self.out = Stream("tokens", y, (x.length // 2) ** 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "flatten":
            return y.flatten(2).transpose(1, 2)
        if self.how == "permute":
            return y.permute(0, 2, 3, 1).flatten(1, 2)
        return y.view(y.shape[0], y.shape[1], -1).mT.contiguous()

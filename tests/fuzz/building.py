"""What blocks are built from: a stream of features, and modules whose parameters are entered into the account."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .account import Account
from .spaces import Along, Axis, Grouped

LAST = ("vector", "tokens")
IDIOMS: dict[str, type[Block]] = {}


@dataclass(frozen=True, eq=False)
class Stream:
    """What lies between two blocks: a vector [B, C], tokens [B, T, C] or an image [B, C, S, S].

    `length` is T or S; 1 for a vector.
    """

    kind: str
    axis: Axis
    length: int = 1

    def with_axis(self, axis: Axis) -> Stream:
        return replace(self, axis=axis)


class Draw:
    """Random choices of one step, and modules that enter what they hold into the account."""

    def __init__(self, seed: int, account: Account, inner: tuple[Any, ...] = ()) -> None:
        self.rng, self.account, self.inner = random.Random(seed), account, inner
        self.choice, self.coin = self.rng.choice, lambda p=0.5: self.rng.random() < p

    def width(self, low: int = 4, high: int = 12) -> int:
        return self.rng.randint(low, high)

    def parameter(
        self, *axes: Along, scale: float = 0.5, shift: float = 0.0, shape: tuple[int, ...] = ()
    ) -> nn.Parameter:
        sizes = shape or [a if isinstance(a, int) else a.size for a in axes]
        value = nn.Parameter(torch.randn(sizes) * scale + shift)
        self.account.own(value, *axes)
        return value

    def kernel(self, *axes: Along, inputs: int, shape: tuple[int, ...] = ()) -> nn.Parameter:
        """A parameter that is summed over with `inputs` values."""
        return self.parameter(*axes, scale=inputs**-0.5, shape=shape)

    def buffer(self, owner: nn.Module, name: str, value: Tensor, *axes: Along) -> None:
        owner.register_buffer(name, value)
        self.account.own(value, *(axes or value.shape))

    def linear(self, inputs: Axis, outputs: Axis, *, bias: bool = True) -> nn.Linear:
        layer = nn.Linear(inputs.size, outputs.size, bias=bias)
        with torch.no_grad():
            layer.weight.normal_(0, inputs.size**-0.5)
        self.account.own(layer.weight, outputs, inputs)
        if bias:
            self.account.own(layer.bias, outputs)
        return layer

    def conv(
        self, inputs: Axis, outputs: Axis, size: int = 1, *, groups: int = 1, dims: int = 2, **settings: Any
    ) -> Any:
        """A convolution. Whoever asks for groups has tied the orders of both axes' blocks."""
        kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
        layer = kind(inputs.size, outputs.size, size, groups=groups, **settings)
        with torch.no_grad():
            layer.weight.normal_(0, (inputs.size // groups * size**dims) ** -0.5)
        self._entered(layer, outputs, inputs, size, groups, dims)
        return layer

    def conv_transpose(self, inputs: Axis, outputs: Axis, size: int, *, groups: int = 1, **settings: Any) -> Any:
        layer = nn.ConvTranspose2d(inputs.size, outputs.size, size, groups=groups, **settings)
        self._entered(layer, inputs, outputs, size, groups, 2)
        if layer.bias is not None:
            self.account.own(layer.bias, outputs)
        return layer

    def _entered(self, layer: Any, first: Axis, second: Axis, size: int, groups: int, dims: int) -> None:
        along: Along = second if groups == 1 else Grouped(second, groups)
        self.account.own(layer.weight, first, along, *[size] * dims)
        if layer.bias is not None and not isinstance(layer, nn.ConvTranspose2d):
            self.account.own(layer.bias, first)

    def affine(self, norm: Any, axis: Along) -> Any:
        """A normalisation with random scale, shift and statistics."""
        with torch.no_grad():
            for name, value in [*norm.named_parameters(), *norm.named_buffers()]:
                if not value.ndim:
                    continue
                if name in ("weight", "running_var"):
                    value.uniform_(0.5, 1.5)
                else:
                    value.normal_(0, 0.3)
                self.account.own(value, axis)
        return norm

    def activation(self, axis: Axis | None = None) -> Callable[[Tensor], Tensor]:
        """A function that acts value by value; a module where it has a parameter."""
        names = ["relu", "tanh", "gelu", "silu", "sigmoid", "elu", "softplus", "cut", "masked", "where", "clamped"]
        name = self.choice([*names, "relu", "slope"])
        if name == "slope":
            slope = nn.PReLU(1, init=self.rng.uniform(0.05, 0.4))
            self.account.own(slope.weight, 1)
            return slope
        return ACTIVATIONS[name]

    def block(self, spec: Any, stream: Stream) -> Block:
        """Build an inner step."""
        name, seed, inner = spec
        return IDIOMS[name](Draw(seed, self.account, inner), stream)


def _cut(x: Tensor) -> Tensor:
    x = x * 1.0
    x[x < 0.1] = 0
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "softplus": F.softplus,
    "cut": _cut,
    "masked": lambda x: x * (x > -0.2).to(x.dtype),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "clamped": lambda x: torch.maximum(x, torch.full_like(x, -0.3)),
}


class Block(nn.Module):
    """One idiom on a stream. A subclass builds itself in `build` and says in `out` what it gives."""

    takes: tuple[str, ...] = ()
    wraps = False  # whether it has inner steps
    out: Stream

    def __init__(self, draw: Draw, stream: Stream) -> None:
        super().__init__()
        self.out = stream
        self.build(draw, stream)

    def build(self, draw: Draw, x: Stream) -> None:
        raise NotImplementedError

    def __init_subclass__(cls, takes: tuple[str, ...] = (), wraps: bool = False) -> None:
        cls.takes, cls.wraps = takes, wraps
        if takes:
            IDIOMS[cls.__name__] = cls


def features(stream: Stream) -> int:
    """The axis on which features lie."""
    return 1 if stream.kind == "image" else -1


def pointwise(draw: Draw, stream: Stream, axis: Axis, *, bias: bool = True) -> nn.Module:
    """A linear map of the features, at each place alike."""
    return (
        draw.conv(stream.axis, axis, bias=bias) if stream.kind == "image" else draw.linear(stream.axis, axis, bias=bias)
    )


class Chain(nn.Module):
    """The inner steps of a block, one after another; those that would change kind or length are left out."""

    def __init__(self, draw: Draw, stream: Stream) -> None:
        super().__init__()
        self.blocks, self.out = nn.ModuleList(), stream
        for spec in draw.inner:
            if self.out.kind in IDIOMS[spec[0]].takes:
                block = draw.block(spec, self.out)
                if (block.out.kind, block.out.length) == (stream.kind, stream.length):
                    self.blocks.append(block)
                    self.out = block.out

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

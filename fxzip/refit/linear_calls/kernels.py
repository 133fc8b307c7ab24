"""Linear calls as algebra: the inputs of an output place, and the weights in one form for all of them.

Matrix products, batched ones, and convolutions of any stride, dilation, groups and number of axes, transposed ones too,
are y[p, g] = W[g] x[p, g] + b with x[p, g] the inputs that group g of output place p reads: [places, groups, inputs].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...rewriting.batchnorm_affine import affine_of, set_to_shift

Places = tuple[Tensor, ...]
Form = Literal["columns", "rows", "batched columns", "batched rows", "convolution"]


def sampled_places(
    shape: Sequence[int], axes: Sequence[int], count: int, generator: torch.Generator, device: torch.device
) -> Places:
    """At most `count` random places over all axes but those of the features: one index tensor per axis, on a device.

    `generator`: of the CPU, so that every device gets the same places.
    """
    sizes = [n for a, n in enumerate(shape) if a not in axes]
    total = math.prod(sizes)
    flat = (
        torch.arange(total, device="cpu")
        if count >= total
        else torch.randint(total, (count,), generator=generator, device="cpu")
    )
    return unravelled(flat.to(device, non_blocking=True), sizes)


def unravelled(flat: Tensor, sizes: Sequence[int]) -> Places:
    """One index tensor per axis from places counted through all axes.

    >>> unravelled(torch.tensor([5]), [2, 3])
    (tensor([1]), tensor([2]))
    """
    result: list[Tensor] = []
    for size in reversed(sizes):
        result.append(flat % size)
        flat = flat // size
    return tuple(reversed(result))


def take(value: Tensor, axes: Sequence[int], places: Places) -> Tensor:
    """Features at the places, [places, n]; features that lie along several axes as one run.

    Without other axes than those of the features there is one place, with no index.

    >>> take(torch.arange(12).reshape(2, 3, 2), (0, 2), (torch.tensor([1, 2]),)).tolist()
    [[2, 3, 8, 9], [4, 5, 10, 11]]
    >>> take(torch.arange(3), (0,), ()).tolist()
    [[0, 1, 2]]
    """
    ends = tuple(range(value.ndim - len(axes), value.ndim))
    moved = value.movedim(tuple(axes), ends)

    if not places:
        return moved.reshape(1, -1)
    return moved[tuple(p.to(value.device) for p in places)].flatten(1)


def as_rows(value: Tensor) -> Tensor:
    """All places in one run, features last, [places, n]; what has no axis but that of its features is one place.

    >>> as_rows(torch.zeros(2, 3, 4)).shape, as_rows(torch.zeros(4)).shape
    (torch.Size([6, 4]), torch.Size([1, 4]))
    """
    return value.flatten(0, -2) if value.ndim > 1 else value[None]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A linear call with weights of its own.

    Attributes:
        weight: as the call takes it; written in place.
        bias: as it is added, [outputs] or with axes of size 1, or None.
        form: "columns" for y = x W, "rows" for y = W x, "batched columns" and "batched rows" for the same once per
            index of axis 0, "convolution".
        axes: where the outputs lie along in the result.
        groups, stride, padding, dilation, transposed: of a convolution; one number per axis.
    """

    weight: Tensor
    bias: Tensor | None
    form: Form
    axes: tuple[int, ...]
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False

    def patches(self, x: Tensor, places: Places) -> Tensor:
        """Inputs at output places, [places, groups, inputs per group], in the order of `flat`.

        Where outputs come last, places may be counted through all other axes.
        """
        at = tuple(p.to(x.device) for p in places)
        if self.form.endswith("columns") and len(self.axes) == 1 and len(at) == 1:
            x = as_rows(x)
        if self.form == "columns":
            return x[at][:, None]
        if self.form == "rows":
            return x.T[at][:, None]
        if self.form == "batched columns":
            return x[at][:, None] if len(self.axes) == 1 else x[:, at[0]].transpose(0, 1)
        if self.form == "batched rows":
            return x[:, :, at[0]].permute(2, 0, 1)
        return self._windows(x, at)

    def _windows(self, x: Tensor, at: Places) -> Tensor:
        dims = x.ndim - 2
        valid: Tensor | None = None
        index: list[Any] = [at[0].reshape(-1, *[1] * dims), slice(None)]
        for axis in range(dims):
            run, inside = self._taps(axis, at[1 + axis], x.shape[2 + axis])
            shape = (-1, *[self.weight.shape[2 + axis] if a == axis else 1 for a in range(dims)])
            index.append(run.reshape(shape))
            valid = inside.reshape(shape) if valid is None else valid & inside.reshape(shape)
        taken = x[tuple(index)]  # [places, *kernel, channels]
        assert valid is not None
        taken = taken * valid.expand(taken.shape[:-1])[..., None].to(taken)
        return taken.movedim(-1, 1).reshape(len(at[0]), self.groups, -1)

    def _taps(self, axis: int, place: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Input places along one axis for each kernel tap, [places, taps], and which of them lie inside."""
        stride, padding, dilation = self.stride[axis], self.padding[axis], self.dilation[axis]
        offsets = torch.arange(self.weight.shape[2 + axis], device=place.device) * dilation
        if self.transposed:
            moved = place[:, None] + padding - offsets
            run = torch.div(moved, stride, rounding_mode="floor")
            inside = (moved % stride == 0) & (run >= 0) & (run < size)
        else:
            run = place[:, None] * stride - padding + offsets
            inside = (run >= 0) & (run < size)
        return run.clamp(0, size - 1), inside

    @property
    def read(self) -> Tensor:
        """Those of a group's inputs that lie where any weight of the kernel is not 0, bool [inputs], in the order of
        `flat`: a masked convolution has others."""
        if self.form != "convolution" or not bool(self.weight.any()):
            return torch.ones(self.flat.shape[2], dtype=torch.bool, device=self.weight.device)
        taps = (self.weight != 0).flatten(2).any(0).any(0)
        return taps.repeat(self.flat.shape[2] // len(taps))

    @property
    def flat(self) -> Tensor:
        """The weight as [groups, outputs per group, inputs per group], float64."""
        weight = self.weight.detach().double()
        if self.form == "columns":
            return weight.T[None]
        if self.form == "rows":
            return weight[None]
        if self.form == "batched columns":
            return weight[:1].transpose(1, 2) if len(self.axes) == 1 else weight.transpose(1, 2)
        if self.form == "batched rows":
            return weight
        if self.transposed:
            split = weight.reshape(self.groups, -1, *weight.shape[1:])  # [groups, inputs, outputs, *kernel]
            return split.transpose(1, 2).flatten(2)
        return weight.reshape(self.groups, -1, math.prod(weight.shape[1:]))

    def outputs_along(self, param: Tensor) -> int | None:
        """The axis of a parameter that the outputs lie along, where the weight is the whole of it, moved at most.

        None where it is a part of it, or where several outputs share a row, as in a grouped transposed convolution.
        """
        if self.form == "convolution":
            shared = self.transposed and self.groups > 1
            return int(self.transposed) if param.shape == self.weight.shape and not shared else None
        if self.weight.ndim != 2 or param.ndim != 2 or param.numel() != self.weight.numel():
            return None
        own = int(self.form == "columns")
        return own if param.shape == self.weight.shape and param.stride() == self.weight.stride() else 1 - own

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Let the call give scale · y + shift, [outputs] each, where it gave y. In place; no shift without a bias.

        For outputs along one axis.
        """
        own = self.weight[0] if self.form == "batched columns" else self.weight
        if self.transposed:
            own = own.unflatten(0, (self.groups, -1))  # [groups, inputs, outputs, *kernel]
            shape = [self.groups, 1, -1, *[1] * (own.ndim - 3)]
        else:
            shape = [1, -1] if self.form.endswith("columns") else [-1, *[1] * (own.ndim - 1)]
        own.mul_(scale.to(own).reshape(shape))

        if self.bias is not None:
            factor, summand = (value.to(self.bias).reshape(self.bias.shape) for value in (scale, shift))
            self.bias.copy_(factor * self.bias + summand)

    def put(self, flat: Tensor) -> None:
        """Write a weight in the form of `flat` back."""
        own = self.weight
        if self.form == "columns":
            flat = flat[0].T
        elif self.form == "batched columns":
            own = own[0] if len(self.axes) == 1 else own
            flat = flat[0].T if len(self.axes) == 1 else flat.transpose(1, 2)
        elif self.transposed:
            inputs = own.shape[0] // self.groups
            flat = flat.reshape(self.groups, -1, inputs, *own.shape[2:]).transpose(1, 2)
        own.copy_(flat.reshape(own.shape).to(own))


def call_kernel(name: str, args: Sequence[Any], at: int) -> Kernel | None:
    """The kernel of an ATen call whose argument `at` is a weight; None if the call is not a linear one of a known form.

    >>> x, w = torch.zeros(5, 3), torch.zeros(3, 4)
    >>> call_kernel("mm", (x, w), 1).form, call_kernel("relu", (x,), 0)
    ('columns', None)
    """
    weight = args[at]
    if name == "convolution" and at == 1 and isinstance(weight, Tensor):
        stride, padding, dilation = (_each(args[place], weight.ndim - 2) for place in (3, 4, 5))
        return Kernel(
            weight, args[2], "convolution", (1,), int(args[8]), stride, padding, dilation, transposed=bool(args[6])
        )
    first = {"mm": 0, "bmm": 0, "addmm": 1}.get(name)
    if first is None or at not in (first, first + 1):
        return None
    rows = at == first
    bias = args[0] if first else None
    if name != "bmm":
        kernel = Kernel(weight, bias, "rows" if rows else "columns", (0,) if rows else (1,))
        return kernel if bias is None or _adds_to(bias, kernel) else None
    if rows:
        return Kernel(weight, None, "batched rows", (0, 1), len(weight))
    same = weight.stride(0) == 0 or len(weight) == 1
    return Kernel(weight, None, "batched columns", (2,) if same else (0, 2), 1 if same else len(weight))


def _each(amounts: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(amounts) * (count if len(amounts) == 1 else 1)


def _adds_to(bias: Tensor, kernel: Kernel) -> bool:
    """Whether there is one entry per output, along the outputs."""
    outputs = kernel.flat.shape[0] * kernel.flat.shape[1]
    return bias.numel() == outputs and (bias.ndim == 1 or bias.shape[kernel.axes[0]] == outputs)


def effective(kernel: Kernel, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Flat weight and bias [outputs] of a linear call with the BatchNorm behind it folded in, float64."""
    flat = kernel.flat.clone()
    outputs = flat.shape[0] * flat.shape[1]
    bias = flat.new_zeros(outputs) if kernel.bias is None else kernel.bias.detach().double().flatten().clone()
    if isinstance(norm, _BatchNorm):
        affine = affine_of(norm)
        flat, bias = flat * affine.scale.reshape(*flat.shape[:2], 1), affine.behind(bias)
    return flat, bias


def install(kernel: Kernel, norm: nn.Module | None, flat: Tensor, bias: Tensor) -> None:
    """Write a solution: the weight into the call, the bias into the BatchNorm (made the identity) or into the call."""
    kernel.put(flat)
    if isinstance(norm, _BatchNorm):
        set_to_shift(norm, bias)
        if kernel.bias is not None:
            kernel.bias.zero_()
    elif kernel.bias is not None:
        kernel.bias.copy_(bias.reshape(kernel.bias.shape).to(kernel.bias))

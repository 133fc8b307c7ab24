"""What can be refitted: linear calls with the BatchNorm and the residual sum behind them; scales of normalisations."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..align import attribute

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
Places = tuple[Tensor, ...]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SCALES = (nn.LayerNorm, nn.GroupNorm, *_NORMS)
_ADDS = (operator.add, torch.add, torch.ops.aten.add.Tensor)
_RELUS = (F.relu, torch.relu, torch.ops.aten.relu.default)


@dataclass(frozen=True, eq=False)
class Unit:
    """A call that is fitted at `output`, to the target at `target`.

    Attributes:
        call: the node of the linear call, or of a normalisation with scale and bias of its own.
        norm: the BatchNorm right behind a linear call, which takes part.
        total: the residual sum behind, whose other path is there already.
        rectified: nothing but ReLUs follow.
        linear: whether `call` is a linear call.
    """

    call: fx.Node
    norm: fx.Node | None
    total: fx.Node | None
    rectified: bool
    linear: bool

    @property
    def output(self) -> fx.Node:
        return self.norm or self.call

    @property
    def target(self) -> fx.Node:
        return self.total or self.output


def called(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, if it calls one."""
    return attribute(net, str(node.target)) if node.op == "call_module" else None


def is_linear(module: nn.Module | None) -> bool:
    """Linear, and convolutions with zero padding, transposed ones too."""
    if isinstance(module, (*_CONVS, *_TRANSPOSED)):
        return module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def feature_axis(module: nn.Module, ndim: int) -> int:
    """The axis of the features in a module's output."""
    return 1 if isinstance(module, (*_CONVS, *_TRANSPOSED, *_NORMS, nn.GroupNorm)) else ndim - 1


def _is_scale(module: nn.Module | None) -> bool:
    return isinstance(module, _SCALES) and module.weight is not None and getattr(module, "bias", None) is not None


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum(node: fx.Node | None) -> bool:
    if node is None or len(node.all_input_nodes) != 2 or len(node.args) != 2 or node.kwargs:
        return False
    if node.op == "call_method":
        return node.target in ("add", "add_")
    return node.op == "call_function" and node.target in _ADDS


def _is_relu(net: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return isinstance(called(net, node), nn.ReLU) or (node.op == "call_function" and node.target in _RELUS)


def find_units(net: fx.GraphModule, nodes: Sequence[fx.Node]) -> dict[fx.Node, Unit]:
    """Units among `nodes` by the node at which they are fitted. Modules that are called twice are left alone.

    A residual sum belongs to the unit that is computed last in front of it; the other path is taken as it is.
    """
    order = {node: place for place, node in enumerate(net.graph.nodes)}
    used = Counter(str(node.target) for node in net.graph.nodes if node.op == "call_module")
    inside = set(nodes)
    result: dict[fx.Node, Unit] = {}
    taken: set[fx.Node] = set()
    for node in nodes:
        module = called(net, node)
        linear = is_linear(module)
        if node in taken or used[str(node.target)] > 1 or not (linear or _is_scale(module)):
            continue
        norm = _norm_behind(net, node, used, inside) if linear else None
        output = norm or node
        total = only_user(output)
        if total is not None and _is_sum(total) and total in inside:
            other = next(n for n in total.all_input_nodes if n is not output)
            total = total if order[other] < order[output] else None
        else:
            total = None
        users = list((total or output).users)
        rectified = bool(users) and all(_is_relu(net, user) for user in users)
        result[output] = Unit(node, norm, total, rectified, linear)
        taken.add(output)
    return result


def _norm_behind(net: fx.GraphModule, node: fx.Node, used: Counter[str], inside: set[fx.Node]) -> fx.Node | None:
    behind = only_user(node)
    if behind is None or behind not in inside or behind.op != "call_module" or used[str(behind.target)] > 1:
        return None
    found = called(net, behind)
    usable = isinstance(found, _NORMS) and found.running_mean is not None and found.affine
    return behind if usable else None


# inputs at places of the output --------------------------------------------------------------------------------------


def sampled_places(shape: Sequence[int], axis: int, count: int, generator: torch.Generator) -> Places:
    """At most `count` random places over all axes but `axis`: one index tensor per axis."""
    sizes = [n for a, n in enumerate(shape) if a != axis]
    total = math.prod(sizes)
    flat = torch.arange(total) if count >= total else torch.randint(total, (count,), generator=generator)
    result: list[Tensor] = []
    for size in reversed(sizes):
        result.append(flat % size)
        flat = flat // size
    return tuple(reversed(result))


def take(value: Tensor, axis: int, places: Places) -> Tensor:
    """Features at the places, [places, n]."""
    moved: Tensor = value.movedim(axis, -1)[tuple(p.to(value.device) for p in places)]
    return moved


def patches(module: nn.Module, x: Tensor, places: Places) -> Tensor:
    """Inputs of a linear call at output places, [places, groups, inputs per group], in the order of `flat_weight`."""
    if isinstance(module, nn.Linear):
        return take(x, x.ndim - 1, places)[:, None]
    assert isinstance(module, (*_CONVS, *_TRANSPOSED))
    dims = len(module.kernel_size)
    valid: Tensor | None = None
    index: list[Any] = [places[0].to(x.device).reshape(-1, *[1] * dims), slice(None)]
    for axis in range(dims):
        run, inside = _taps(module, axis, places[1 + axis].to(x.device), x.shape[2 + axis])
        shape = (-1, *[module.kernel_size[axis] if a == axis else 1 for a in range(dims)])
        index.append(run.reshape(shape))
        valid = inside.reshape(shape) if valid is None else valid & inside.reshape(shape)
    taken = x[tuple(index)]  # [places, *kernel, channels]
    assert valid is not None
    taken = taken * valid.expand(taken.shape[:-1])[..., None].to(taken)
    return taken.movedim(-1, 1).reshape(len(places[0]), module.groups, -1)


def _taps(module: Conv | Transposed, axis: int, place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Input places along one axis for each kernel tap, [places, taps], and which of them lie inside."""
    kernel, stride, dilation = module.kernel_size[axis], module.stride[axis], module.dilation[axis]
    offsets = torch.arange(kernel, device=place.device) * dilation
    if isinstance(module, _TRANSPOSED):
        assert not isinstance(module.padding, str)
        moved = place[:, None] + module.padding[axis] - offsets
        run = torch.div(moved, stride, rounding_mode="floor")
        inside = (moved % stride == 0) & (run >= 0) & (run < size)
    else:
        if module.padding == "same":
            before = dilation * (kernel - 1) // 2
        else:
            before = 0 if isinstance(module.padding, str) else int(module.padding[axis])
        run = place[:, None] * stride - before + offsets
        inside = (run >= 0) & (run < size)
    return run.clamp(0, size - 1), inside


def flat_weight(module: nn.Module) -> Tensor:
    """The weight as [groups, outputs per group, inputs per group · taps], float64."""
    weight: Tensor = module.weight.detach().double()  # type: ignore[operator]
    if isinstance(module, nn.Linear):
        return weight[None]
    assert isinstance(module, (*_CONVS, *_TRANSPOSED))
    if isinstance(module, _TRANSPOSED):
        split = weight.reshape(module.groups, -1, *weight.shape[1:])  # [groups, inputs, outputs, *kernel]
        return split.transpose(1, 2).flatten(2)
    return weight.reshape(module.groups, -1, math.prod(weight.shape[1:]))


def put_weight(module: nn.Module, flat: Tensor) -> None:
    """Write a weight in the form of `flat_weight` back."""
    own: Tensor = module.weight  # type: ignore[assignment]
    if isinstance(module, _TRANSPOSED):
        inputs = own.shape[0] // module.groups
        flat = flat.reshape(module.groups, -1, inputs, *own.shape[2:]).transpose(1, 2)
    own.copy_(flat.reshape(own.shape).to(own))


def effective(module: nn.Module, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Flat weight and bias [outputs] of a linear call with the BatchNorm behind it folded in, float64."""
    flat = flat_weight(module)
    outputs = flat.shape[0] * flat.shape[1]
    bias = module.bias.detach().double() if isinstance(module.bias, Tensor) else flat.new_zeros(outputs)
    if isinstance(norm, _NORMS):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        flat = flat * scale.reshape(*flat.shape[:2], 1)
        bias = (bias - norm.running_mean.double()) * scale + norm.bias.detach().double()
    return flat, bias


def install(module: nn.Module, norm: nn.Module | None, flat: Tensor, bias: Tensor) -> None:
    """Write a solution: the weight into the call, the bias into the BatchNorm (made the identity) or into the call."""
    put_weight(module, flat)
    own = module.bias if isinstance(module.bias, Tensor) else None
    if isinstance(norm, _NORMS):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0)
        norm.weight.fill_(math.sqrt(1 + norm.eps))
        norm.bias.copy_(bias.to(norm.bias))
        if own is not None:
            own.zero_()
    elif own is not None:
        own.copy_(bias.to(own))
    else:
        weight: Tensor = module.weight  # type: ignore[assignment]
        module.bias = nn.Parameter(bias.to(weight), requires_grad=weight.requires_grad)

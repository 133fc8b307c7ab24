"""Heads whose layers differ in width, brought to one width by features that are zero.

Heads that were narrowed by need keep other numbers of features each. Where calls of all heads are the same but for
that, the narrower ones get further features: rows of zeros in the layer that writes them, columns of zeros in those
that read them. Between the two there may be only calls that act feature by feature and give zero for zero, so that
nothing ever comes of these features, in training neither: their gradients are zero, too.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ...partition.alignment import attribute
from ..module import ZippedModule
from ..module_settings import adopt_sizes
from .emit import emitted
from .rules import BY_POSITION, FEATURES, Site, axes_of, rule_of, why_alone
from .twins import Twins, Values, alike, operands

_WRITERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ONE_BY_ONE: frozenset[Any] = frozenset({
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh,
    nn.Softsign, nn.Identity, nn.Dropout, torch.relu, F.relu, F.relu6, F.gelu, F.silu, F.mish, F.hardswish, F.elu,
    F.leaky_relu, torch.tanh, torch.abs, torch.neg, torch.square, "relu", "tanh", "abs", "neg", "square", operator.neg,
})  # fmt: skip
"""Zero for zero, value by value."""
_TOGETHER: frozenset[Any] = frozenset(
    {operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul, "add", "sub", "mul"}
)
"""Zero for zeros, where all operands are values."""
_BY_FEATURE: frozenset[Any] = frozenset({
    *_NORMS, *(kind for kinds in BY_POSITION.values() for kind in kinds), nn.Flatten, torch.flatten, "flatten", "view",
    "reshape", torch.reshape, torch.mean, "mean", F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d,
    F.adaptive_max_pool2d,
})  # fmt: skip
"""Zero for zeros, where features lie along axis 1."""


def padded(net: ZippedModule, values: Values) -> ZippedModule | None:
    """The network with features of zeros where heads differ in width only; None if there is nowhere to put them."""
    groups = alike(net, values, sized=False)
    finder = _Uneven(net, values, groups)
    uneven = finder.found()
    if not uneven:
        return None
    result = emitted(net, [])
    for twins in groups:
        if _kind(net, twins[0]) not in (*_WRITERS, *_NORMS):
            continue
        rows = _widest(values, twins, uneven)
        source = finder.within.get(operands(twins[0])[0])
        columns = (
            None
            if source is None or isinstance(_module(net, twins[0]), _BatchNorm)
            else _widest(values, source, uneven)
        )
        for node in twins if rows or columns else ():
            made = _wider(attribute(net, str(node.target)), rows, columns)
            result.set_submodule(str(node.target), made)
    return result


def _kind(net: fx.GraphModule, node: fx.Node) -> Any:
    """What a node calls: a class of modules, a function, or the name of a method."""
    return type(_module(net, node)) if node.op == "call_module" else node.target


def _module(net: fx.GraphModule, node: fx.Node) -> Any:
    return attribute(net, str(node.target))


def _widest(values: Values, twins: Twins, uneven: Mapping[Twins, int]) -> int | None:
    """How many features twins get; None if they keep what they have."""
    return max(values.shapes[node][uneven[twins]] for node in twins) if twins in uneven else None


class _Uneven:
    """Finds which twins of different widths may get zeros."""

    def __init__(self, net: ZippedModule, values: Values, groups: list[Twins]) -> None:
        self.net, self.values, self.groups = net, values, groups
        self.within = {node: twins for twins in groups for node in twins}
        self.axes: dict[Twins, int] = {}

    def found(self) -> dict[Twins, int]:
        """Such twins, and the axis along which their features lie."""
        for twins in self.groups:
            axis = self.differing(twins)
            if axis is not None:
                self.axes[twins] = axis
        left = None
        while left != len(self.axes):
            left = len(self.axes)
            self.axes = {
                twins: axis for twins, axis in self.axes.items() if self.made(twins, axis) and self.read(twins)
            }
        return self.axes

    def differing(self, twins: Twins) -> int | None:
        """The one axis in which the shapes of twins differ."""
        shapes = [self.values.shapes.get(node) for node in twins]
        if None in shapes:
            return None
        differ = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len({*sizes}) > 1]
        return differ[0] if len(differ) == 1 else None

    def made(self, twins: Twins, axis: int) -> bool:
        """Whether zeros are what a call gives there: of itself, or for zeros."""
        kind = _kind(self.net, twins[0])
        if twins[0].op == "call_module" and not self.wide(twins):
            return False
        if kind in _WRITERS:
            return axis == self.along(twins[0], twins)
        given = [self.within.get(node) for node in operands(twins[0]) if node in self.values.shapes]
        zeros = bool(given) and all(own in self.axes for own in given)
        plain = not twins[0].kwargs.get("inplace") and "out" not in twins[0].kwargs
        if kind in _ONE_BY_ONE or (kind in _TOGETHER and len(given) == 2):
            return zeros and plain and all(self.axes[own] == axis for own in given if own is not None)
        return (
            kind in _BY_FEATURE
            and zeros
            and axis == 1
            and all(self.axes[own] == 1 for own in given if own is not None)
            and self.by_feature(twins)
        )

    def by_feature(self, twins: Twins) -> bool:
        """Whether every head's call leaves features where they are."""
        site = Site(self.net, twins, self.values)
        rule = rule_of(self.net, twins[0])
        return rule is not None and FEATURES in axes_of(rule, site)

    def wide(self, twins: Twins) -> bool:
        """Whether the layers of all heads may get another width."""
        modules = [_module(self.net, node) for node in twins]
        return not any(getattr(own, "groups", 1) > 1 for own in modules) and not any(
            why_alone(self.net, node) for node in twins
        )

    def along(self, node: fx.Node, twins: Twins) -> int:
        """Along which axis a layer sums, and gives its features."""
        return 1 if isinstance(_module(self.net, node), _ConvNd) else len(self.values.shapes[twins[0]]) - 1

    def read(self, twins: Twins) -> bool:
        """Whether all that reads the values sums over the zeros, or gives zeros for them."""
        for node in twins:
            for user in node.users:
                readers = self.within.get(user)
                if readers is None:
                    return False
                sums = _kind(self.net, user) in _WRITERS and self.wide(readers)
                if not (sums and self.axes[twins] == self.along(user, readers)) and readers not in self.axes:
                    return False
        return True


def _wider(module: nn.Module, rows: int | None, columns: int | None) -> nn.Module:
    """A copy with so many outputs and inputs, those that are new of zeros; variances of ones."""
    made: Any = copy.copy(module)
    vars(made).update({key: copy.copy(vars(module)[key]) for key in ("_parameters", "_buffers")})
    for name, own in module._parameters.items():
        if own is not None:
            made._parameters[name] = nn.Parameter(_more(own.detach(), rows, columns), own.requires_grad)
    for name, held in module._buffers.items():
        if held is not None and held.ndim:
            made._buffers[name] = _more(held, rows, columns, float(name == "running_var"))
    adopt_sizes(made)
    return made  # type: ignore[no-any-return]


def _more(value: Tensor, rows: int | None, columns: int | None, filled: float = 0.0) -> Tensor:
    sizes = list(value.shape)
    sizes[0] = rows or sizes[0]
    if value.ndim > 1:
        sizes[1] = columns or sizes[1]
    result = value.new_full(sizes, filled)
    result[tuple(slice(0, size) for size in value.shape)] = value
    return result

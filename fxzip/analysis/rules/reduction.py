"""Reductions, normalisations, and calls over positions (pooling, interpolation)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .axis_labels import AxisLabels, Operand, along, compress, varying
from .invocation import Invocation, axes_of
from .meeting import meet


def _outputs(call: Invocation, fields: AxisLabels) -> AxisLabels | list[AxisLabels]:
    """The same fields for every result (values and indices of max, var and mean of var_mean)."""
    return fields if isinstance(call.out, Tensor) else [fields if isinstance(t, Tensor) else () for t in call.out]


def reduce(call: Invocation) -> AxisLabels | list[AxisLabels]:
    """sum, mean, amax, var, norm ... over `dim`: symmetric in what is reduced."""
    x = call.operand(call.args[0])
    names = {argument.name: place for place, argument in enumerate(call.func._schema.arguments)}
    dim = call.arg(names["dim"], "dim") if "dim" in names else None
    keep = bool(call.arg(names["keepdim"], "keepdim", False)) if "keepdim" in names else False
    axes = axes_of(dim, x.ndim)

    left = []
    for labels in x.fields:
        if axes & varying(labels) and _is_extremum(call):
            call.store.touch("extremum", labels)
        rest = call.store.mix(labels, axes)
        if rest is not None:
            left.append(rest)

    result = []
    for rest in left:
        finer = [other for other in left if varying(rest) and varying(rest) < varying(other)]
        for other in finer:  # blocks of what was reduced, in which other features lie too: these tell of them
            call.store.relate(rest, other)
        if not finer:
            result.append(rest if keep else rest.reshape([s for a, s in enumerate(rest.shape) if a not in axes]))

    if call.name in ("max", "min") and not isinstance(call.out, Tensor):
        call.numbers(call.out[1], lambda: _by_place(call, x, axes))
    return _outputs(call, tuple(result))


def _is_extremum(call: Invocation) -> bool:
    """Whether the call does not see how often a value occurs, so that copies of features show nothing."""
    if call.name in ("norm", "linalg_vector_norm"):
        return abs(float(call.arg(1, "ord" if "linalg" in call.name else "p", 2) or 0)) == math.inf
    return call.name in ("amax", "amin", "max", "min", "any", "all", "aminmax")


def _by_place(call: Invocation, x: Operand, axes: frozenset[int]) -> None:
    """The places along `axes` count, so features keep theirs."""
    for labels in x.fields:
        call.store.fix(labels, axes, f"`{call.name}` depends on the order of features")
        if axes & varying(labels):
            call.store.refuse(f"`{call.name}` depends on the order of features")


def positional_reduce(call: Invocation) -> AxisLabels | list[AxisLabels] | None:
    """argmax and the like: which place wins is a number, so the places stay."""
    x = call.operand(call.args[0])
    names = {argument.name: place for place, argument in enumerate(call.func._schema.arguments)}
    axes = axes_of(call.arg(names["dim"], "dim"), x.ndim)
    _by_place(call, x, axes)
    return reduce(call)


def ordered(call: Invocation) -> AxisLabels | list[AxisLabels]:
    """cumsum, sort, topk ...: the order along `dim` matters."""
    x = call.operand(call.args[0])
    names = {argument.name: place for place, argument in enumerate(call.func._schema.arguments)}
    axes = axes_of(call.arg(names["dim"], "dim", -1), x.ndim)
    _by_place(call, x, axes)
    left = [call.store.project(labels, varying(labels) - axes) for labels in x.fields]
    return _outputs(call, tuple(labels for labels in left if labels is not None))


def places_of(call: Invocation) -> AxisLabels:
    """nonzero, masked_select: which places are taken, in which order, depends on where they lie."""
    for x in call.operands():
        for labels in x.fields:
            call.store.pin(labels, f"`{call.name}` depends on the order of features")
            call.store.refuse(f"`{call.name}` depends on the order of features")
    return ()


def transform(call: Invocation) -> AxisLabels:
    """_fft_r2c(x, dims, ...) and its kin: positions along `dims` are mixed, labels elsewhere go on."""
    x = call.operand(call.args[0])
    axes = axes_of(call.args[1], x.ndim)

    result = []
    for labels in x.fields:
        call.store.fix(labels, axes, f"`{call.name}` mixes what lies along it by the order of places")
        if axes & varying(labels):
            call.store.refuse(f"`{call.name}` depends on the order of features")
        rest = call.store.project(labels, varying(labels) - axes)
        if rest is not None:
            result.append(rest)

    return tuple(result)


def softmax(call: Invocation) -> AxisLabels:
    """_softmax(x, dim): symmetric in the places along `dim`, which go on."""
    x = call.operand(call.args[0])
    for labels in x.fields:
        call.store.mix(labels, axes_of(call.args[1], x.ndim))
    return x.fields


def _affine(call: Invocation, x: Operand, params: list[Tensor | None], first: int) -> AxisLabels:
    """x meets parameters whose axes start at axis `first` of x."""
    placed = [x]
    for param in params:
        if isinstance(param, Tensor):
            operand = call.operand(param)
            placed.append(operand.place(range(first, first + operand.ndim), x.ndim))
    return meet(call.store, placed, f"`{call.name}`")


def layer_norm(call: Invocation) -> AxisLabels | list[AxisLabels]:
    """native_layer_norm(x, shape, weight, bias, eps), _fused_rms_norm(x, shape, weight, eps)."""
    x = call.operand(call.args[0])
    count = len(call.args[1])
    for labels in x.fields:
        call.store.mix(labels, frozenset(range(x.ndim - count, x.ndim)))
    params = [value for value in call.args[2:4] if isinstance(value, Tensor)]
    fields = _affine(call, x, list(params), x.ndim - count)
    return fields if isinstance(call.out, Tensor) else [fields, *[() for _ in call.out[1:]]]


def batch_norm(call: Invocation) -> AxisLabels | list[AxisLabels]:
    """native_batch_norm and its kin: (x, weight, bias, running_mean, running_var, ...), all over axis 1."""
    x = call.operand(call.args[0])
    fields = _affine(call, x, list(call.args[1:5]), 1)
    return fields if isinstance(call.out, Tensor) else [fields, *[() for _ in call.out[1:]]]


def group_norm(call: Invocation) -> list[AxisLabels]:
    """native_group_norm(x, weight, bias, N, C, HxW, groups, eps): the channels of a group are a block."""
    x = call.operand(call.args[0])
    groups = call.args[6]

    for labels in x.fields:
        inner = frozenset(range(2, x.ndim))
        call.store.fix(labels, inner, "`native_group_norm` normalises over positions")
        channels = labels.shape[1]
        if channels > 1 and varying(labels) == {1}:
            blocks = labels.reshape(groups, channels // groups)
            call.store.touch("mix", labels)
            if 1 < groups < channels:
                call.store.project(blocks, frozenset({0}))
        elif channels > 1:
            call.store.pin(labels, "`native_group_norm` meets several kinds of features")

    return [_affine(call, x, list(call.args[1:3]), 1), (), ()]


def positional(call: Invocation) -> AxisLabels | list[AxisLabels]:
    """Pooling, interpolation, padding by reflection: axes from 2 on hold positions, labels elsewhere go on."""
    x = call.operand(call.args[0])
    spatial = _spatial_axes(call, x)

    result = []
    for labels in x.fields:
        call.store.fix(labels, spatial, f"`{call.name}` mixes neighbouring places")
        rest = call.store.project(labels, varying(labels) - spatial)
        if rest is not None:
            result.append(rest)

    return _outputs(call, tuple(result))


def _spatial_axes(call: Invocation, x: Operand) -> frozenset[int]:
    digits = [char for char in call.name if char.isdigit() and call.name[call.name.index(char) + 1 :][:1] == "d"]
    count = int(digits[0]) if digits else x.ndim - 2
    return frozenset(range(x.ndim - count, x.ndim))


def grid_sample(call: Invocation) -> AxisLabels:
    """grid_sampler(x, grid): positions are looked up; features of x go on."""
    grid = call.operand(call.args[1])
    for labels in grid.fields:
        call.store.pin(labels, f"`{call.name}` reads it as coordinates")
    fields = positional(call)
    assert isinstance(fields, tuple)
    return fields


def im2col(call: Invocation) -> AxisLabels:
    """im2col: [B, C, H, W] -> [B, C·k·k, L]: every channel becomes k·k places in a row."""
    x = call.operand(call.args[0])
    taps = int(torch.Size(call.args[1]).numel())
    result = []
    for labels in x.fields:
        call.store.fix(labels, frozenset({2, 3}), "`im2col` mixes neighbouring places")
        if varying(labels) == {1}:
            result.append(along(labels.reshape(-1).repeat_interleave(taps), 1, 3))
    return tuple(result)


def col2im(call: Invocation) -> AxisLabels:
    """col2im(x, size, kernel, ...): [B, C·k·k, L] -> [B, C, H, W]: a channel's places are summed where they fall."""
    x = call.operand(call.args[0])
    taps = int(torch.Size(call.args[2]).numel())

    result = []
    for labels in x.fields:
        cells = labels.expand(labels.shape[0], x.tensor.shape[1], labels.shape[2]) if labels.shape[1] > 1 else labels
        cells = compress(cells.reshape(labels.shape[0], -1, taps if labels.shape[1] > 1 else 1, labels.shape[2]))
        call.store.fix(cells, frozenset({2, 3}), "`col2im` mixes neighbouring places")
        rest = call.store.project(cells, varying(cells) - {2, 3})
        if rest is not None:
            result.append(rest)

    return tuple(result)

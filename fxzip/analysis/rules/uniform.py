"""Axes along which a tensor is the same everywhere, whatever the input and the parameters.

There are no features along such an axis: zeros in the shape of features, a mask over tokens repeated for every feature,
an index expanded for a scatter. The property flows from call to call: factories give it, elementwise calls keep it
where all operands have it, movement carries it along, and what is not listed here loses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import movement
from .axis_labels import Operand, compress, varying
from .invocation import Invocation, axes_of, is_pointwise, is_random, names

Axes = frozenset[int]

NOTHING: Axes = frozenset()
_LARGEST = 1 << 22  # elements; movement of larger tensors is not followed

FACTORIES = names("zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor zero fill")
"""Calls whose values are the same everywhere, and depend on no operand but a value to fill with."""
UNWRITTEN = names("empty empty_like new_empty empty_strided new_empty_strided empty_permuted")
"""Calls whose values mean nothing: what is read of them has been written first."""
_ELEMENTWISE = names("_to_copy to where masked_fill _softmax _safe_softmax _log_softmax")
_REDUCED = names("sum mean amax amin prod logsumexp var std max min any all linalg_vector_norm")
_SCATTERED = names("index_add index_copy index_reduce scatter scatter_add scatter_reduce")


def uniform_axes(call: Invocation, of: Callable[[Tensor], Axes]) -> list[Axes]:
    """For each tensor that the call returns, its axes of this kind; `of` gives those of the operands."""
    outs = [out for out in (call.out if isinstance(call.out, (list, tuple)) else [call.out]) if isinstance(out, Tensor)]
    if call.name in FACTORIES or call.name in UNWRITTEN:
        return [frozenset(range(out.ndim)) for out in outs]

    nothing = [NOTHING for _ in outs]
    given = [tensor for tensor in call.tensors() if tensor.ndim]
    if not given or is_random(call.func):
        return nothing
    if is_pointwise(call.func) or call.name in _ELEMENTWISE:
        return [_meeting(out.ndim, given, of) for out in outs]
    if call.name in _REDUCED:
        return [_reduced(call, out, of) for out in outs]
    if call.name in ("cat", "stack"):
        return [_joined(call, outs[0].ndim, given, of)]

    if call.name in _SCATTERED:
        ndim = outs[0].ndim
        return [_meeting(ndim, [t for t in given if t.ndim == ndim], of) - {call.args[1] % ndim}]

    return _moved(call, outs, of) or nothing


def _still(tensor: Tensor, of: Callable[[Tensor], Axes]) -> Axes:
    """Axes along which nothing changes, those of size 1 too."""
    return of(tensor) | {axis for axis, size in enumerate(tensor.shape) if size == 1}


def _meeting(ndim: int, given: list[Tensor], of: Callable[[Tensor], Axes]) -> Axes:
    result = frozenset(range(ndim))
    for tensor in given:
        first = ndim - tensor.ndim
        result &= {axis + first for axis in _still(tensor, of)} | set(range(first))
        if not result:
            break
    return result


def _reduced(call: Invocation, out: Tensor, of: Callable[[Tensor], Axes]) -> Axes:
    x = call.args[0]
    mine = of(x)
    if not mine or out.ndim in (0, x.ndim):
        return mine if out.ndim == x.ndim and out.shape != x.shape else NOTHING
    where = {argument.name: place for place, argument in enumerate(call.func._schema.arguments)}
    gone = axes_of(call.arg(where["dim"], "dim"), x.ndim) if "dim" in where else frozenset(range(x.ndim))
    left = [axis for axis in range(x.ndim) if axis not in gone]
    return frozenset(place for place, axis in enumerate(left) if axis in mine)


def _joined(call: Invocation, ndim: int, given: list[Tensor], of: Callable[[Tensor], Axes]) -> Axes:
    dim = call.arg(1, "dim", 0) % ndim
    kept = [axis for axis in range(ndim) if axis != dim]
    result = set(kept)
    for tensor in given:
        still = _still(tensor, of)
        own = kept if call.name == "cat" else range(tensor.ndim)
        result &= {axis for axis, place in zip(kept, own, strict=False) if place in still}
    return frozenset(result)


def _moved(call: Invocation, outs: list[Tensor], of: Callable[[Tensor], Axes]) -> list[Axes] | None:
    """Run a movement on the numbers of the places, the same along such axes; None if it is no movement."""
    source = call.args[0]
    if call.name not in movement.MOVES or not isinstance(source, Tensor):
        return None

    still = _still(source, of)
    grows = any(out.numel() > source.numel() for out in outs)
    if (
        not still
        or not source.numel()
        or source.numel() > _LARGEST
        or not (grows or any(source.shape[axis] > 1 for axis in still))
    ):
        return None

    places = torch.arange(1, source.numel() + 1, device="cpu").reshape(source.shape)
    for axis in still:
        places = places.narrow(axis, 0, 1)

    moved = movement.replay(call, Operand(source, (places,), False, NOTHING))
    parts: list[Any] = moved if isinstance(moved, list) else [moved]
    return [
        frozenset(range(out.ndim)) - (varying(compress(fields[0])) if fields else NOTHING)
        for out, fields in zip(outs, parts, strict=True)
    ]

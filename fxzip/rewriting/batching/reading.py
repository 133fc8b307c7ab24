"""What a call reads: the tensor that was taken apart before it, and sizes that are those of a batch."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .twins import Values, operands

_TAKEN_APART: Mapping[Any, int] = {
    **dict.fromkeys(("unbind", torch.unbind), 1),
    **dict.fromkeys(("chunk", torch.chunk, "split", torch.split, "tensor_split", torch.tensor_split), 2),
}
"""Calls that take a tensor apart along an axis, and the place of that argument."""


def whole(node: fx.Node) -> fx.Node | None:
    """The call that takes a tensor apart, where a node is one of its parts."""
    source = node.args[0] if node.target is operator.getitem else None
    if not isinstance(source, fx.Node) or source.target not in _TAKEN_APART:
        return None
    return source if isinstance(source.args[0] if source.args else None, fx.Node) else None


def dim_of(parts: fx.Node) -> Any:
    """The axis along which a call takes a tensor apart."""
    place = _TAKEN_APART[parts.target]
    return parts.args[place] if place < len(parts.args) else parts.kwargs.get("dim", 0)


def read(node: fx.Node) -> list[fx.Node]:
    """The operands of a call; of a part of what was taken apart, the whole."""
    return operands(whole(node) or node)


def sizes_of(node: fx.Node) -> tuple[Any, ...]:
    """The sizes that a `view` or `reshape` is given."""
    given = node.args[1] if len(node.args) == 2 else node.args[1:]
    return tuple(given) if isinstance(given, (tuple, list)) else (given,)


def is_batch_size(node: fx.Node, values: Values) -> bool:
    """Whether a number is `x.size(0)`, `x.shape[0]` or `x.shape[:2][0]`."""
    if node.target == "size" and node.args[1:] == (0,):
        source: Any = node.args[0]
    elif node.target is operator.getitem and node.args[1] == 0:
        source = _measured(node.args[0])
    else:
        return False
    return values.batch.get(source) == 0


def _measured(shape: Any) -> fx.Node | None:
    """The value whose shape something is, or the first sizes of it."""
    if not isinstance(shape, fx.Node):
        return None
    source: Any = shape.args[0] if shape.args else None
    if shape.target is operator.getitem and isinstance(shape.args[1], slice):
        taken = shape.args[1]
        return _measured(source) if taken.start in (None, 0) and taken.step in (None, 1) else None
    whole_shape = shape.target == "size" and len(shape.args) == 1 and not shape.kwargs
    return source if whole_shape or (shape.target is getattr and shape.args[1] == "shape") else None

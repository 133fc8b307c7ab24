"""Sizes of inputs, and at which of them a trace is known to be right. The batch is not one of them."""

from __future__ import annotations

from collections.abc import Sequence

from .calls import Call, batch_size, leaves
from .ladder import Program

Shapes = tuple[tuple[int | None, ...], ...]


def shapes_of(call: Call) -> Shapes:
    """The shape of every tensor of a call, with None for the batch.

    >>> import torch
    >>> from fxzip.tracing.calls import as_call
    >>> shapes_of(as_call((torch.ones(4, 3), torch.ones(2))))
    ((None, 3), (2,))
    """
    size = batch_size(call)
    return tuple(
        (None, *value.shape[1:]) if value.ndim and value.shape[0] == size else tuple(value.shape)
        for value in leaves(call)
    )


def checked_shapes(programs: Sequence[Program]) -> list[list[tuple[int | None, ...]]]:
    """The shapes at which every trace was compared with its model: of each such input those of its tensors, with None
    for a batch of any size."""
    each = [list(dict.fromkeys(map(shapes_of, program.compared))) for program in programs]
    if len(leaves(programs[0].call)) != len(leaves(programs[0].compared[0])):  # inputs of their own
        return [[shape for own in shapes for shape in own] for shapes in zip(*each, strict=False)]
    return [list(shapes) for shapes in each[0] if all(shapes in own for own in each)]

"""Sizes of inputs: which of them the data hold besides the sample's, for the trace to be compared at.

The batch is not one of them: every trace is compared at two batch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from .calibration import Calibration
from .errors import FxzipError
from .inputs import Call, JointCall, batch_size, leaves, map_tensors
from .tracing import Program

BATCHES = 64
SHAPES = 16

Shapes = tuple[tuple[int | None, ...], ...]


def shapes_of(call: Call) -> Shapes:
    """The shape of every tensor of a call, with None for the batch.

    >>> from fxzip.inputs import as_call
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


def other_shapes(calibration: Calibration, sample: Call) -> list[Call]:
    """A call of at most two rows for each shape that the first batches of the data have and the sample has not; at
    most `SHAPES` of them.

    >>> from fxzip.inputs import as_call
    >>> sample = as_call(torch.ones(4, 7))
    >>> calls = other_shapes(Calibration.of([torch.ones(4, 7), torch.ones(9, 8)], sample, 2, False), sample)
    >>> [call.args[0].shape for call in calls]
    [torch.Size([2, 8])]
    """
    known, found = {shapes_of(sample)}, list[Call]()
    batches = iter(calibration("looking at shapes"))
    try:
        for call in islice(batches, BATCHES):
            if shapes_of(call) not in known and len(found) < SHAPES:
                known.add(shapes_of(call))
                found.append(_first_rows(call))
    except FxzipError:  # what is wrong with the data is said where they are used
        pass
    return found


def _first_rows(call: Call) -> Call:
    if isinstance(call, JointCall):
        return JointCall.of(_first_rows(part) for part in call.parts)
    size = batch_size(call)

    def rows(value: torch.Tensor) -> Any:
        return value[:2] if value.ndim and value.shape[0] == size else value

    return map_tensors(rows, call)

"""Sizes of inputs: which of them the data hold besides the sample's, for the trace to be compared at.

The batch is not one of them: every trace is compared at two batch sizes.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from ..errors import FxzipError
from ..tracing.calls import Call, JointCall, batch_size, map_tensors
from ..tracing.shapes import shapes_of
from . import processes
from .sources import Calibration

BATCHES = 64
SHAPES = 16


def other_shapes(calibration: Calibration, sample: Call) -> list[Call]:
    """A call of at most two rows for each shape that the first batches of the data have and the sample has not; at
    most `SHAPES` of them.

    >>> from fxzip.tracing.calls import as_call
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
    return _of_all(found)


def _of_all(calls: list[Call]) -> list[Call]:
    """Those of all processes, each shape once, at most `SHAPES`: a trace must be the same everywhere."""
    known: dict[Any, Call] = {}
    for theirs in processes.everyone(calls):
        for call in theirs:
            known.setdefault(shapes_of(call), call)
    return list(known.values())[:SHAPES]


def _first_rows(call: Call) -> Call:
    if isinstance(call, JointCall):
        return JointCall.of(_first_rows(part) for part in call.parts)
    size = batch_size(call)

    def rows(value: torch.Tensor) -> Any:
        return value[:2] if value.ndim and value.shape[0] == size else value

    return map_tensors(rows, call)

"""Batches of a single input are put together with their neighbours.

Which ATen calls a module makes can depend on whether there are several inputs: axes of size 1 leave a transposed tensor
in one run, and a product with its bias is then one call where it is two otherwise. Calls are told apart by their number
(`tracing/aten_calls.py`), so stages that look into modules see several inputs at a time, on the sample and here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..tracing.calls import Call, JointCall, batch_size, leaves, map_tensors, twice

_ENOUGH = 16
"""Inputs in a batch that was put together; a single one behind them begins another."""


def joined(calls: Iterable[tuple[int, Call]]) -> Iterator[tuple[int, Call]]:
    """The same inputs, each call with the number of its source, in batches of two at least. What is alone among inputs
    of other shapes comes twice.

    >>> from torch import ones
    >>> calls = [(0, Call((ones(n, 4),), {})) for n in (3, 2, 1)] + [(1, Call((ones(1, 4),), {}))]
    >>> [(source, len(call.args[0])) for source, call in joined(calls)]
    [(0, 3), (0, 3), (1, 2)]
    """
    waiting: tuple[int, Call] | None = None
    for source, call in calls:
        if waiting is not None and waiting[0] == source and 1 in (own := _sizes(waiting[1], call)):
            both = _together(waiting[1], call) if max(own) < _ENOUGH or own[0] == 1 else None
            if both is not None:
                waiting = source, both
                continue
        if waiting is not None:
            yield waiting[0], _several(waiting[1])
        waiting = source, call
    if waiting is not None:
        yield waiting[0], _several(waiting[1])


def _sizes(*calls: Call) -> tuple[int, ...]:
    return tuple(batch_size(call) or 0 for call in calls)


def _several(call: Call) -> Call:
    return twice(call) if batch_size(call) == 1 else call


def _together(first: Call, second: Call) -> Call | None:
    """The inputs of both; None if they are not of one shape, or differ in what is no input."""
    if isinstance(first, JointCall) and isinstance(second, JointCall):
        parts = [_together(a, b) for a, b in zip(first.parts, second.parts, strict=True)]
        return None if None in parts else JointCall.of(part for part in parts if part is not None)
    sizes = _sizes(first, second)
    theirs = leaves(second)
    if len(leaves(first)) != len(theirs):
        return None
    result = list[Tensor]()
    for a, b in zip(leaves(first), theirs, strict=True):
        rows = bool(a.ndim and b.ndim) and (len(a), len(b)) == sizes
        alike = a.dtype == b.dtype and a.layout == b.layout == torch.strided
        if rows and alike and a.shape[1:] == b.shape[1:]:
            result.append(torch.cat([a, b]))
        elif not rows and alike and torch.equal(a, b):
            result.append(a)
        else:
            return None
    values = iter(result)
    return map_tensors(lambda _: next(values), first)

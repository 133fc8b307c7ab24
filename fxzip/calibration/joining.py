"""Batches of a single input are put together with their neighbours.

Which ATen calls a module makes can depend on whether there are several inputs: axes of size 1 leave a transposed tensor
in one run, and a product with its bias is then one call where it is two otherwise. Calls are told apart by their number
(`tracing/aten_calls.py`), so stages that look into modules see several inputs at a time, on the sample and here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, groupby

import torch
from torch import Tensor

from ..tracing.calls import Call, JointCall, batch_size, leaves, map_tensors, twice

_ENOUGH = 16
"""Inputs in a batch that was put together; further single ones make another."""


def joined(calls: Iterable[tuple[int, Call]], sources: int = 1) -> Iterator[tuple[int, Call]]:
    """The same inputs, each call with the number of its source, in batches of two at least.

    What is alone among inputs of other shapes comes twice. The only input of one of several sources stays alone: twice,
    it would count for more beside those of the others.

    >>> from torch import ones
    >>> calls = [(0, Call((ones(n, 4),), {})) for n in (3, 2, 1)] + [(1, Call((ones(1, 4),), {}))]
    >>> [(source, len(call.args[0])) for source, call in joined(calls)]
    [(0, 3), (0, 3), (1, 2)]
    """
    for source, own in groupby(calls, key=lambda numbered: numbered[0]):
        found = _in_company(call for _, call in own)
        first, second = next(found), next(found, None)
        only = second is None and sources > 1
        for call in chain([first], [] if second is None else [second], found):
            yield source, call if only or batch_size(call) != 1 else twice(call)


def _in_company(calls: Iterable[Call]) -> Iterator[Call]:
    """The same inputs; a batch of one joins those next to it where they are of its shape."""
    waiting: Call | None = None
    single: Call | None = None  # behind a batch that is large enough: it joins the next, or that batch if there is none
    with_single: Call | None = None  # that batch then
    for call in calls:
        if waiting is None:
            waiting = call
        elif single is not None:
            both = _together(single, call)
            yield waiting if both is not None else with_single or waiting
            waiting, single, with_single = both or call, None, None
        elif 1 not in (sizes := _sizes(waiting, call)) or (both := _together(waiting, call)) is None:
            yield waiting
            waiting = call
        elif sizes[1] == 1 and sizes[0] >= _ENOUGH:
            single, with_single = call, both
        else:
            waiting = both
    if waiting is not None:
        yield with_single or waiting


def _sizes(*calls: Call) -> tuple[int, ...]:
    return tuple(batch_size(call) or 0 for call in calls)


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

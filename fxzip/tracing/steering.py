"""What Python asks in a model's code that a trace answers otherwise: branches compared, as `ways` has seen them."""

from __future__ import annotations

import dis
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from .calls import map_tensors
from .execution import quiet_execution, run_eager
from .kept_state import state_kept
from .reference import Reference
from .threads import ThreadPatch
from .ways import Way, asks, entered, inside, parting, watched

_OF_GRADIENTS = frozenset(["is_grad_enabled", "requires_grad", "grad_fn", "is_leaf"])
_OF_COMPILERS = frozenset(["is_compiling", "is_exporting", "is_dynamo_compiling"])
_CATCHES = {dis.opmap[name] for name in ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH") if name in dis.opmap}
_COMPILED = ThreadPatch(lambda: [(torch.compiler, name, lambda: True) for name in ("is_compiling", "is_exporting")])


def astray(own: nn.Module, reference: Reference, traced: Sequence[Way], *, exported: bool) -> str:
    """Where a trace took another way than the model does, "" if it did not.

    Args:
        traced: its runs, of which the last one is the graph.
        exported: by `torch.export`, on fresh input, else on the sample.
    """
    place = int(exported)
    if not traced or len(reference.ways) < 2:
        return ""
    found = parting(reference.ways[place], traced[-1])
    if found:  # what the model has kept of its first runs, the trace has seen too
        found = parting(_way_again(own, reference, place), traced[-1])
    if found and exported and asks(reference.ways, _OF_COMPILERS):  # the model says itself what is the same
        with _COMPILED.inside():
            found = parting(_way_again(own, reference, place), traced[-1])
    return found


def _way_again(own: nn.Module, reference: Reference, place: int) -> Way:
    with state_kept(own), watched() as ways:
        run_eager(own, reference.calls[place], seed=place)
    return ways[-1]


def with_gradients(own: nn.Module, reference: Reference) -> str:
    """Where the model takes another way if gradients are enabled, "" if it does not. Traces are made without."""
    if len(reference.ways) < 2 or not asks(reference.ways, _OF_GRADIENTS):
        return ""
    given = map_tensors(lambda value: value.detach().clone(), reference.fresh)
    with state_kept(own), watched() as ways, quiet_execution(seed=1), torch.enable_grad(), suppress(Exception):
        entered(own, *given.args, **given.kwargs)
    if not ways or not parting(reference.ways[1], ways[-1]):
        return ""
    return parting(_way_again(own, reference, 1), ways[-1])  # in the state of now


def asks_of_arguments(reference: Reference) -> bool:
    """Whether the model may find out what its arguments are in ways that leave no guard behind: by their class, or by
    an exception that it catches."""
    codes = {call.code for way in reference.ways for call in inside(way)}
    return asks(reference.ways, frozenset(["__class__"])) or any(_CATCHES & set(code.co_code[::2]) for code in codes)


def name_spaces(reference: Reference) -> list[dict[str, Any]]:
    """The names beside all functions of the model's own code, in whatever files these are."""
    return list({id(call.space): call.space for way in reference.ways for call in inside(way)}.values())

"""Latency of networks against one another, interleaved in one run: what else the machine does meets all of them."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import fx, nn

from ..calibration import processes
from ..rewriting.module import reuse_memory
from ..tracing.calls import Call, map_tensors
from ..tracing.precision import callers_precision
from ..tracing.state import restored_state, wait_for

ROUNDS = 40
SECONDS = 1.0
FEWEST = 5
FEW, LONG = 2, 2.0
"""Rounds that are enough where they have taken this many times the seconds: long runs even out by themselves."""
QUIET = 0.02
"""Three times of a network that lie so close together are its least: nothing else held the machine up."""


def fastest(
    networks: Sequence[nn.Module], call: Call, *, rounds: int = ROUNDS, seconds: float | None = None
) -> list[float]:
    """The least time of each network on one input, in seconds, of some rounds through all of them.

    >>> slow, quick = fastest([nn.Linear(512, 512), nn.Identity()], Call((torch.ones(512, 512),), {}))
    >>> slow > quick
    True

    Random state and buffers are afterwards what they were. Of several processes the first measures for all.

    Args:
        networks: in evaluation mode.
        call: what they are given, copies of it.
        rounds: at most. There are fewer where the three least times of each network are the same up to 2 %. The first
            one, which warms up, may be no one's least.
        seconds: no further round is begun after that, if there were five, or after twice that, if there were two;
            None: `SECONDS`.
    """
    return processes.of_first(lambda: _fastest(networks, call, rounds, SECONDS if seconds is None else seconds))


def _fastest(networks: Sequence[nn.Module], call: Call, rounds: int, seconds: float) -> list[float]:
    taken: list[list[float]] = [[] for _ in networks]
    order = random.Random(0)
    with restored_state(), callers_precision(), torch.no_grad(), _buffers_kept(networks):
        begin = time.perf_counter()
        for done in range(rounds):
            past = time.perf_counter() - begin
            if done >= FEWEST and (past > seconds or all(map(_quiet, taken))):
                break
            if done >= FEW and past > LONG * seconds:
                break
            # What ran before leaves its weights in the caches: no network may always come behind the same one.
            for place in order.sample(range(len(networks)), len(networks)):
                own = map_tensors(torch.clone, call)  # some networks write into their inputs
                wait_for(call.device)
                start = time.perf_counter()
                networks[place](*own.args, **own.kwargs)
                wait_for(call.device)
                taken[place].append(time.perf_counter() - start)
    return [min(own) for own in taken]


def _quiet(seconds: Sequence[float]) -> bool:
    least = sorted(seconds)[:3]
    return least[-1] <= least[0] * (1 + QUIET)


def as_used(module: nn.Module) -> nn.Module:
    """A copy of a traced model as it runs where it is used: with its ReLUs in place again. It has the same tensors."""
    own = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    result = copy.deepcopy(module, own)
    if isinstance(result, fx.GraphModule):
        reuse_memory(result)
    return result


@contextmanager
def _buffers_kept(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards the buffers, which some networks write into, hold what they held."""
    buffers = {id(buffer): buffer for network in networks for buffer in network.buffers()}
    kept = [buffer for buffer in buffers.values() if not buffer.is_inference()]  # nothing may write into the others
    values = [(buffer, buffer._version, buffer.clone()) for buffer in kept]
    try:
        yield
    finally:
        for buffer, version, value in values:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)

"""Latency of networks against one another, interleaved in one run: what else the machine does meets all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..calibration import processes
from ..tracing.calls import Call, leaves, map_tensors
from ..tracing.state import restored_state

ROUNDS = 10
SECONDS = 1.0
FEWEST = 3


def fastest(
    networks: Sequence[nn.Module], call: Call, *, rounds: int = ROUNDS, seconds: float = SECONDS
) -> list[float]:
    """The least time of each network on one input, in seconds, of up to `rounds` rounds through all of them.

    >>> slow, quick = fastest([nn.Linear(512, 512), nn.Identity()], Call((torch.ones(512, 512),), {}))
    >>> slow > quick
    True

    Random state and buffers are afterwards what they were. Of several processes the first measures for all.

    Args:
        networks: in evaluation mode.
        call: what they are given, copies of it.
        rounds: at most; the first warms up and does not count.
        seconds: no further round is begun after that, if there were three.
    """
    return processes.of_first(lambda: _fastest(networks, call, rounds, seconds))


def _fastest(networks: Sequence[nn.Module], call: Call, rounds: int, seconds: float) -> list[float]:
    device = next((value.device for value in leaves(call)), None)
    best = [float("inf")] * len(networks)
    with restored_state(), torch.no_grad(), _buffers_kept(networks):
        begin = time.perf_counter()
        for done in range(rounds + 1):
            if done > FEWEST and time.perf_counter() - begin > seconds:
                break
            for place, network in enumerate(networks):
                own = map_tensors(torch.clone, call)  # some networks write into their inputs
                _wait(device)
                start = time.perf_counter()
                network(*own.args, **own.kwargs)
                _wait(device)
                taken = time.perf_counter() - start
                best[place] = min(best[place], taken) if done else best[place]
    return best


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


def _wait(device: torch.device | None) -> None:
    """Until the device has done what it was asked for."""
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)

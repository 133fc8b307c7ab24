"""The state of PyTorch that a run may leave behind when it is broken off half-way, put back."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import TMonitor

_DEVICES = ("cpu", "cuda")


@contextmanager
def restored_state() -> Iterator[None]:
    """Afterwards this thread is in the transforms, modes, autocast regions and gradient mode that it was in before, and
    the default dtype is the same; also if an exception ends the run inside of a `vmap`.

    The random states of the process are put back as well, unless there are other threads, whose numbers those are too.

    >>> with restored_state():
    ...     _ = torch._C._set_grad_enabled(False)
    >>> torch.is_grad_enabled()
    True
    """
    level = torch._C._functorch.maybe_current_level() or 0
    stacks = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    grad, dtype, autocast = torch.is_grad_enabled(), torch.get_default_dtype(), _autocast()
    numbers = _random_states() if _alone() else None
    try:
        yield
    finally:
        while (torch._C._functorch.maybe_current_level() or 0) > level:
            torch._C._functorch.pop_dynamic_layer_stack()
        while torch._C._len_torch_dispatch_stack() > stacks[0]:
            torch._C._pop_torch_dispatch_stack()
        while torch._C._len_torch_function_stack() > stacks[1]:
            torch._C._pop_torch_function_stack()
        torch._C._set_grad_enabled(grad)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        _set_autocast(autocast)
        if numbers is not None and _alone():
            _set_random_states(numbers)


def _alone() -> bool:
    """Whether this is the only thread that may draw random numbers; those of progress displays do not."""
    current = threading.current_thread()
    return all(
        thread is current or isinstance(thread, TMonitor) or getattr(thread, "leaves_random_state", False)
        for thread in threading.enumerate()
    )


def _autocast() -> tuple[Any, ...]:
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    each = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES]
    return nesting, torch.is_autocast_cache_enabled(), each


def _set_autocast(state: tuple[Any, ...]) -> None:
    if _autocast() == state:
        return
    nesting, cached, each = state
    for device, (enabled, dtype) in zip(_DEVICES, each, strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(cached)
    while _autocast()[0] > nesting:
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def seed_python(seed: int) -> None:
    """Seed Python's and NumPy's random numbers, inside of `restored_state`; not where other threads may draw them."""
    if _alone():
        random.seed(seed)
        np.random.seed(seed)


def python_numbers() -> bytes:
    """Where Python's and NumPy's random numbers stand, to be compared."""
    return pickle.dumps((random.getstate(), np.random.get_state()))


def _random_states() -> tuple[Any, ...]:
    return torch.default_generator.get_state(), random.getstate(), np.random.get_state()


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch.default_generator.set_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def wait_for(device: torch.device) -> None:
    """Until a device has done what it was asked for: what is timed is then its work, not the asking."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)

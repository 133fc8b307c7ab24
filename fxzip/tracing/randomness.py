"""Random numbers from generators of one's own: what a model draws in one thread moves no other's.

PyTorch's default generators belong to the process. A run that seeds them and puts their state back afterwards gives
other threads, a training with dropout for instance, numbers that they have had before. So calls that would draw from a
default generator are given another one, and functions such as `torch.manual_seed` mean that one in this thread.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import _pop_mode, _push_mode

from .dispatch_mode import DispatchMode
from .threads import Replacement, ThreadPatch

_SWAP = threading.Lock()
_ACTIVE = threading.local()


class HigherOrderCall(NotImplementedError):
    """A call that takes functions of tensors, such as `torch.cond`: what they compute is not seen."""


class OwnRandomness(DispatchMode):
    """Inside, random calls of this thread draw from generators that start at a seed. `seeded`: someone has set another
    seed since then, or brought a generator.

    >>> with OwnRandomness(0):
    ...     first = torch.rand(3)
    >>> bool((first == torch.rand(3, generator=torch.Generator().manual_seed(0))).all())
    True
    """

    supports_higher_order_operators = True  # so that they are refused by name

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed, self.seeded = seed, False
        self._generators: dict[torch.device, torch.Generator | None] = {}

    def reseed(self, seed: int) -> torch.Generator:
        """What `torch.manual_seed` does, here."""
        self.seed, self.seeded = seed, True
        for generator in self._generators.values():
            if generator is not None:
                generator.manual_seed(seed)
        return self.cpu

    @property
    def cpu(self) -> torch.Generator:
        """The generator in place of `torch.default_generator`."""
        generator = self.generator(torch.device("cpu"))
        assert generator is not None
        return generator

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The generator of a device; None if it has none ("meta")."""
        device = _numbered(device)
        if device not in self._generators:
            try:
                self._generators[device] = torch.Generator(device=device).manual_seed(self.seed)
            except RuntimeError:
                self._generators[device] = None
        return self._generators[device]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            raise HigherOrderCall(func.name())
        if not draws(func, args, kwargs):
            return func(*args, **kwargs)
        generator = self.generator(_device(args, kwargs))
        if generator is None:
            return func(*args, **kwargs)
        seeded = _with_generator(func)
        if seeded is None:
            return _swapped(generator, func, args, kwargs)
        position = [argument.name for argument in seeded._schema.arguments].index("generator")
        if position < len(args):
            given, args = args[position], (*args[:position], None, *args[position + 1 :])
        else:
            given = kwargs.get("generator")
        own = generator if given is None or _is_default(given) else given
        self.seeded = self.seeded or own is given
        if position < len(args):
            return seeded(*args[:position], own, *args[position + 1 :], **kwargs)
        return seeded(*args, **{**kwargs, "generator": own})


@contextmanager
def unwatched() -> Iterator[None]:
    """Inside, no dispatch mode of this thread sees a call: for what is computed beside a network that is being watched.
    To look at every small product of labels takes longer than the product.

    PyTorch's `_disable_current_modes` is not for this: it also takes modes off a stack that all threads share, on which
    an export in another thread relies.

    >>> with OwnRandomness(0), unwatched():
    ...     torch._C._len_torch_dispatch_stack()
    0
    """
    modes = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


def draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an ATen call takes random numbers."""
    return _is_random(func) and not _draws_nothing(func, args, kwargs)


@functools.cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


def _draws_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Attention without dropout is tagged as random all the same."""
    if "attention" not in func._schema.name:
        return False
    names = [argument.name for argument in func._schema.arguments]
    return not dict(zip(names, args, strict=False)).get("dropout_p", kwargs.get("dropout_p", 0.0))


@functools.cache
def _with_generator(func: Any) -> Any:
    """The overload that takes a generator and else the same arguments; None if there is none."""
    names = [argument.name for argument in func._schema.arguments]
    if "generator" in names:
        return func
    packet = func.overloadpacket
    for name in packet.overloads():
        other = getattr(packet, name)
        found = [argument.name for argument in other._schema.arguments]
        if "generator" in found and [n for n in found if n != "generator"] == names:
            types = {argument.name: str(argument.type) for argument in other._schema.arguments}
            if all(types[argument.name] == str(argument.type) for argument in func._schema.arguments):
                return other
    return None


def _device(args: Any, kwargs: Any) -> torch.device:
    given = kwargs.get("device")
    if given is not None:
        return torch.device(given)
    tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _numbered(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _default(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


def _is_default(generator: torch.Generator) -> bool:
    return generator is _default(_numbered(generator.device))


def _swapped(own: torch.Generator, func: Any, args: Any, kwargs: Any) -> Any:
    """The call with the state of the default generator exchanged: for calls that take no generator."""
    default = _default(own.device)
    with _SWAP:
        before = default.get_state()
        default.set_state(own.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            own.set_state(default.get_state())
            default.set_state(before)


def seeding() -> list[Replacement]:
    """What the functions that seed PyTorch, or ask for its random state, are in a thread with `own_randomness`."""

    def cpu(new: Any = None) -> Any:
        return _current().cpu.get_state() if new is None else _current().cpu.set_state(new)

    def cuda(device: Any = "cuda") -> torch.Generator:
        place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        generator = _current().generator(place)
        assert generator is not None
        return generator

    def seed_all(seed: int) -> torch.Generator:
        return _current().reseed(int(seed))

    def seed_anew() -> int:
        return _current().reseed(torch.Generator().seed()).initial_seed()

    table: list[Replacement] = []
    for owner in (torch, torch.random):
        table += [
            (owner, "manual_seed", seed_all),
            (owner, "seed", seed_anew),
            (owner, "initial_seed", lambda: _current().cpu.initial_seed()),
            (owner, "get_rng_state", lambda: cpu()),
            (owner, "set_rng_state", lambda new_state: cpu(new_state)),
        ]
    if torch.cuda.is_available():
        for place in (torch.cuda, torch.cuda.random):
            table += [
                (place, "manual_seed", lambda seed: cuda().manual_seed(int(seed))),
                (place, "manual_seed_all", lambda seed: cuda().manual_seed(int(seed))),
                (place, "get_rng_state", lambda device="cuda": cuda(device).get_state()),
                (place, "set_rng_state", lambda new_state, device="cuda": cuda(device).set_state(new_state)),
            ]
    return table


def _current() -> OwnRandomness:
    return _ACTIVE.stack[-1]  # type: ignore[no-any-return]


_SEEDS = ThreadPatch(seeding)


@contextmanager
def own_randomness(seed: int = 0) -> Iterator[OwnRandomness]:
    """Random calls draw from own generators, and the functions that seed them seed those.

    >>> before = torch.get_rng_state()
    >>> with own_randomness(1):
    ...     first = torch.rand(2)
    ...     _ = torch.manual_seed(1)
    ...     second = torch.rand(2)
    >>> bool((first == second).all()), bool((torch.get_rng_state() == before).all())
    (True, True)
    """
    stack = _ACTIVE.__dict__.setdefault("stack", [])
    own = OwnRandomness(seed)
    stack.append(own)
    try:
        with _SEEDS.inside(), own:
            yield own
    finally:
        stack.pop()

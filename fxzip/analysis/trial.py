"""A program on random parameters, before and after a relabelling.

It runs in float64, because deep random networks amplify rounding and a wrong rule may have a small effect; on a batch
of at most 2; and not on the model's own parameters, because a branch that a checkpoint scales by 1e-6 would hide a
wrong rule.

Most of the time goes into touching memory for the first time, so parameters are kept once as narrow random numbers and
once as the program runs on them, and the latter are written over for every relabelling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..containers import leaves
from ..inputs import Call, batch_size, map_tensors, with_batch
from ..tracing import Program, flat_inputs, quiet_execution
from .relabel import relabelled
from .spaces import FeatureSpaces

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
"""Largest movement of the output that counts as rounding, relative to its largest magnitude."""

_DOUBLE_LIMIT = 1 << 28  # parameters above this number are checked in their own dtype: 2 GiB a copy in float64


class Trial:
    """A program with random parameters, and what it gives before any relabelling."""

    def __init__(self, program: Program, seed: int, dtype: torch.dtype | None) -> None:
        self.program = program
        self._room: dict[str, Tensor] = {}
        parameters = list(program.module.parameters())
        own = next((p.dtype for p in parameters if p.dtype in TOLERANCE), torch.float32)
        small = sum(p.numel() for p in parameters) <= _DOUBLE_LIMIT
        attempts = [dtype] if dtype is not None else [torch.float64, own] if small else [own]
        calls = [program.call]
        size = batch_size(program.call)
        if size is not None and size > 2 and program.batch_axes:
            calls.insert(0, with_batch(program.call, 2))
        last = len(attempts) * len(calls) - 1
        for number, (self.dtype, self.call) in enumerate((d, c) for d in attempts for c in calls):
            try:
                self._prepare(seed)
                break
            except Exception:  # a device without float64, a call that insists on another dtype or batch size
                if number == last:
                    raise
        self.tolerance = TOLERANCE[self.dtype]

    def _prepare(self, seed: int, gain: float = 1.0) -> None:
        self._set(sane_values(self.program, seed, gain))
        if not _finite(self.expected):
            self._set(_tensors(self.program))

    def _set(self, values: Mapping[str, Tensor]) -> None:
        self.values = {name: value.detach() for name, value in values.items()}
        floats = {name: value for name, value in self.values.items() if value.is_floating_point()}
        if any(name not in self._room or self._room[name].dtype != self.dtype for name in floats):
            self._room = {name: torch.empty_like(value, dtype=self.dtype) for name, value in floats.items()}
        wide = {name: self._room[name].copy_(value) for name, value in floats.items()}
        self.expected = run_with(self.program, self.values | wide, self.call, self.dtype)

    def error(self, spaces: FeatureSpaces, perms: list[Tensor]) -> float:
        """How far the output moves, relative to its largest magnitude."""
        values = relabelled(self.values, spaces, perms, self._room)
        return relative_difference(self.expected, run_with(self.program, values, self.call, self.dtype))

    def calm(self, seed: int) -> None:
        """Make sure that rounding alone moves the output by less than a tenth of the tolerance."""
        for gain in (0.5, 0.25, None):
            generator = torch.Generator().manual_seed(seed)
            values = {k: _nudged(_cast(v, self.dtype), generator) for k, v in self.values.items()}
            moved = relative_difference(self.expected, run_with(self.program, values, self.call, self.dtype))
            if moved <= self.tolerance / 10:
                return
            self._prepare(seed, gain) if gain is not None else self._set(_tensors(self.program))


def _nudged(value: Tensor, generator: torch.Generator) -> Tensor:
    """Every other element off by four units of rounding."""
    if not value.is_floating_point():
        return value
    nudges = torch.randint(0, 2, value.shape, generator=generator).to(value.device, value.dtype)
    return value * (1 + 4 * torch.finfo(value.dtype).eps * nudges)


def _tensors(program: Program) -> dict[str, Tensor]:
    return {**dict(program.module.named_parameters()), **dict(program.module.named_buffers())}


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype) if value.is_floating_point() else value


def sane_values(program: Program, seed: int, gain: float = 1.0) -> dict[str, Tensor]:
    """Random parameters under which signals neither die nor explode: scales in [0.5, 1.5], weights of the given gain.

    Integers and buffers outside of the state dict keep their values.
    """
    parameters = dict(program.module.named_parameters())
    values = _tensors(program)
    generator = np.random.Generator(np.random.SFC64(seed))  # twice as fast as torch's
    for name, tensor in values.items():
        if not tensor.is_floating_point() or (name not in parameters and name not in program.persistent):
            continue
        noise = torch.empty(tensor.shape)
        generator.random(out=noise.numpy(), dtype=np.float32)
        if tensor.ndim < 2:
            noise += 0.5
        else:
            noise.sub_(0.5).mul_(gain * (12 / max(tensor[0].numel(), 1)) ** 0.5)
        values[name] = noise.to(tensor.device)
    return values


def run_with(program: Program, values: Mapping[str, Tensor], call: Call, dtype: torch.dtype) -> Any:
    """The program's output with other parameters, in `dtype` throughout if that is float64."""
    buffers = dict(program.module.named_buffers())
    own = {k: _cast(v, dtype) for k, v in values.items()}
    own |= {k: v.clone() for k, v in own.items() if k in buffers}
    inputs = flat_inputs(program.module, map_tensors(lambda t: _cast(t, dtype).clone(), call))
    with quiet_execution(), _in_double() if dtype == torch.float64 else nullcontext():
        torch.manual_seed(0)
        return torch.func.functional_call(program.module, own, tuple(inputs))


@contextmanager
def _in_double() -> Iterator[None]:
    """Default dtype float64, and what a model writes in another floating dtype is float64 all the same."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _DoubleMode():
            yield
    finally:
        torch.set_default_dtype(before)


_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


class _DoubleMode(TorchDispatchMode):
    """Replaces narrow floating dtypes among the arguments of every call, and widens what comes in narrow."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.view.dtype:  # reinterprets memory
            return func(*args, **(kwargs or {}))
        return func(*pytree.tree_map(_wider, args), **pytree.tree_map(_wider, kwargs or {}))


def _wider(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(_WIDER[value.dtype]) if value.dtype in _WIDER else value
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _finite(output: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in leaves(output))


def relative_difference(expected: Any, found: Any) -> float:
    """max |expected - found| / max |expected|, the worst over all tensors of two equal structures.

    inf where integers differ, or where one is not finite and the other is not the same.
    """
    pairs = zip(leaves(expected), leaves(found), strict=True)
    return max((_tensor_difference(x, y) for x, y in pairs if x.numel()), default=0.0)


def _tensor_difference(x: Tensor, y: Tensor) -> float:
    if not (x.is_floating_point() or x.is_complex()):
        return 0.0 if torch.equal(x, y) else math.inf
    odd = ~x.isfinite()
    if bool(odd.any()) and not torch.equal(torch.nan_to_num(x[odd]), torch.nan_to_num(y[odd])):
        return math.inf
    scale = float(torch.where(odd, 0, x).detach().abs().max()) or 1.0
    gap = float(torch.where(odd, 0, x - y).detach().abs().max()) / scale
    return gap if math.isfinite(gap) else math.inf

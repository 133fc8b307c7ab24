"""The self-check: relabel everything that may move, on random parameters, and see whether the output moves.

It runs in float64, because deep random networks amplify rounding and a wrong rule may have a small effect; on a batch
of at most 2; and not on the model's own parameters, because a branch that a checkpoint scales by 1e-6 would hide a
wrong rule.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import PinnedSpaceWarning, SelfCheckError
from ..inputs import Call, batch_size, map_tensors, with_batch
from ..tracing import Program, flat_inputs, quiet_execution
from .labelling import Labelling
from .relabel import random_relabelling, relabelled
from .spaces import FeatureSpaces, solve

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
"""Largest movement of the output that counts as rounding, relative to its largest magnitude."""

_DOUBLE_LIMIT = 1 << 28  # parameters above this number are checked in their own dtype: 2 GiB a copy in float64
_ROUNDS, _CULPRITS = 3, 32


def self_check(
    labelling: Labelling, *, seed: int = 0, dtype: torch.dtype | None = None
) -> tuple[FeatureSpaces, float, dict[int, str]]:
    """Relabel everything that may move; the output must stay. Returns spaces, relative error, and pins it had to add.

    Two forward passes if all is well. Else the culprits are found by bisection and pinned, each with a
    `PinnedSpaceWarning`; if that does not cure it, `SelfCheckError`.
    """
    trial = _Trial(labelling.program, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    pinned: dict[int, str] = {}
    worst, spaces = 0.0, solve(labelling)
    for attempt in range(_ROUNDS):
        perms = random_relabelling(spaces, generator)
        worst = trial.error(spaces, perms)
        if worst > trial.tolerance and not attempt:
            trial.calm(seed)
            worst = trial.error(spaces, perms)
        if worst <= trial.tolerance:
            return spaces, worst, pinned
        found = _culprits(trial, spaces, perms)
        if not found:
            break
        pinned |= found
        spaces = solve(labelling, pinned=pinned)
    raise SelfCheckError(
        f"Relabelling free feature spaces must leave the output as it is; it moved by {worst:.1e} (relative), and "
        "pinning the spaces at fault did not cure it. Please report the model; `verify=False` skips the check."
    )


def _culprits(trial: _Trial, spaces: FeatureSpaces, perms: list[Tensor]) -> dict[int, str]:
    """Labels to pin, with the reason: one by one, the space (or tie group) that ends the shortest failing prefix."""
    movers: dict[tuple[bool, int], list[int]] = {}
    for number, space in enumerate(spaces.spaces):
        movers.setdefault((space.tie is None, number if space.tie is None else space.tie), []).append(number)
    rest = list(movers.values())

    def error(chosen: Sequence[list[int]]) -> float:
        moving = {number for mover in chosen for number in mover}
        return trial.error(spaces, [p if i in moving else torch.arange(len(p)) for i, p in enumerate(perms)])

    pinned: dict[int, str] = {}
    for _ in range(_CULPRITS):
        moved = error(rest)
        if moved <= trial.tolerance:
            return pinned
        low, high = 0, len(rest)  # moving the first `low` passes, moving the first `high` fails
        while high - low > 1:
            middle = (low + high) // 2
            found = error(rest[:middle])
            low, high, moved = (middle, high, moved) if found <= trial.tolerance else (low, middle, found)
        if not rest:
            return {}
        culprit = rest.pop(high - 1)
        why = f"relabelling it moved the output by {moved:.1e}"
        _warn([f"`{spaces.spaces[n].name}` ({spaces.spaces[n].size} features)" for n in culprit], why)
        members = torch.isin(spaces.klass, torch.cat([spaces.spaces[n].classes for n in culprit]))
        pinned |= dict.fromkeys(members.nonzero().flatten().tolist(), why)
    return {}


def _warn(names: list[str], why: str) -> None:
    what = f"The space of {names[0]}" if len(names) == 1 else f"The spaces of {', '.join(names)}, tied blockwise,"
    warnings.warn(
        f"{what} failed the self-check: {why}. Its features are pinned: they are not merged.",
        PinnedSpaceWarning,
        stacklevel=4,
    )


class _Trial:
    """A program with random parameters, and what it gives before any relabelling."""

    def __init__(self, program: Program, seed: int, dtype: torch.dtype | None) -> None:
        self.program = program
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
        self.values = dict(values)  # as narrow as they come: relabelling them in float64 takes several times as long
        self.expected = run_with(self.program, self.values, self.call, self.dtype)

    def error(self, spaces: FeatureSpaces, perms: list[Tensor]) -> float:
        values = relabelled(self.values, spaces, perms)
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
    values: dict[str, Tensor] = {}
    generator = np.random.Generator(np.random.SFC64(seed))  # twice as fast as torch's
    for name, tensor in _tensors(program).items():
        if not tensor.is_floating_point() or (name not in parameters and name not in program.persistent):
            values[name] = tensor
            continue
        noise = torch.from_numpy(np.asarray(generator.random(tensor.shape, np.float32)))
        if tensor.ndim < 2:
            noise += 0.5
        else:
            noise = noise.sub_(0.5).mul_(gain * (12 / max(tensor[0].numel(), 1)) ** 0.5)
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
    return all(bool(t.isfinite().all()) for t in pytree.tree_leaves(output) if isinstance(t, Tensor))


def relative_difference(expected: Any, found: Any) -> float:
    """max |expected - found| / max |expected|, the worst over all tensors of two equal structures.

    inf where integers differ, or where one is not finite and the other is not the same.
    """
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    return max((_tensor_difference(x, y) for x, y in pairs if isinstance(x, Tensor) and x.numel()), default=0.0)


def _tensor_difference(x: Tensor, y: Tensor) -> float:
    if not (x.is_floating_point() or x.is_complex()):
        return 0.0 if torch.equal(x, y) else math.inf
    odd = ~x.isfinite()
    if bool(odd.any()) and not torch.equal(torch.nan_to_num(x[odd]), torch.nan_to_num(y[odd])):
        return math.inf
    scale = float(torch.where(odd, 0, x).detach().abs().max()) or 1.0
    gap = float(torch.where(odd, 0, x - y).detach().abs().max()) / scale
    return gap if math.isfinite(gap) else math.inf

"""A program on random parameters, before and after a relabelling: what it returns, and what its nodes show.

It runs in float64, because deep random networks amplify rounding and a wrong rule may have a small effect; on a batch
of at most 2; and not on the model's own parameters, because a branch that a checkpoint scales by 1e-6 would hide a
wrong rule.

Most of the time goes into touching memory for the first time, so parameters are kept once as narrow random numbers and
once as the program runs on them, and the latter are written over for every relabelling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..tracing import Program, flat_inputs, quiet_execution
from ..tracing.aten_calls import run
from ..tracing.calls import Call, batch_size, map_tensors, with_batch
from ..tracing.containers import leaves
from ..tracing.dispatch_mode import DispatchMode
from .labelling import Labelling
from .relabelling import Movement, relabelled
from .sightings import Sightings, Watcher, departures, relative_difference, tensor_difference, unmoved, watched
from .spaces import FeatureSpaces
from .stillness import Still

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
"""Largest movement of the output that counts as rounding, relative to its largest magnitude."""

_DOUBLE_LIMIT = 1 << 28  # parameters above this number are checked in their own dtype: 2 GiB a copy in float64


class Trial:
    """A program with random parameters, and what it gives before any relabelling."""

    def __init__(
        self, program: Program, seed: int, dtype: torch.dtype | None, labelling: Labelling | None = None,
        rows: int = 2,
    ) -> None:  # fmt: skip
        self.program, self.labelling = program, labelling
        self._watched = {} if labelling is None else watched(labelling)
        self.seen: Sightings = {}
        self.restless: frozenset[str] = frozenset()  # nodes whose values move by rounding alone
        self.random = True  # else the parameters are the program's own
        self._room: dict[str, Tensor] = {}
        parameters = list(program.module.parameters())
        own = next((p.dtype for p in parameters if p.dtype in TOLERANCE), torch.float32)
        small = sum(p.numel() for p in parameters) <= _DOUBLE_LIMIT
        attempts = [dtype] if dtype is not None else [torch.float64, own] if small else [own]
        calls = [program.call]
        size = batch_size(program.call)
        if size is not None and size != rows and (size > rows or rows > 2) and program.batch_axes:
            calls.insert(0, with_batch(program.call, rows))
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
        values = sane_values(self.program, seed, gain)
        self._set(values)
        if not _finite(self.expected):
            shown = self._finite_nodes()
            self._set(tensors_of(self.program), random=False)
            if not _finite(self.expected) and self._finite_nodes() <= shown:
                self._set(values)

    def _finite_nodes(self) -> int:
        return sum(_finite(value) for value in self.seen.values())

    def _set(self, values: Mapping[str, Tensor], *, random: bool = True) -> None:
        self.values = {name: value.detach() for name, value in values.items()}
        self.random = random
        self._make_room()
        wide = {name: room.copy_(self.values[name]) for name, room in self._room.items()}
        self.expected, self.seen = self._run(self.values | wide)

    def _make_room(self) -> None:
        """Memory for parameters in the dtype that the program runs in."""
        floats = {name: value for name, value in self.values.items() if is_inexact(value)}
        wide = {name: _like(value, self.dtype) for name, value in floats.items()}
        if any(name not in self._room or self._room[name].dtype != dtype for name, dtype in wide.items()):
            self._room = {name: torch.empty_like(floats[name], dtype=dtype) for name, dtype in wide.items()}

    def _run(self, values: Mapping[str, Tensor]) -> tuple[Any, Sightings]:
        """What the program returns, and what its nodes show."""
        if self.labelling is None:
            return run_with(self.program, values, self.call, self.dtype), {}
        watcher = Watcher(self._watched)
        return run_with(self.program, values, self.call, self.dtype, watcher), watcher.seen

    def error(self, spaces: FeatureSpaces, perms: Sequence[Tensor]) -> float:
        """How far the output moves, or the value of a node from where it has to go, relative to its largest
        magnitude."""
        return self.departure(spaces, perms)[0]

    def departure(
        self, spaces: FeatureSpaces, perms: Sequence[Tensor], but: Collection[tuple[str, int]] = ()
    ) -> tuple[float, str]:
        """The same, and what it is that moves: the output, else the first node. `but` as in `relabelled`."""
        self._make_room()
        output, seen = self._run(relabelled(self.values, spaces, perms, self._room, but))
        moved = relative_difference(self.expected, output)
        if moved > self.tolerance or self.labelling is None:
            return moved, "the output"
        for node, gap in departures(self.seen, seen, self.labelling, Movement(spaces, perms)):
            if gap > self.tolerance and node not in self.restless:
                return gap, f"the value of node `{node}`"
        return moved, "the output"

    def unmoved(self, spaces: FeatureSpaces, perms: Sequence[Tensor]) -> set[int]:
        """Spaces that a relabelling does not visibly move at each node which carries them."""
        return set() if self.labelling is None else unmoved(self.seen, self.labelling, spaces, Movement(spaces, perms))

    def vary(self, seed: int, gain: float) -> bool:
        """Other random parameters, of both signs; whether the program's output is finite on them."""
        self._set(sane_values(self.program, seed, gain, signed=True))
        self.restless = frozenset()
        return _finite(self.expected)

    def rest(self) -> None:
        """Give back the room for relabelled parameters, until it is needed again."""
        self._room = {}

    def calm(self, seed: int) -> None:
        """Make sure that rounding alone moves the output by less than a tenth of the tolerance, and find the nodes
        that it moves by more all the same."""
        for gain in (0.5, 0.25, 0.0, None):
            generator = torch.Generator().manual_seed(seed)
            values = {k: nudged(cast(v, self.dtype), generator) for k, v in self.values.items()}
            output, seen = self._run(values)
            still = [(node, tensor_difference(value, seen[node])) for node, value in self.seen.items() if node in seen]
            self.restless = frozenset(node for node, moved in still if moved > self.tolerance / 10)
            if gain is None or relative_difference(self.expected, output) <= self.tolerance / 10:
                return
            self._prepare(seed, gain) if gain else self._set(tensors_of(self.program), random=False)


def nudged(value: Tensor, generator: torch.Generator) -> Tensor:
    """Every other element off by four units of rounding."""
    if not is_inexact(value):
        return value
    nudges = torch.randint(0, 2, value.shape, generator=generator, device="cpu").to(value.device, value.dtype)
    return value * (1 + 4 * torch.finfo(value.dtype).eps * nudges)


def tensors_of(program: Program) -> dict[str, Tensor]:
    """Parameters and buffers of a program, by name."""
    return {**dict(program.module.named_parameters()), **dict(program.module.named_buffers())}


def is_inexact(value: Tensor) -> bool:
    """Whether a tensor holds real or complex numbers, not integers or truth values, and one at each place."""
    return (value.is_floating_point() or value.is_complex()) and value.layout == torch.strided


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A value in a real dtype, a complex one in the complex dtype of that precision; integers as they are.

    >>> cast(torch.ones(1, dtype=torch.complex64), torch.float64).dtype
    torch.complex128
    """
    return value.detach().to(_like(value, dtype)) if is_inexact(value) else value


def _like(value: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that an inexact value has where real ones are of `dtype`."""
    if not value.is_complex():
        return dtype
    return torch.complex128 if dtype == torch.float64 else value.dtype


def sane_values(
    program: Program, seed: int, gain: float = 1.0, *, signed: bool = False, but: Collection[str] = ()
) -> dict[str, Tensor]:
    """Random parameters under which signals neither die nor explode: scales in [0.5, 1.5], weights of the given gain.

    Integers, buffers outside of the state dict, and what is in `but` keep their values. `signed`: every other scale is
    negative.
    """
    parameters = dict(program.module.named_parameters())
    values = tensors_of(program)
    generator = np.random.Generator(np.random.SFC64(seed))  # twice as fast as torch's
    for name, tensor in values.items():
        if name in but or not is_inexact(tensor) or not (name in parameters or name in program.persistent):
            continue
        parts = (2,) if tensor.is_complex() else ()
        noise = torch.empty((*tensor.shape, *parts), dtype=torch.float32, device="cpu")
        generator.random(out=noise.numpy(), dtype=np.float32)
        if tensor.ndim < 2:
            noise += 0.5
            if signed and name in parameters and noise.ndim:
                noise[1::2].neg_()
        else:
            noise.sub_(0.5).mul_(gain * (12 / max(math.prod(tensor.shape[1:]), 1)) ** 0.5)
        noise.view(torch.int32).bitwise_and_(-16)  # of 19 binary digits, so that small multiples are exact
        values[name] = (torch.view_as_complex(noise) if parts else noise).to(tensor.device)
    return values


Visit = Callable[[fx.Node, Any], Any]
"""What is done with the value of each node; gives the value to go on with."""


def run_with(
    program: Program, values: Mapping[str, Tensor], call: Call, dtype: torch.dtype, visit: Visit | None = None,
    graph: fx.Graph | None = None,
) -> Any:  # fmt: skip
    """The program's output with other parameters, in `dtype` throughout if that is float64, and without noise.

    With `visit` it runs node by node, and each value is what `visit` makes of it; along another `graph`, if given.
    """
    buffers = dict(program.module.named_buffers())
    own = {k: cast(v, dtype) for k, v in values.items()}
    own |= {k: v.clone() for k, v in own.items() if k in buffers}
    inputs = flat_inputs(program.module, map_tensors(lambda t: cast(t, dtype).clone(), call))
    module: nn.Module = program.module
    if visit is not None:
        module, own = _Visited(program.module, visit, graph), {f"module.{name}": value for name, value in own.items()}
    with quiet_execution(), DoubleMode() if dtype == torch.float64 else nullcontext(), Still():
        return torch.func.functional_call(module, own, tuple(inputs))


class _Visited(nn.Module):
    """A graph module that runs node by node."""

    def __init__(self, module: fx.GraphModule, visit: Visit, graph: fx.Graph | None) -> None:
        super().__init__()
        self.module, self.visit, self.graph = module, visit, graph

    def forward(self, *inputs: Any) -> Any:
        return run(self.module, inputs, on_node=self.visit, graph=self.graph)


_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


class DoubleMode(DispatchMode):
    """Everything in float64, in this thread: replaces narrow floating dtypes among the arguments of every call, widens
    what comes in narrow, and lets calls without a dtype make float64. Not the default dtype: that is every thread's.

    >>> with DoubleMode():
    ...     print(torch.zeros(2).dtype, (torch.arange(2) / 2).dtype, torch.full((1,), 2).dtype)
    torch.float64 torch.float64 torch.int64
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.view.dtype:  # reinterprets memory
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(_wider, args), pytree.tree_map(_wider, kwargs or {})
        out = func(*args, **kwargs)
        made = out.dtype if isinstance(out, Tensor) else None
        if made not in _WIDER or func._schema.is_mutable:
            return out
        if any(argument.name == "dtype" for argument in func._schema.arguments) and kwargs.get("dtype") is None:
            return func(*args, **{**kwargs, "dtype": _WIDER[made]})
        return _wider(out)


def _wider(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(_WIDER[value.dtype]) if value.dtype in _WIDER else value
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _finite(output: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in leaves(output))

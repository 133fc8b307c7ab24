"""How models are called: sample inputs, and fresh inputs made of them.

A model is called as `model(*call.args, **call.kwargs)`. The sample input fixes the form of the call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from . import containers
from .python_numbers import plain_number


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model.

    >>> Call((torch.ones(2, 3),), {}).args[0].shape
    torch.Size([2, 3])
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where the first tensor lies; the CPU if there is none."""
        return next((value.device for value in leaves(self)), torch.device("cpu"))


@dataclass(frozen=True)
class JointCall(Call):
    """The call of several models, each of which takes inputs of its own: the arguments of all, one after another.

    >>> joint = JointCall.of([Call((torch.ones(2, 3),), {}), Call((), {"ids": torch.ones(2, 5)})])
    >>> [value.shape[1] for value in joint.args]
    [3, 5]
    """

    parts: tuple[Call, ...] = ()

    @classmethod
    def of(cls, parts: Iterable[Call]) -> JointCall:
        """The parts' positional arguments and then their keyword arguments, part by part."""
        parts = tuple(parts)
        return cls(tuple(value for part in parts for value in (*part.args, *part.kwargs.values())), {}, parts)


def leaves(value: Any) -> list[Tensor]:
    """All tensors in a nested structure, in order.

    >>> len(leaves({"a": torch.ones(1), "b": [torch.ones(2), 3]}))
    2
    """
    return containers.leaves((value.args, value.kwargs) if isinstance(value, Call) else value)


def map_tensors(function: Any, call: Call) -> Call:
    """The call with `function` applied to each of its tensors.

    >>> map_tensors(lambda t: t + 1, Call((torch.zeros(1),), {})).args
    (tensor([1.]),)
    """
    return Call(*containers.map_leaves(function, (call.args, call.kwargs)))


def moved(call: Call, like: Call) -> Call:
    """The call with each tensor on the device of its twin in another call of the same form.

    From pinned memory it goes to a device beside what host and device do meanwhile. The host waits for what comes to
    it: it would read what has not arrived.

    >>> moved(Call((torch.ones(2),), {}), Call((torch.ones(4, device="meta"),), {})).device
    device(type='meta')
    """
    if isinstance(call, JointCall) and isinstance(like, JointCall):
        return JointCall.of(moved(*pair) for pair in zip(call.parts, like.parts, strict=True))
    devices = iter([value.device for value in leaves(like)])

    def to_next(value: Tensor) -> Tensor:
        device = next(devices)
        return value.to(device, non_blocking=device.type != "cpu")

    return map_tensors(to_next, call)


def select_rows(call: Call, chosen: Tensor | slice) -> Call:
    """Some inputs of a batch: rows of every tensor that has the batch size.

    >>> select_rows(Call((torch.ones(4, 2), torch.ones(3)), {}), slice(1)).args[0].shape
    torch.Size([1, 2])
    """
    if isinstance(call, JointCall):
        return JointCall.of(select_rows(part, chosen) for part in call.parts)
    size = batch_size(call)

    def taken(value: Tensor) -> Tensor:
        if not value.ndim or len(value) != size:
            return value
        return value[chosen.to(value.device)] if isinstance(chosen, Tensor) else value[chosen]

    return map_tensors(taken, call)


def twice(call: Call) -> Call:
    """A call of a single input with that input twice, in memory as it was.

    >>> found = twice(Call((torch.ones(4, 3, 1).permute(2, 1, 0), torch.ones(3)), {}))
    >>> [value.shape for value in found.args], found.args[0].stride()
    ([torch.Size([2, 3, 4]), torch.Size([3])], (3, 1, 6))
    """
    if isinstance(call, JointCall):
        return JointCall.of(map(twice, call.parts))

    def doubled(value: Tensor) -> Tensor:
        if not value.ndim or len(value) != 1 or value.layout != torch.strided:
            return value
        return in_memory_as(torch.cat([value, value]), value)

    return map_tensors(doubled, call)


def in_memory_as(value: Tensor, like: Tensor) -> Tensor:
    """The value with its axes in the order in which another one's lie in memory.

    >>> in_memory_as(torch.ones(5, 4), torch.ones(2, 3).T).stride()
    (1, 5)
    """
    order = sorted(range(like.ndim), key=lambda axis: (-like.stride()[axis], axis))
    return value.permute(order).contiguous().permute([order.index(axis) for axis in range(like.ndim)])


def as_call(sample_input: Any) -> Call:
    """The call that a sample input stands for: a tensor is the only argument, a tuple or list the positional ones, a
    dict the keyword arguments.

    >>> as_call({"ids": torch.zeros(1, 4)}).kwargs.keys()
    dict_keys(['ids'])
    """
    if isinstance(sample_input, Call):
        call = sample_input
    elif isinstance(sample_input, Tensor):
        call = Call((sample_input,), {})
    elif isinstance(sample_input, Mapping):
        call = Call((), {str(key): value for key, value in sample_input.items()})
    elif isinstance(sample_input, (tuple, list)):
        call = Call(tuple(sample_input), {})
    elif containers.leaves(sample_input):
        call = Call((sample_input,), {})
    else:
        raise InputError(
            "`sample_input` must be a tensor, or a tuple, list or dict with tensors; found "
            f"`{type(sample_input).__name__}`. "
            "Pass one batch of what the models take, e.g. `torch.randn(1, 3, 32, 32)`."
        )
    if call is not sample_input:
        kwargs = {key: plain_number(value) for key, value in call.kwargs.items()}
        call = Call(tuple(map(plain_number, call.args)), kwargs)
    if any(value.is_nested for value in leaves(call)):
        raise InputError(
            "Inputs must be dense tensors; `sample_input` holds one that is nested. Pass it padded, "
            "`to_padded_tensor(0.0)`, with a mask of what is padding."
        )
    if not leaves(call):
        raise InputError(
            f"`sample_input` must hold at least one tensor; found a `{type(sample_input).__name__}` with none. "
            "Pass one batch of what the models take, e.g. `torch.randn(1, 3, 32, 32)`."
        )
    if batch_size(call) == 0:
        raise InputError(
            "`sample_input` must hold at least one input; its batch has size 0. "
            "Pass one batch of what the models take, e.g. `torch.randn(1, 3, 32, 32)`."
        )
    return call


def with_batch(call: Call, n: int, generator: torch.Generator | None = None) -> Call:
    """A fresh call with a batch of `n`, made of the rows of this one.

    Rows are cycled along axis 0 of every tensor that has the batch size of the first one; floats get noise, integers
    and booleans are permuted within their own values, so that they stay valid.

    >>> with_batch(as_call(torch.ones(2, 5)), 3).args[0].shape
    torch.Size([3, 5])
    """
    size = batch_size(call)
    generator = generator or torch.Generator().manual_seed(0)

    def fresh(value: Tensor) -> Tensor:
        value = value.detach()
        if size is None or value.ndim == 0 or value.shape[0] != size:
            return value.clone()
        rows = value[torch.arange(n, device=value.device) % size] if size else value
        if value.is_floating_point() or value.is_complex():
            return rows + _noise(rows, generator)
        if rows.ndim == 1:
            return rows[torch.randperm(len(rows), generator=generator, device="cpu").to(value.device)]
        order = torch.randperm(rows.shape[-1], generator=generator, device="cpu").to(value.device)
        return rows[..., order].contiguous()

    return map_tensors(fresh, call)


def batch_size(call: Call) -> int | None:
    """Size of axis 0 of the first tensor that has axes.

    >>> batch_size(as_call((torch.tensor(0.5), torch.ones(4, 2))))
    4
    """
    return next((int(value.shape[0]) for value in leaves(call) if value.ndim > 0), None)


def _noise(rows: Tensor, generator: torch.Generator) -> Tensor:
    finite = rows[rows.isfinite()].cpu()  # not every device holds float64
    scale = finite.double().abs().pow(2).mean().sqrt().item() if finite.numel() and not rows.is_complex() else 1.0
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64, device="cpu")
    return (0.3 * (scale or 1.0) * noise).to(rows.device, rows.dtype)

"""The rule for calls without a rule: try on random data what relabelling an axis does to the result.

A call f is probed with random operands of the same shapes. If permuting a labelled axis of an operand permutes one
axis of every result likewise, or leaves it as it is, in several trials and to rounding, then that is what f does to
the labels. Axes that only move together (a feature axis and its scale) carry the same features. If any labelled axis
does neither, the probe fails and the call stays a barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ...tracing.randomness import own_randomness
from .axis_labels import AxisLabels, along, varying
from .invocation import Invocation
from .meeting import merged_fields

TRIALS = 3
_TOLERANCE = 1e-9
_LARGEST = 1 << 22  # elements of all operands; above, a probe would take too long
_MOST = 6  # labelled axes; all subsets of them are tried


@dataclass(frozen=True, eq=False)
class _Slot:
    """A labelled axis: field `labels` of operand number `operand` varies along `axis`."""

    operand: int
    axis: int
    labels: Tensor

    @property
    def size(self) -> int:
        return self.labels.shape[self.axis]


def probe(call: Invocation) -> AxisLabels | list[AxisLabels] | None:
    """What a call does to labels, found out by trial; None if it is no relabelling.

    Source: the definition of equivariance, f(πx) = πf(x) or f(πx) = f(x).
    """
    operands = call.operands()
    tensors = list(call.tensors())
    fields = [(i, labels) for i, operand in enumerate(operands) for labels in operand.fields]
    large = sum(t.numel() for t in tensors) > _LARGEST or len(fields) > _MOST
    if large or any(len(varying(labels)) != 1 for _, labels in fields):
        return None

    slots = [_Slot(i, next(iter(varying(labels))), labels) for i, labels in fields]
    found: list[tuple[tuple[_Slot, ...], tuple[int | None, ...]]] = []
    left = list(slots)

    for count in range(1, len(slots) + 1):
        for group in combinations(slots, count):
            if all(slot in left for slot in group) and len({slot.size for slot in group}) == 1:
                axes = _moved(call, tensors, group)
                if axes is not None:
                    found.append((group, axes))
                    left = [slot for slot in left if slot not in group]

    if left:
        return None

    return _fields(call, found)


def _fields(
    call: Invocation, found: Sequence[tuple[tuple[_Slot, ...], tuple[int | None, ...]]]
) -> AxisLabels | list[AxisLabels]:
    """Turn what was found into constraints and the fields of the results."""
    outputs = _outputs(call.out)
    groups: list[list[AxisLabels]] = [[] for _ in outputs]

    for slots, axes in found:
        run = slots[0].labels.reshape(-1)
        for slot in slots[1:]:
            call.store.equal(run, slot.labels.reshape(-1))
        for slot in slots:
            static = call.operands()[slot.operand].static
            call.store.touch("param" if static else "mix", slot.labels)
            if None in axes and len(slots) == 1:
                call.store.touch("extremum", slot.labels)  # a median, say
        for place, (axis, out) in enumerate(zip(axes, outputs, strict=True)):
            if axis is not None:
                groups[place].append((along(run, axis, out.ndim),))

    result = [merged_fields(group) for group in groups]
    return result[0] if isinstance(call.out, Tensor) else result


def _outputs(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [item for item in out if isinstance(item, Tensor)]


def _moved(call: Invocation, tensors: Sequence[Tensor], slots: tuple[_Slot, ...]) -> tuple[int | None, ...] | None:
    """For each result the axis that moves along with `slots` (None: it stays); None altogether if neither holds."""
    answer: tuple[int | None, ...] | None = None
    for trial in range(TRIALS):
        generator = torch.Generator().manual_seed(trial)
        values = [_random(t, generator) for t in tensors]
        order = torch.randperm(slots[0].size, generator=generator, device="cpu")
        moved = list(values)
        for slot in slots:
            moved[slot.operand] = moved[slot.operand].index_select(slot.axis, order.to(values[slot.operand].device))
        before, after = _run(call, values), _run(call, moved)
        if before is None or after is None:
            return None
        axes = [_axis(x, y, order) for x, y in zip(before, after, strict=True)]
        if any(axis == -1 for axis in axes):
            return None
        now = tuple(axes)
        if answer is not None and now != answer:
            return None
        answer = now

    return answer


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random floats in float64; integers and booleans as they are."""
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu").to(tensor.device)


def _run(call: Invocation, values: Sequence[Tensor]) -> list[Tensor] | None:
    """The call's results with other tensors in place of its own, from a fixed seed; None if it cannot run on them."""
    queue = list(values)

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor):
            return queue.pop(0)
        return type(value)(map(swap, value)) if isinstance(value, (list, tuple)) else value

    args = [swap(value) for value in call.args]
    kwargs = {key: swap(value) for key, value in call.kwargs.items()}
    try:
        with own_randomness():
            return _outputs(call.func(*args, **kwargs))
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None


def _axis(before: Tensor, after: Tensor, order: Tensor) -> int | None:
    """The axis of `before` that has been permuted by `order` to give `after`; None: unchanged; -1: neither."""
    if before.shape != after.shape:
        return -1
    if _close(before, after):
        return None
    for axis, size in enumerate(before.shape):
        if size == len(order) and _close(before.index_select(axis, order.to(before.device)), after):
            return axis
    return -1


def _close(a: Tensor, b: Tensor) -> bool:
    if a.layout != torch.strided or b.layout != torch.strided:  # of sparse results nothing is known
        return False
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    if not bool(a.isfinite().all()) or not bool(b.isfinite().all()):
        return False
    return bool((a - b).abs().max() <= _TOLERANCE * a.abs().max().clamp(min=1.0)) if a.numel() else True

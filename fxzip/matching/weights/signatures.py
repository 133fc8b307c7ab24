"""Slices of features in a form that no relabelling of other features changes: sorted.

A feature's slice of a parameter W has other axes. Along those whose features may change places, and for every place on
the rest, its entries are sorted; several such axes one after the other. Rearranging them does not change the result,
and ⟨sorted u, sorted v⟩ ≥ ⟨u, π v⟩ for every rearrangement π.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..problem import Run, Weight


def signature_table(weights: Sequence[Weight], space: int, k: int) -> Tensor:
    """Inner products of the signatures of a space in model 0 and model k, [n_0, n_k] in float64.

    Signatures are taken less their mean in each model, which adds to rows and columns of the table and so changes no
    one-to-one assignment, but leaves the digits to what tells features apart.
    """
    total = torch.zeros((), device="cpu")
    for weight in weights:
        for place, run in enumerate(weight.runs):
            if space in run.slots:
                first, other = (signature(weight, place, space, model) for model in (0, k))
                if first.shape[1] != other.shape[1]:
                    other = F.interpolate(other[:, None], first.shape[1], mode="linear", align_corners=True)[:, 0]
                first, other = first - first.mean(0), other - other.mean(0)
                total = total + (first @ other.T).double().cpu()

    return total


def signature(weight: Weight, place: int, space: int, k: int) -> Tensor:
    """Signatures of the features of a space on one run of one parameter, [n_k, length].

    >>> rows, columns = (Run(axis, {axis: (torch.arange(2)[None],)}, (torch.zeros(0).long(),)) for axis in (0, 1))
    >>> signature(Weight("w", (torch.tensor([[3.0, 1.0], [2.0, 5.0]]),), (rows, columns)), 0, 0, 0)
    tensor([[1., 3.],
            [2., 5.]])
    """
    run, value = weight.runs[place], weight.values[k]
    slots = run.slots[space][k]
    if weight.groups > 1:
        moved = value if place == 0 else columns_first(value, weight.groups)
        moved = _in_order(moved, 1)
    else:
        for other in weight.runs:
            if other is not run:
                value = _sorted(value, other, k)
        moved = value.movedim(run.axis, 0)

    taken = moved.index_select(0, slots.reshape(-1)).reshape(*slots.shape, -1)
    return taken.transpose(0, 1).reshape(slots.shape[1], -1)


def _sorted(value: Tensor, run: Run, k: int) -> Tensor:
    """The value sorted along a run, within each space and occurrence."""
    parts = [
        _in_order(value.index_select(run.axis, places), run.axis) for slots in run.slots.values() for places in slots[k]
    ]
    parts.append(value.index_select(run.axis, run.rest[k]))
    return torch.cat(parts, run.axis)


def _in_order(value: Tensor, axis: int) -> Tensor:
    """The value sorted along an axis; numpy sorts several times faster than torch, which also keeps the order."""
    moved = value.movedim(axis, -1).contiguous()
    return torch.from_numpy(np.sort(moved.cpu().numpy(), axis=-1)).to(value.device).movedim(-1, axis)


def columns_first(value: Tensor, groups: int) -> Tensor:
    """A grouped kernel [O, C / groups, ...] as [C, O / groups, ...]."""
    rows, columns = value.shape[0] // groups, value.shape[1]
    split = value.reshape(groups, rows, columns, *value.shape[2:]).transpose(1, 2)
    return split.reshape(groups * columns, rows, *value.shape[2:])

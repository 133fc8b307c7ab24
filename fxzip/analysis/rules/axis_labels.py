"""Axis labels: which feature each element of a tensor belongs to.

A *label* is an integer that names a feature. The *axis labels* of a tensor are a tuple of fields, one for each kind of
feature in it: a weight has one over its outputs and one over its inputs. A *field* is an int64 tensor with as many axes
as the tensor that says which feature an element belongs to; it has size 1 along the axes where the label does not
change, so a field over the channels of [B, C, H, W] has shape [1, C, 1, 1]. For a field f, A(f) is the set of axes
along which it varies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VOID = 0  # "no feature": padding, the same value everywhere
FIXED = -1  # a place that no relabelling moves

AxisLabels = tuple[Tensor, ...]


def varying(labels: Tensor) -> frozenset[int]:
    """A(f): the axes along which a field varies."""
    return frozenset(axis for axis, size in enumerate(labels.shape) if size > 1)


def compress(labels: Tensor) -> Tensor:
    """The same field with size 1 along every axis where the label does not change.

    >>> compress(torch.tensor([[1, 1], [2, 2]])).shape
    torch.Size([2, 1])
    """
    if not labels.numel():
        return labels

    for axis, size in enumerate(labels.shape):
        if size > 1 and labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
    for axis, size in enumerate(labels.shape):
        if size > 1 and torch.equal(labels.narrow(axis, 1, size - 1), labels.narrow(axis, 0, size - 1)):
            labels = labels.narrow(axis, 0, 1)
    return labels


def all_features(labels: Tensor) -> bool:
    """Whether every place holds a feature, none of them VOID or FIXED; so it is where there is no place at all.

    >>> all_features(torch.tensor([3, 1])), all_features(torch.tensor([3, VOID])), all_features(torch.tensor([]))
    (True, False, True)
    """
    return not labels.numel() or int(labels.min()) > 0


def along(labels: Tensor, axis: int, ndim: int) -> Tensor:
    """A 1-d run of labels laid along one axis of a tensor with `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = labels.numel()
    return labels.reshape(shape)


def occurrences(labels: Tensor) -> Tensor:
    """For each place of a run, how many earlier places hold the same label.

    >>> occurrences(torch.tensor([7, 8, 7, 7]))
    tensor([0, 0, 1, 2])
    """
    order = torch.argsort(labels, stable=True)
    ranked = labels[order]
    start = torch.ones_like(ranked, dtype=torch.bool)
    start[1:] = ranked[1:] != ranked[:-1]
    places = torch.arange(len(ranked), device="cpu")
    first = torch.where(start, places, 0).cummax(0).values if len(ranked) else places
    result = torch.empty_like(places)
    result[order] = places - first

    return result


def joint(a: Tensor, b: Tensor) -> Tensor:
    """Labels of places that two fields share: a feature where either has one, else FIXED before VOID.

    >>> joint(torch.tensor([3, 0, 0, -1]), torch.tensor([4, 5, -1, 6]))
    tensor([ 3,  5, -1,  6])
    """
    return torch.where(a > 0, a, torch.where(b > 0, b, torch.minimum(a, b)))


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor inside a call: its fields, whether it depends on the model's input, and its unlabelled axes.

    `loose` holds the axes along which the values differ while no field varies: positions, batch, fixed tables.
    `learned`: parameters, or buffers of the state dict, went into it. `known`: its values depend on neither input nor
    parameters, so that they may be looked at.
    """

    tensor: Tensor
    fields: AxisLabels
    static: bool
    loose: frozenset[int]
    learned: bool = False
    known: bool = False

    @property
    def ndim(self) -> int:
        return self.tensor.ndim

    def place(self, axes: Sequence[int], ndim: int) -> Operand:
        """The operand seen in a joint space of `ndim` axes, own axis i at `axes[i]`; absent axes have size 1."""
        fields = []
        for labels in self.fields:
            shape = [1] * ndim
            order = sorted(range(self.ndim), key=lambda i: axes[i])
            for i in order:
                shape[axes[i]] = labels.shape[i]
            fields.append(labels.permute(order).reshape(shape))

        loose = frozenset(axes[i] for i in self.loose)
        return Operand(self.tensor, tuple(fields), self.static, loose, self.learned, self.known)

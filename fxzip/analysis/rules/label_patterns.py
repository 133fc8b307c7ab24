"""What the labels of fields say about one another: which places hold the same features, and which lie across others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .axis_labels import varying

_LOOKED_AT = 1 << 14
_SCRAMBLE = -0x61C8864680B583EB  # an odd number without structure


def scrambled(numbers: Tensor) -> Tensor:
    """Hashes, mod 2**64."""
    marks = numbers * _SCRAMBLE
    marks = (marks ^ (marks >> 29)) * _SCRAMBLE
    return marks ^ (marks >> 32)


def same_members(rows: Tensor) -> tuple[Tensor, Tensor]:
    """For rows of labels [n, members] the first of each kind, in order, and for each row its kind; by hashes."""
    if len(rows) == 1:
        return torch.zeros(1, dtype=torch.int64, device="cpu"), torch.zeros(1, dtype=torch.int64, device="cpu")
    marks = scrambled(rows).sum(1)
    found, which = marks.unique(return_inverse=True)
    places = torch.arange(len(rows), device="cpu")
    first = torch.full((len(found),), len(rows), device="cpu").scatter_reduce_(0, which, places, "amin")
    order = first.argsort()
    return first[order], order.argsort()[which]


def across(f: Tensor, g: Tensor) -> bool:
    """Whether along the axes that two fields share neither says what the other has there: (head, feature of a head)."""
    shared = sorted(varying(f) & varying(g))
    if not shared:
        return False
    kinds = []
    for labels in (f, g):
        inner = [axis for axis in range(labels.ndim) if axis not in shared]
        places = math.prod(labels.shape[axis] for axis in shared)
        kinds.append(same_members(labels.permute(*shared, *inner).reshape(places, -1))[1])
    first, second = kinds
    count = int(second.max()) + 1
    return len((first * count + second).unique()) > max(int(first.max()) + 1, count)


def told_apart(labels: Tensor, axes: frozenset[int]) -> bool:
    """Whether no two features of a field lie at the same places along `axes`. Large fields are not looked at."""
    if labels.numel() > _LOOKED_AT:
        return False

    inner = [axis for axis in range(labels.ndim) if axis not in axes]
    count = int(torch.Size([labels.shape[axis] for axis in axes]).numel())
    if count < 2:
        return False

    runs = labels.permute(*sorted(axes), *inner).reshape(count, -1)
    found, which = runs.unique(return_inverse=True)
    pairs = (which * count + torch.arange(count, device="cpu")[:, None]).unique()
    salts = torch.randint(1 << 62, (count,), generator=torch.Generator().manual_seed(0), device="cpu")
    marks = torch.zeros(len(found), dtype=torch.int64, device="cpu").index_add_(
        0, pairs // count, salts[pairs % count]
    )[found > 0]

    return len(marks.unique()) == len(marks)

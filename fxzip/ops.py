"""What a zipped network calls: the operations of its graph.

This module does not move: files name it. What pickled networks name beside operations (`tracing/stored_graphs.py`) is
found here, too.
"""

from __future__ import annotations

import importlib
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing.guards import require
from .tracing.stored_graphs import Function as Function  # what files name, see above
from .tracing.stored_graphs import MemoryFormat as MemoryFormat
from .tracing.stored_graphs import Reference as Reference
from .tracing.stored_graphs import restored as restored

__all__ = [
    "batch_of_heads",
    "join_heads",
    "lift",
    "linear_heads",
    "merge",
    "mix",
    "norm_heads",
    "part_heads",
    "pooled",
    "require",
    "shift",
    "turn_heads",
    "unmerge",
]


def unmerge(x: Tensor, index: Tensor, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Gather features along `axes`, seen as one run: the features of one model out of the merged ones.

    >>> import torch
    >>> unmerge(torch.tensor([[1.0, 2.0]]), torch.tensor([1, 1, 0]), (1,), (3,))
    tensor([[2., 2., 1.]])
    """
    if len(axes) == 1:
        return x.index_select(axes[0], index)
    ends = tuple(range(x.ndim - len(axes), x.ndim))
    moved = x.movedim(axes, ends)
    flat: Tensor = moved.flatten(-len(axes)).index_select(-1, index)
    return flat.unflatten(-1, sizes).movedim(ends, axes)  # type: ignore[no-any-return]


def mix(x: Tensor, matrix: Tensor, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Features of one model as linear combinations of merged ones: `matrix` is [features of the model, merged].

    >>> import torch
    >>> mix(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.5]]), (1,), (1,))
    tensor([[1.5000]])
    """
    ends = tuple(range(x.ndim - len(axes), x.ndim))
    moved: Tensor = x.movedim(axes, ends).flatten(-len(axes)) @ matrix.to(x.dtype).T
    return moved.unflatten(-1, sizes).movedim(ends, axes)  # type: ignore[no-any-return]


def merge(
    values: tuple[Tensor, ...], rows: Tensor, columns: Tensor, weights: Tensor, axes: tuple[int, ...],
    sizes: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """Σ_k M_k x_k along `axes`, seen as one run: the features of K models into merged ones; without axes the mean.

    M is sparse: row, column and weight of each entry, columns counted through all models.

    >>> import torch
    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 3.0]])
    >>> merge((a, b), torch.tensor([0, 1, 1, 0]), torch.arange(4), torch.full((4,), 0.5), (1,), (2,))
    tensor([[2., 3.]])
    """
    if not axes:
        return torch.stack(values).mean(0)
    ends = tuple(range(values[0].ndim - len(axes), values[0].ndim))
    joint = torch.cat([value.movedim(axes, ends).flatten(-len(axes)) for value in values], -1)
    taken = joint.index_select(-1, columns) * weights.to(joint.dtype)
    merged = taken.new_zeros((*joint.shape[:-1], math.prod(sizes))).index_add(-1, rows, taken)
    return merged.unflatten(-1, sizes).movedim(ends, axes)  # type: ignore[no-any-return]


def shift(features: Tensor, direction: Tensor, mean: Tensor, offset: Tensor, axis: int) -> Tensor:
    """One number for each input, [batch], float32 at least: v · (h - m) + c, h as `pooled` gives it.

    >>> shift(torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, 0.5]), torch.tensor([1.0, 1.0]), torch.tensor(1.0), -1)
    tensor([1.5000])
    """
    exact = torch.promote_types(features.dtype, torch.float32)
    own = pooled(features.to(exact), axis) - mean.to(exact)
    return own @ direction.to(exact) + offset.to(exact)


def pooled(features: Tensor, axis: int) -> Tensor:
    """[batch, features]: the mean over all other axes.

    >>> pooled(torch.ones(2, 3, 4, 4), 1).shape
    torch.Size([2, 3])
    """
    return features.movedim(axis, 1).unsqueeze(-1).flatten(2).mean(2)  # no branch: it can be traced again


def lift(logits: Tensor, amount: Tensor) -> Tensor:
    """All logits of an input moved by the same amount: [batch, classes] and [batch].

    >>> lift(torch.zeros(2, 2), torch.tensor([1.0, -1.0]))
    tensor([[ 1.,  1.],
            [-1., -1.]])
    """
    return (logits + amount[:, None]).to(logits.dtype)


def join_heads(values: tuple[Tensor, ...], axis: int) -> Tensor:
    """What each head has there in one tensor, head after head along an axis.

    >>> join_heads((torch.zeros(2, 3), torch.ones(2, 3)), 1).shape
    torch.Size([2, 6])

    Raises:
        ValueError: the heads' shapes differ, as they did not on the sample.
    """
    if any(value.shape != values[0].shape for value in values):
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise ValueError(
            f"Heads that run together need values of one shape; found {shapes}. Pass inputs of the shape of the sample "
            "input, or the network with its heads apart."
        )
    return torch.cat(values, axis)


def part_heads(x: Tensor, heads: int, axis: int) -> tuple[Tensor, ...]:
    """What `join_heads` has joined, apart again: views.

    >>> [part.shape[0] for part in part_heads(torch.zeros(6, 3), 2, 0)]
    [3, 3]
    """
    return x.tensor_split(heads, axis)


def turn_heads(x: Tensor, heads: int, axis: int, onto: int) -> Tensor:
    """Head after head along another axis than before.

    >>> turn_heads(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 2, 1, 0)
    tensor([[1.],
            [3.],
            [2.],
            [4.]])
    """
    moved: Tensor = x.unflatten(axis, (heads, -1)).movedim(axis, onto)
    return moved.flatten(onto, onto + 1)


def batch_of_heads(batch: int, heads: int) -> int:
    """How many inputs a batch has where heads lie along it.

    >>> batch_of_heads(4, 3)
    12
    """
    return batch * heads


def linear_heads(x: Tensor, weight: Tensor, bias: Tensor | None, shared: bool = False) -> Tensor:
    """A linear call of each head, all in one batched product; heads lie along the first axis, with the batch.

    >>> linear_heads(torch.tensor([[1.0], [2.0]]), torch.tensor([[[1.0]], [[10.0]]]), None)
    tensor([[ 1.],
            [20.]])

    Args:
        x: [heads · batch, ..., inputs].
        weight: [heads, outputs, inputs].
        bias: [heads, outputs], or None.
        shared: x is [batch, ..., inputs], and every head reads it.
    """
    heads, outputs, inputs = weight.shape
    rows = x.reshape(1, -1, inputs).expand(heads, -1, -1) if shared else x.reshape(heads, -1, inputs)
    result = rows @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    return result.reshape(x.shape[0] * (heads if shared else 1), *x.shape[1:-1], outputs)


def norm_heads(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """A layer normalisation of each head, whose scale and shift are [heads, *features]; heads as in `linear_heads`.

    >>> norm_heads(torch.tensor([[1.0, 3.0], [1.0, 3.0]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]]), None, 0.0)
    tensor([[-1.,  1.],
            [-2.,  2.]])
    """
    heads, *features = weight.shape
    spread = (heads, *[1] * (x.ndim - len(features)), *features)
    scaled = F.layer_norm(x, features, eps=eps).unflatten(0, (heads, -1)) * weight.reshape(spread)
    result: Tensor = scaled if bias is None else scaled + bias.reshape(spread)
    return result.flatten(0, 1)


_FORMER = {
    "fxzip.zipped": "fxzip.rewriting.module",
    "fxzip.report": "fxzip.rewriting.report",
    "fxzip.joint": "fxzip.refit.joint.logit_shifts",
    "fxzip.refit.solving": "fxzip.refit.least_squares.solving",
    "fxzip.refit.lstsq": "fxzip.refit.least_squares.least_squares",
    "fxzip.containers": "fxzip.tracing.containers",
    "fxzip.structure": "fxzip.tracing.structure",
}
"""Modules whose classes files name by where they were when the file was written."""


def answer_to_former_names() -> None:
    """Let pickles find classes of fxzip where they were."""
    for former, name in _FORMER.items():
        sys.modules.setdefault(former, importlib.import_module(name))

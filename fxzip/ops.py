"""What a zipped network calls, and how it is stored: operations, and the graph as plain data.

This module does not move: files name it. A network is stored as its class, a module that holds its parameters, its
nodes (operation, name, target, arguments, and what fxzip notes of each), its notes, and the number of the format.

Format 0 had the operations in `fxzip.zipped` and `fxzip.joint`; such files are still read.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .errors import LoadError
from .tracing.allowed import check_keywords, check_name, check_node, is_allowed, is_rebuild, named, qualified
from .tracing.guards import require

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

FORMAT = 1
"""The number of the format that is written."""


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


@dataclass(frozen=True)
class Reference:
    """Stands for a node, by name, in the arguments of a stored one."""

    name: str


@dataclass(frozen=True)
class MemoryFormat:
    """Stands for a memory format of PyTorch, which pickles of protocol 2, those of `torch.save`, cannot hold."""

    name: str


@dataclass(frozen=True)
class Function:
    """What a node calls: where it is found, or itself if it is a function of one's own.

    >>> Function.of(torch.relu)
    Function(module='torch', path='relu', itself=None)
    """

    module: str
    path: str
    itself: Any = None

    @classmethod
    def of(cls, called: Any) -> Function:
        """What is stored for a function."""
        if not is_allowed(called):
            return cls("", "", called)
        module, path = qualified(called)
        try:
            return cls(module, path) if named(module, path) is called else cls("", "", called)
        except LoadError:
            return cls("", "", called)

    def find(self, *, safely: bool) -> Any:
        """The function.

        Raises:
            LoadError: `safely`, and it is none that a file may name.
        """
        if not self.module:
            if safely and not (is_rebuild(self.itself) or is_allowed(self.itself)):
                return named(*(str(getattr(self.itself, key, "?")) for key in ("__module__", "__qualname__")))
            return self.itself
        module = _MOVED.get((self.module, self.path), self.module)
        if safely:
            return named(module, self.path)
        try:
            return getattr(importlib.import_module(module), self.path)
        except ImportError:  # `torch.ops.aten.relu.default`: objects, not modules
            first, *rest = f"{module}.{self.path}".split(".")
            return functools.reduce(getattr, rest, importlib.import_module(first))


_MOVED = {
    (module, name): "fxzip.ops"
    for module, names in {"fxzip.zipped": ("unmerge", "mix", "merge"), "fxzip.joint": ("shift", "lift")}.items()
    for name in names
}
"""Where the operations of format 0 are now."""
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


@dataclass(frozen=True)
class Provenance:
    """Where a node of a zipped network comes from.

    >>> Provenance("trunk", ("conv1", "conv1")).as_data()
    {'part': 'trunk', 'from': ['conv1', 'conv1'], 'writes': False}

    Attributes:
        part: "trunk", "head K", "stem K", "merge" for what merges the values that enter the trunk, or "batched" for
            what all heads compute in one call.
        sources: the nodes that it stands for: of every model in the trunk and where heads are joined, else of the model
            that the part belongs to; none for what only the zip has.
        writes: whether it writes in place into memory that was there before it.
        unmerges: whether it gives a head its own features back.
    """

    part: str = "trunk"
    sources: tuple[str, ...] = ()
    writes: bool = False
    unmerges: bool = False

    def as_data(self) -> dict[str, Any]:
        """As files have it."""
        found = {"part": self.part, "from": list(self.sources), "writes": self.writes}
        return {**found, "unmerge": True} if self.unmerges else found

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Provenance:
        """From a file, of whatever format."""
        sources = tuple(data.get("from", ()))
        return cls(str(data.get("part", "trunk")), sources, bool(data.get("writes")), bool(data.get("unmerge")))


_KEY = "fxzip"  # among what a node knows of itself


def mark(node: fx.Node, provenance: Provenance) -> None:
    """Note where a node comes from. In place."""
    node.meta[_KEY] = provenance


def provenance_of(node: fx.Node) -> Provenance:
    """Where a node comes from; a node of which nothing is noted is one of the trunk that stands for none."""
    found: Provenance = node.meta.get(_KEY, Provenance())
    return found


def provenance_data(node: fx.Node) -> dict[str, Any]:
    """What a file keeps of it; empty where nothing is noted."""
    return provenance_of(node).as_data() if _KEY in node.meta else {}


def _stored(value: Any) -> Any:
    """What stands for a value among the arguments of a stored node."""
    if isinstance(value, fx.Node):
        return Reference(value.name)
    return MemoryFormat(str(value).removeprefix("torch.")) if isinstance(value, torch.memory_format) else value


def _again(value: Any, made: Mapping[str, fx.Node]) -> Any:
    """The value that it stands for.

    Raises:
        LoadError: there is no such memory format.
    """
    if isinstance(value, MemoryFormat):
        found = getattr(torch, str(value.name), None)
        if not isinstance(found, torch.memory_format):
            raise LoadError(f"There is no memory format {value.name!r}. Do not load the file.")
        return found
    return made[value.name] if isinstance(value, Reference) else value


def written(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph as plain data.

    >>> [line[:3] for line in written(fx.symbolic_trace(nn.ReLU()).graph)][1]
    ('call_function', 'relu', Function(module='torch.nn.functional', path='relu', itself=None))
    """
    lines = []
    for node in graph.nodes:
        given: Any = fx.node.map_aggregate((node.args, node.kwargs), _stored)
        target = node.target if isinstance(node.target, str) else Function.of(node.target)
        lines.append((node.op, node.name, target, *given, provenance_data(node)))
    return lines


def restored(
    kind: type[fx.GraphModule], holder: nn.Module, lines: list[tuple[Any, ...]], own: dict[str, Any], version: int = 0
) -> fx.GraphModule:
    """A module from its file.

    Raises:
        LoadError: it is of a later format; or `torch.load(weights_only=True)` reads it, and it calls what a file may
            not name (see `allowed`); or a name in it is none.
    """
    if version > FORMAT:
        raise LoadError(
            f"This version of fxzip reads zipped networks up to format {FORMAT}; the file is of format {version}. "
            "Use the version that wrote it, or a later one."
        )
    if not (isinstance(kind, type) and issubclass(kind, fx.GraphModule)):
        raise LoadError(f"A stored network must name its class; this one has {kind!r}. Do not load it.")
    safely = _only_weights()
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs, meta in lines:
        given: Any = fx.node.map_aggregate((args, kwargs), lambda a: _again(a, made))
        arguments, options = given
        called = target.find(safely=safely) if isinstance(target, Function) else target
        check_name(op, called)
        check_keywords(options)
        if safely:
            check_node(op, called, arguments)
        made[name] = graph.create_node(op, called, arguments, options, name=name)
        if meta:
            mark(made[name], Provenance.of_data(meta))
    result = kind(holder, graph)
    result.meta.update(own)
    return result


def _only_weights() -> bool:
    """Whether the unpickler at work is the one that runs no code of its own."""
    frame = inspect.currentframe()
    while frame is not None:
        if "weights_only" in str(frame.f_globals.get("__name__")):
            return True
        frame = frame.f_back
    return False

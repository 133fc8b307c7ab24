"""The module that comes out: trunk and heads in one graph, and what its own nodes call."""

from __future__ import annotations

import copy
import functools
import importlib
import math
import operator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from .align import attribute
from .tracing import require


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


def part_of(node: fx.Node) -> str:
    """Which part of a zipped module a node belongs to: "trunk", "head 0", ...; with `start` also "stem 0", ... and
    "merge"."""
    return str(node.meta.get("fxzip", {}).get("part", "trunk"))


class EmittedModule(fx.GraphModule):
    """A graph module that is pickled as its graph. `fx.GraphModule` pickles its code and traces it again, which looks
    into functions and computes what does not depend on the input, and so gives another graph, or none."""

    def recompile(self) -> Any:
        """Generate the code anew. Functions that are not PyTorch's are marked as one call each, for tracers."""
        for node in self.graph.nodes:
            own = node.op == "call_function" and isinstance(node.target, FunctionType)
            if own and not str(node.target.__module__).startswith("torch."):
                node.meta["is_wrapped"] = True
        return super().recompile()

    def __reduce__(self) -> Any:
        kind = next(base for base in type(self).__mro__ if "<locals>" not in base.__qualname__)  # each has its own
        return _restored, (kind, _holder(self), _written(self.graph), dict(self.meta))


class ZippedModule(EmittedModule):
    """A multi-task network: an ordinary `torch.fx.GraphModule` that returns a tuple with each model's output."""

    @property
    def report(self) -> Any:
        """What was shared, what was not and why."""
        return self.meta.get("fxzip_report")

    def single(self, i: int) -> fx.GraphModule:
        """The network of task `i` alone: trunk and head i, the other heads removed. It shares parameters with this one.

        >>> import fxzip, torch
        >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
        >>> fxzip.compile_zip(a, b, torch.randn(16, 4)).single(1)(torch.randn(5, 4)).shape
        torch.Size([5, 3])

        Raises:
            IndexError: there is no head i.
        """
        graph = copy.deepcopy(self.graph)
        output = graph.output_node()
        heads = output.args[0]
        assert isinstance(heads, (tuple, list))
        if not -len(heads) <= i < len(heads):
            raise IndexError(f"`single` takes the number of a head, 0 to {len(heads) - 1}; found {i}.")
        output.args = (heads[i],)
        own = f"head {i % len(heads)}"
        for node in reversed(list(graph.nodes)):
            kept = node.op in ("output", "placeholder") or node.users
            needed = part_of(node) in ("trunk", own) or part_of(node).startswith("stem ")
            acts = needed and (node.meta.get("fxzip", {}).get("writes") or node.target is require)
            if not kept and not acts:
                graph.erase_node(node)
        return EmittedModule(_holder(self), graph)


@dataclass(frozen=True)
class _Reference:
    """Stands for a node, by name, in the arguments of a pickled one."""

    name: str


def _reference(node: fx.Node) -> Any:
    return _Reference(node.name)


def _written(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph as plain data: op, name, target, arguments and what fxzip notes of each node."""
    lines = []
    for node in graph.nodes:
        given: Any = fx.node.map_arg((node.args, node.kwargs), _reference)
        target = node.target if isinstance(node.target, str) else _Function.of(node.target)
        lines.append((node.op, node.name, target, *given, node.meta.get("fxzip", {})))
    return lines


@dataclass(frozen=True)
class _Function:
    """What a node calls: where it is found, or itself if it is not found there."""

    module: str
    path: str
    itself: Any = None

    @classmethod
    def of(cls, called: Any) -> _Function:
        # PyTorch's functions are found at `torch.relu`, say, not where they say they come from
        module, _, path = fx.node._get_qualified_name(called).rpartition(".")
        found, itself = cls(module, path), cls("", "", called)
        try:
            return found if module and found.find() is called else itself
        except (ImportError, AttributeError):
            return itself

    def find(self) -> Any:
        if not self.module:
            return self.itself
        try:
            return getattr(importlib.import_module(self.module), self.path)
        except ImportError:  # `torch.ops.aten.relu.default`: objects, not modules
            first, *rest = f"{self.module}.{self.path}".split(".")
            return functools.reduce(getattr, rest, importlib.import_module(first))


def _restored(
    kind: type[EmittedModule], holder: nn.Module, lines: list[tuple[Any, ...]], own: dict[str, Any]
) -> EmittedModule:
    """A module from its pickle."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs, meta in lines:
        given = fx.node.map_aggregate((args, kwargs), lambda a: made[a.name] if isinstance(a, _Reference) else a)
        called = target.find() if isinstance(target, _Function) else target
        made[name] = graph.create_node(op, called, *given, name=name)
        made[name].meta["fxzip"] = meta
    result = kind(holder, graph)
    result.meta.update(own)
    return result


def _holder(module: nn.Module) -> nn.Module:
    """A plain module with the same children, parameters and buffers, in the same mode."""
    holder = nn.Module()
    for name, child in module.named_children():
        holder.add_module(name, child)
    for name, param in module.named_parameters(recurse=False):
        holder.register_parameter(name, param)
    for name, buffer in module.named_buffers(recurse=False):
        holder.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    holder.training = module.training  # not `train()`: the children are those of `module`, each in its own mode
    return holder


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer a new value, in its own dtype; where it is shared it stays shared."""
    own = attribute(module, name)
    own.data = value.to(own.dtype).contiguous()


def reuse_memory(module: fx.GraphModule) -> None:
    """Let ReLUs write over their input where nothing else reads it, as networks usually have it. In place.

    Tracing makes all calls out of place. A ReLU goes back where its input is the fresh result of a convolution, a
    linear call, a normalisation or a sum that has no other user. The gradient of a ReLU needs its result only.
    """
    sums = (operator.add, torch.add)
    makers = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    safe: dict[nn.Module, bool] = {}
    for node in module.graph.nodes:
        called = attribute(module, str(node.target)) if node.op == "call_module" else None
        if isinstance(called, nn.ReLU):
            source = node.all_input_nodes[0]
            fresh = (source.op == "call_function" and source.target in sums) or (
                source.op == "call_module" and isinstance(attribute(module, str(source.target)), makers)
            )
            tensors = len(source.all_input_nodes) == (2 if source.op == "call_function" else 1)
            safe[called] = safe.get(called, True) and fresh and tensors and len(source.users) == 1
    for relu, ready in safe.items():
        relu.inplace = ready  # type: ignore[assignment]

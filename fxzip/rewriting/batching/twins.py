"""Which calls all heads make: the same call, with the same settings, on values of the same shapes.

Calls of two heads are *twins* if what is called, all settings and all constants agree, and their operands are twins, or
values of one shape that come from the trunk or from calls of one kind. Parameters may differ in what they hold. Taken
in the order of the first head, each call takes the first one of every other head that is its twin; since operands have
to be twins too, any choice among several is right.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...partition.alignment import attribute
from ...tracing import quiet_execution
from ...tracing.aten_calls import run
from ...tracing.calls import Call, batch_size, with_batch
from ..module import ZippedModule, is_unmerge, part_of

Twins = tuple[fx.Node, ...]
"""A call of every head, in the order of the heads."""


@dataclass(frozen=True, eq=False)
class Values:
    """What the nodes of a graph give, on a sample.

    Attributes:
        shapes: of those that give a tensor.
        dtypes: of the same.
        batch: the axis along which the inputs of a batch lie, of those that have one, on batches of two sizes.
    """

    shapes: Mapping[fx.Node, tuple[int, ...]]
    dtypes: Mapping[fx.Node, torch.dtype]
    batch: Mapping[fx.Node, int]


def values_of(net: fx.GraphModule, call: Call) -> Values:
    """Run a graph on a sample, and on another batch of it."""
    first, other = batch_size(call), (batch_size(call) or 0) + 2
    found, again = _tensors(net, call), _tensors(net, with_batch(call, other))
    shapes = {node: tuple(value.shape) for node, value in found.items()}
    batch = {}
    for node, shape in shapes.items():
        then = tuple(again[node].shape) if node in again else ()
        differs = [axis for axis, sizes in enumerate(zip(shape, then, strict=False)) if sizes[0] != sizes[1]]
        if len(then) == len(shape) and [(shape[axis], then[axis]) for axis in differs] == [(first, other)]:
            batch[node] = differs[0]
    return Values(shapes, {node: value.dtype for node, value in found.items()}, batch)


def _tensors(net: fx.GraphModule, call: Call) -> dict[fx.Node, Tensor]:
    """What every node gives, without its memory."""
    found: dict[fx.Node, Tensor] = {}

    def file(node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            found[node] = value.to("meta")
        return value

    with quiet_execution():
        run(net, call, on_node=file)
    return found


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments of a node, in order; one that is given twice counts twice."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def alike(net: ZippedModule, values: Values, *, sized: bool = True) -> list[Twins]:
    """The calls that all heads make, in the order of the first head. `sized`: results and parameters are of the same
    sizes; else of as many axes."""
    heads = len(net.heads)
    own = [[node for node in net.graph.nodes if part_of(node) == f"head {k}"] for k in range(heads)]
    told = {node: _called(net, node, sized) for nodes in own for node in nodes}
    return _Matching(net, values, own, told, sized).all() if heads > 1 else []


class _Matching:
    def __init__(
        self, net: ZippedModule, values: Values, own: Sequence[Sequence[fx.Node]], told: Mapping[fx.Node, Hashable],
        sized: bool,
    ) -> None:  # fmt: skip
        self.net, self.values, self.own, self.told, self.sized = net, values, own, told, sized
        self.number: dict[fx.Node, int] = {}

    def all(self) -> list[Twins]:
        found: list[Twins] = []
        for node in self.own[0]:
            wanted = self.said(node)
            twins = [self.twin(node, k, wanted) for k in range(1, len(self.own))]
            if all(twin is not None for twin in twins):
                found.append((node, *(twin for twin in twins if twin is not None)))
                self.number |= dict.fromkeys(found[-1], len(found))
        return found

    def twin(self, node: fx.Node, k: int, wanted: Hashable) -> fx.Node | None:
        """The first call of head k that says the same and has no twin yet."""
        left = (other for other in self.own[k] if other not in self.number and self.told[other] == self.told[node])
        return next((other for other in left if self.said(other) == wanted), None)

    def said(self, node: fx.Node) -> Hashable:
        """All that twins have in common, but for what is called."""
        given = fx.node.map_arg((node.args, node.kwargs), self.operand)
        shape, dtype = self.kind(node)
        return repr(given), (shape if self.sized or shape is None else len(shape)), dtype

    def operand(self, node: fx.Node) -> Any:
        if node in self.number:
            return f"twins {self.number[node]}"
        if node not in self.values.shapes:
            return f"node {node.name}"  # a size, which is no one's own
        return self.origin(node), self.kind(node)

    def origin(self, node: fx.Node) -> str:
        """What a value without a twin comes from, so that heads which are alike from some place on are found there."""
        if node not in self.told or is_unmerge(node):
            return "the trunk"
        return type(attribute(self.net, str(node.target))).__name__ if node.op == "call_module" else str(node.target)

    def kind(self, node: fx.Node) -> tuple[tuple[int, ...] | None, str]:
        return self.values.shapes.get(node), str(self.values.dtypes.get(node))


def _called(net: fx.GraphModule, node: fx.Node, sized: bool) -> Hashable:
    """What a node calls, without the values of parameters."""
    if node.op == "call_module":
        module: nn.Module = attribute(net, str(node.target))
        return node.op, tuple((name, _settings(part, sized)) for name, part in module.named_modules())
    if node.op == "get_attr":
        return node.op, _held(attribute(net, str(node.target)), True)
    return node.op, node.target


_SIZES = frozenset({"in_features", "out_features", "in_channels", "out_channels", "num_features"})


def _settings(module: nn.Module, sized: bool) -> Hashable:
    """A module without its parts; `inplace` changes nothing of what it computes."""
    left_out = {"inplace"} | (set() if sized else _SIZES)
    plain = {key: repr(value) for key, value in vars(module).items() if not key.startswith("_") and key not in left_out}
    tensors = {**module._parameters, **module._buffers}
    held = tuple((name, _held(own, sized)) for name, own in tensors.items())
    return type(module), tuple(sorted(plain.items())), held


def _held(value: Any, sized: bool) -> Hashable:
    if not isinstance(value, Tensor):
        return repr(value)
    return (
        tuple(value.shape) if sized else value.ndim,
        value.dtype,
        value.device,
        value.requires_grad,
        isinstance(value, nn.Parameter),
    )

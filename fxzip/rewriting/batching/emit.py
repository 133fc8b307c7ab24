"""Write the graph anew, with one call where all heads make the same.

Nodes are taken in the order of the graph; a call of all heads waits until the values of every head are there. Values of
heads are joined where such a call reads what lies apart, and parted where a head reads by itself what lies joined.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from ...ops import batch_of_heads, join_heads, mix, part_heads, turn_heads, unmerge
from ...partition.alignment import attribute
from ...tracing.provenance import Provenance, mark, provenance_of
from ..module import ZippedModule, reuse_memory, sources_of
from .ordering import in_order
from .reading import read, sizes_of, whole
from .rules import BATCH, Axes, Rule, Site, axes_of, rule_of, viewed
from .twins import Twins, Values, alike, operands

PART = "batched"
"""What nodes are part of that compute for all heads, and where their modules are."""


@dataclass(frozen=True, eq=False)
class BatchedCall:
    """A call of all heads that is to be one.

    Attributes:
        site: where it is made.
        rule: how.
        axes: where heads may lie in it, the preferred one first.
    """

    site: Site
    rule: Rule
    axes: Axes

    @property
    def reads(self) -> list[tuple[fx.Node, ...]]:
        """Of each operand that holds heads the nodes of all of them."""
        columns = zip(*(read(node) for node in self.site.twins), strict=True)
        return [own for own in columns if self.rule.reads(self.site, own[0])]

    @property
    def begins(self) -> bool:
        """Whether it is worth joining values for: it has parameters."""
        return self.rule.stack is not None


def batchable(net: ZippedModule, values: Values, axes: Collection[int] = (0, 1)) -> list[BatchedCall]:
    """The calls of all heads that one call can make, where heads may lie along these axes; in order.

    None where heads write in place, since calls change their order.
    """
    if any(provenance_of(node).writes for node in net.graph.nodes):
        return []
    found: dict[Twins, BatchedCall] = {}
    within: dict[fx.Node, Twins] = {}
    for twins in alike(net, values):
        rule = rule_of(net, twins[0])
        site = Site(net, twins, values)
        possible = () if rule is None else tuple(axis for axis in axes_of(rule, site) if axis in axes)
        if rule is None or not possible:
            continue
        call = BatchedCall(site, rule, possible)
        if call.begins or site.node.target in (unmerge, mix) or any(own[0] in within for own in call.reads):
            found[twins] = call
            within |= dict.fromkeys(twins, twins)
    calls = [call for call in found.values() if not _idle(call, within)]
    once = len(net.graph.nodes) - sum(len(call.site.twins) - 1 for call in calls)
    crossing = len(in_order(net.graph, [call.site.twins for call in calls])) < once  # two calls wait for one another
    return [] if crossing else calls


def _idle(call: BatchedCall, within: Collection[fx.Node]) -> bool:
    """Whether features are given back to all heads at once for nothing: the heads go on apart."""
    return call.site.node.target in (unmerge, mix) and not all(user in within for user in call.site.node.users)


def emitted(net: ZippedModule, calls: Sequence[BatchedCall]) -> ZippedModule:
    """The network with these calls made for all heads at once. It shares other parameters with `net`, and is in its
    mode."""
    result = _Emitter(net, calls).emit()
    for name, module in net.named_modules():
        mine = _found(result, name)
        if mine is not None:
            mine._non_persistent_buffers_set |= module._non_persistent_buffers_set & mine._buffers.keys()
    result.meta.update(net.meta)
    reuse_memory(result)
    return result


def _found(net: nn.Module, name: str) -> nn.Module | None:
    try:
        return net.get_submodule(name)
    except AttributeError:
        return None


class _Emitter:
    def __init__(self, net: ZippedModule, calls: Sequence[BatchedCall]) -> None:
        self.batch = calls[0].site.values.batch if calls else {}
        self.net, self.heads = net, len(net.heads)
        self.calls = {node: call for call in calls for node in call.site.twins}
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.apart: dict[fx.Node, fx.Node] = {}
        self.parts: dict[fx.Node, fx.Node] = {}
        self.idle: set[str] = set()  # nodes that go where nothing reads them
        self.joint: dict[tuple[fx.Node, ...], dict[int, fx.Node]] = {}
        held: dict[int, Any] = {id(own): own for own in (*net.parameters(), *net.buffers())}
        for name, child in net.named_children():  # modules of its own: whether they write over what they read differs
            self.root.add_module(name, copy.deepcopy(child, held))
        for name, own in (*net._parameters.items(), *net._buffers.items()):
            setattr(self.root, name, own)
        self.root.add_module(PART, nn.Module())

    def emit(self) -> ZippedModule:
        for node in in_order(self.net.graph, [call.site.twins for call in set(self.calls.values())]):
            if node in self.calls:
                self.together(self.calls[node])
            else:
                self.by_itself(node)
        for node in reversed(list(self.graph.nodes)):  # sizes, tables and the like that one call for all needs no more
            if not node.users and node.name in self.idle:
                self.graph.erase_node(node)
        self.graph.lint()
        result = ZippedModule(self.root, self.graph)
        result.training = self.net.training
        return result

    def by_itself(self, node: fx.Node) -> None:
        given = fx.node.map_arg((node.args, node.kwargs), self.one)
        args, kwargs = given
        made = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        made.meta = dict(node.meta)
        self.apart[node] = made
        if node.users and node.op != "placeholder":
            self.idle.add(made.name)

    def one(self, node: fx.Node) -> fx.Node:
        """A value of one head, or of none, parted from the others."""
        if node not in self.apart:
            twins = self.calls[node].site.twins
            axis, value = next(iter(self.joint[twins].items()))
            parts = self.made(part_heads, (value, self.heads, self.place(twins, axis)), f"{twins[0].name}_parts")
            for k, own in enumerate(twins):
                self.apart[own] = self.graph.call_function(operator.getitem, (parts, k))
                mark(self.apart[own], replace(provenance_of(own), unmerges=False))
                self.idle |= {parts.name, self.apart[own].name}
        return self.apart[node]

    def made(self, function: Callable[..., Any], args: tuple[Any, ...], name: str) -> fx.Node:
        node = self.graph.create_node("call_function", function, args, {}, name=name)
        mark(node, Provenance(PART))
        return node

    def place(self, own: tuple[fx.Node, ...], axis: int) -> int:
        """Along which axis of its tensor heads lie in a value."""
        return self.batch[own[0]] if axis == BATCH else axis

    def value(self, own: tuple[fx.Node, ...], axis: int) -> fx.Node:
        """The value of all heads, along the batch or the features."""
        known, place = self.joint.setdefault(own, {}), self.place(own, axis)
        if axis in known:
            return known[axis]
        if known:
            other, value = next(iter(known.items()))
            turned = (value, self.heads, self.place(own, other), place)
            known[axis] = self.made(turn_heads, turned, f"{own[0].name}_turned")
        else:
            known[axis] = self.made(join_heads, (tuple(map(self.one, own)), place), f"{own[0].name}_joined")
        return known[axis]

    def together(self, call: BatchedCall) -> None:
        """One call for all heads, along the axis of its first operand that lies joined, if it may."""
        site, rule, node = call.site, call.rule, call.site.node
        shared = rule.shares and all(len({*own}) == 1 and own[0] not in self.calls for own in call.reads)
        shared = shared and not any(getattr(module, "groups", 1) > 1 for module in self.modules(call))
        lying = [axis for own in call.reads for axis in self.joint.get(own, {})]
        axis = next((axis for axis in lying if axis in call.axes), call.axes[0])
        reads = iter([self.one(own[0]) if shared else self.value(own, axis) for own in call.reads])

        def given(operand: fx.Node) -> fx.Node:
            return next(reads) if rule.reads(site, operand) else self.one(operand)

        if node.target in (unmerge, mix):
            made = self.given_back(call, next(reads))
        elif rule.stack is not None:
            made = self.stacked(call, next(reads), shared)
        elif whole(node) is not None:
            made = self.part(node, next(reads))
        elif rule.axes is viewed:
            made = self.viewed(node, next(reads), axis)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
            made = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        made.meta = dict(node.meta)
        sources = tuple(name for own in site.twins for name in sources_of(own)[:1])
        mark(made, Provenance(PART, sources, unmerges=provenance_of(node).unmerges))
        self.joint[site.twins] = {axis: made}

    def modules(self, call: BatchedCall) -> list[Any]:
        return call.site.modules if call.site.node.op == "call_module" else []

    def stacked(self, call: BatchedCall, value: fx.Node, shared: bool) -> fx.Node:
        """A call with the parameters of all heads."""
        site, rule, node = call.site, call.rule, call.site.node
        assert rule.stack is not None
        path = f"{PART}.{str(node.target).partition('.')[2]}"
        put(self.root, path, rule.stack(site.modules, shared))
        if rule.function is None:
            return self.graph.create_node("call_module", path, (value,), {}, name=node.name)
        held = attribute(self.root, path)
        tensors = [
            None if held._parameters[name] is None else self.parameter(f"{path}.{name}") for name in ("weight", "bias")
        ]
        further = [getattr(site.modules[0], name) for name in rule.extra]
        args = (value, *tensors, *further, *([True] if shared else []))
        return self.graph.create_node("call_function", rule.function, args, {}, name=node.name)

    def part(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """One of the parts of a tensor, which is taken apart once."""
        parts = whole(node)
        assert parts is not None
        if parts not in self.parts:
            args = (value, *parts.args[1:])
            self.parts[parts] = self.graph.create_node(parts.op, parts.target, args, parts.kwargs, name=parts.name)
            mark(self.parts[parts], Provenance(PART))
        made = (self.parts[parts], node.args[1])
        return self.graph.create_node("call_function", operator.getitem, made, {}, name=node.name)

    def viewed(self, node: fx.Node, value: fx.Node, axis: int) -> fx.Node:
        """Another shape for every input of a batch, which is K times as large where heads lie along it."""
        first, *others = (self.one(own) if isinstance(own, fx.Node) else own for own in sizes_of(node))
        if isinstance(first, fx.Node) and axis == BATCH:
            first = self.made(batch_of_heads, (first, self.heads), f"{node.name}_batch")
        return self.graph.create_node("call_function", torch.reshape, (value, (first, *others)), {}, name=node.name)

    def parameter(self, path: str) -> fx.Node:
        node = self.graph.get_attr(path)
        mark(node, Provenance(PART))
        return node

    def given_back(self, call: BatchedCall, value: fx.Node) -> fx.Node:
        """The features of all heads by one table."""
        node = call.site.node
        tables = [attribute(self.net, str(operands(own)[1].target)) for own in call.site.twins]
        _, _, axes, sizes = node.args
        name = f"{node.name}_table"
        self.root.register_buffer(name, torch.cat(tables))
        table = self.parameter(name)
        made = (value, table, axes, tuple(size * self.heads for size in sizes))  # type: ignore[operator, union-attr]
        return self.graph.create_node("call_function", node.target, made, {}, name=node.name)


def put(root: nn.Module, path: str, value: Any) -> None:
    """Hold a module, parameter or buffer at a path, in plain modules."""
    *above, last = path.split(".")
    for name in above:
        if not isinstance(root._modules.get(name), nn.Module):
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    if isinstance(value, nn.Module):
        root.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    else:
        root.register_buffer(last, value)

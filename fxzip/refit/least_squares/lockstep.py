"""Networks run node by node over all batches at once, so that a node can be refitted before the next one runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...tracing import MathAttention, Program, flat_inputs, run_recorded
from ...tracing.aten_calls import OnCall, watched
from ...tracing.calls import Call, batch_size, leaves, map_tensors, select_rows

Env = dict[fx.Node, Any]


class Lockstep:
    """One network and the values of its nodes on every batch; values are freed after their last use."""

    def __init__(self, module: fx.GraphModule, calls: Sequence[Call]) -> None:
        self.module = module
        self.nodes = {node.name: node for node in module.graph.nodes}
        self._order = {node: place for place, node in enumerate(module.graph.nodes)}
        self._interpreter = fx.Interpreter(module)
        self._waiting = {node: len(node.users) for node in module.graph.nodes}
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self.envs: list[Env] = [dict(zip(placeholders, flat_inputs(module, call), strict=True)) for call in calls]

    def __len__(self) -> int:
        return len(self.envs)

    def run(self, node: fx.Node) -> None:
        """Compute a node on all batches where it is not there yet; inputs are there from the start, and stay."""
        for env in self.envs:
            if node not in env and node.op != "placeholder":
                env[node] = self.call(env, node)

    def call(self, env: Env, node: fx.Node, on_call: OnCall | None = None) -> Any:
        """What a node whose inputs are there gives, by calls as the analysis has seen them; nothing is kept.

        With `on_call` that makes them, see `tracing.aten_calls`.
        """
        self._interpreter.env = env
        with MathAttention() if on_call is None else watched(node, on_call):
            return self._interpreter.run_node(node)

    def value(self, env: Env, node: fx.Node) -> Any:
        """The value of a node; what it needs and is not there yet is computed ahead of time, and kept in `env`."""
        for missing in self.missing(env, node):
            env[missing] = self.call(env, missing)
        return env[node]

    def inputs(self, env: Env, node: fx.Node) -> None:
        """Compute what a node reads and is not there yet."""
        for source in node.all_input_nodes:
            self.value(env, source)

    def missing(self, env: Env, node: fx.Node) -> list[fx.Node]:
        """What has to be computed, in order, for the value of a node to be there."""
        waiting, found = [node], set[fx.Node]()
        while waiting:
            own = waiting.pop()
            if own not in env and own not in found:
                found.add(own)
                waiting += own.all_input_nodes
        return sorted(found, key=self._order.__getitem__)

    def forget(self, node: fx.Node) -> None:
        """A node is going to be computed anew."""
        for env in self.envs:
            env.pop(node, None)

    def release(self, node: fx.Node) -> None:
        """The node is done: free those of its inputs that no later node needs.

        What the network is given stays: a value that is asked for once more is computed from it.
        """
        for source in node.all_input_nodes:
            self._waiting[source] -= 1
            if self._waiting[source] == 0 and source.op != "placeholder":
                for env in self.envs:
                    env.pop(source, None)


def laid_out(call: Call, sample: Call) -> Call:
    """The call with its tensors in memory as those of the sample: which ATen calls a node makes depends on that, too.

    >>> across = Call((torch.ones(2, 3).T,), {})
    >>> laid_out(Call((torch.ones(5, 4),), {}), across).args[0].stride()
    (1, 5)
    """
    likes = iter(leaves(sample))

    def moved(value: Tensor) -> Tensor:
        like = next(likes)
        if value.ndim != like.ndim or value.layout != torch.strided or like.layout != torch.strided:
            return value
        order = sorted(range(like.ndim), key=lambda axis: (-like.stride()[axis], axis))
        if order == list(range(like.ndim)) and value.is_contiguous():  # it lies so already
            return value
        return value.permute(order).contiguous().permute([order.index(axis) for axis in range(like.ndim)])

    return map_tensors(moved, call)


def live_bytes(module: fx.GraphModule, shapes: Mapping[str, Sequence[int]], call: Call) -> float:
    """Peak of the bytes that the values of all live nodes take, per row of the batch; `shapes` are those on `call`."""
    waiting = {node: len(node.users) for node in module.graph.nodes}
    alive: dict[fx.Node, int] = {}
    width = next((p.element_size() for p in module.parameters()), 4)
    peak = 0
    for node in module.graph.nodes:
        if node.op != "get_attr" and node.name in shapes:
            alive[node] = math.prod(shapes[node.name]) * width
        peak = max(peak, sum(alive.values()))
        for source in node.all_input_nodes:
            waiting[source] -= 1
            if waiting[source] == 0:
                alive.pop(source, None)
    return peak / max(batch_size(call) or 1, 1)


def bytes_per_row(net: fx.GraphModule, programs: Sequence[Program]) -> float:
    """What an input takes in a walk: the values that live at a time in the originals and in the zipped network, of its
    own widths, and the input itself, which is held all the time."""
    call = programs[0].call
    zipped = live_bytes(net, run_recorded(net, call).shapes, call)
    held = sum(value.nbytes for value in leaves(call)) / max(batch_size(call) or 1, 1)
    return zipped + held + sum(live_bytes(own.module, own.shapes, own.call) for own in programs)


def within_memory(
    data: Iterable[tuple[int, Call]], per_row: float, memory: float, sources: int = 1, *, whole: bool = False
) -> tuple[list[tuple[int, int, Call]], tuple[int, int]]:
    """As many inputs as fit, taken evenly from all `sources`, at least one each; how many these are, and of how many.

    Each batch comes with the number of its source, and its own among all of them. The first batch of a source is cut if
    it is too large itself, unless models take `whole` batches only.
    """
    by_source: dict[int, list[tuple[int, Call]]] = {}
    used = seen = 0
    limit = memory / max(per_row, 1.0)
    for number, (source, call) in enumerate(data):
        own = by_source.setdefault(source, [])
        size = batch_size(call) or 1
        seen += size
        room = int(limit * (source + 1) / max(source + 1, sources)) - used
        if size > room and not own and not whole:
            size = max(room, 1)
            call = select_rows(call, slice(size))
        elif size > room and own:
            continue
        own.append((number, call))
        used += size
    return [(source, *own) for source, calls in sorted(by_source.items()) for own in calls], (used, seen)

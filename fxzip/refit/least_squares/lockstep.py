"""Networks run node by node over all batches, so that a node can be refitted before the next one runs.

What is to be run is noted first. A batch catches up when somebody asks for its values: it comes from the file if it lay
there (`spilling`), runs what was noted since, and goes back. Parameters change only once all batches have caught up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...tracing import InParts, flat_inputs
from ...tracing.aten_calls import OnCall, watched
from ...tracing.calls import Call, in_memory_as, leaves, map_tensors
from .memory import give_back
from .spill_file import SpillFile
from .spilling import Env, Shelf


class Lockstep:
    """One network and the values of its nodes on every batch; values are freed after their last use."""

    def __init__(
        self, module: fx.GraphModule, calls: Sequence[Callable[[], Call]], kept: int | None, file: SpillFile | None
    ) -> None:
        """
        Args:
            module: the network.
            calls: each gives the inputs of a batch.
            kept: on how many batches, the first ones, values stay in memory; None: on all.
            file: where those on the others lie; None: they are computed anew each time.
        """
        self.module, self._calls = module, calls
        self.nodes = {node.name: node for node in module.graph.nodes}
        self._order = {node: place for place, node in enumerate(module.graph.nodes)}
        self._interpreter = fx.Interpreter(module)
        self._waiting = {node: len(node.users) for node in module.graph.nodes}
        self._placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._there = set(self._placeholders)
        self._steps: list[Callable[[Env, int], object]] = []
        self._looks = 0  # steps up to the last that shows a value
        self._done = [0] * len(calls)
        self._envs: list[Env | None] = [None] * len(calls)
        self._kept = len(calls) if kept is None else kept
        self._shelves = {} if file is None else {batch: Shelf(file) for batch in range(self._kept, len(calls))}

    def __len__(self) -> int:
        return len(self._calls)

    def open(self, batch: int) -> Env:
        """The values on a batch, with everything run that is to be run so far."""
        env, shelf = self._envs[batch], self._shelves.get(batch)
        if env is None:
            if self._done[batch] and shelf is not None:
                env = shelf.get()
            else:
                env = dict(zip(self._placeholders, flat_inputs(self.module, self._calls[batch]()), strict=True))
        self._envs[batch] = env
        for step in self._steps[self._done[batch] :]:
            step(env, batch)
        self._done[batch] = len(self._steps)
        return env

    def close(self, batch: int) -> None:
        """The values on a batch are not needed for now. Without room on the file they are computed anew next time."""
        env, shelf = self._envs[batch], self._shelves.get(batch)
        if env is None or batch < self._kept:
            return
        self._envs[batch] = None
        try:
            if shelf is not None:
                shelf.put(env, self.module)
        except OSError:
            shelf = None
        if shelf is None:
            self._done[batch] = 0
        del env
        give_back()

    def run(self, node: fx.Node) -> None:
        """Compute a node on all batches where it is not there yet; inputs are there from the start, and stay."""
        if node.op == "placeholder":
            return

        def step(env: Env, _: int) -> None:
            if node not in env:
                env[node] = self.call(env, node)

        self._steps.append(step)
        self._there.add(node)

    def ahead(self, node: fx.Node) -> None:
        """Compute a node, and what it needs, ahead of time."""
        self._there.update(self.missing(self._there, node))
        self._steps.append(lambda env, _: self.value(env, node))

    def look(self, node: fx.Node, shown: Callable[[Any], None]) -> None:
        """Show the value of a node, which is there, to a function: once on every batch, as it catches up."""
        done = set[int]()

        def step(env: Env, batch: int) -> None:
            if batch not in done:  # values that are computed anew are the same
                done.add(batch)
                shown(env[node])

        self._steps.append(step)
        self._looks = len(self._steps)

    def finish(self) -> None:
        """Let every batch catch up as far as there is something to be shown; nothing is run behind that."""
        del self._steps[self._looks :]
        for batch, done in enumerate(self._done):
            if done < self._looks:
                self.open(batch)
                self.close(batch)

    def call(self, env: Env, node: fx.Node, on_call: OnCall | None = None) -> Any:
        """What a node whose inputs are there gives, by calls as the analysis has seen them; nothing is kept.

        With `on_call` that makes them, see `tracing.aten_calls`.
        """
        self._interpreter.env = env
        with InParts() if on_call is None else watched(node, on_call):
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

    def lacking(self, node: fx.Node) -> list[fx.Node]:
        """What has to be computed, in order, for the value of a node to be there, on any batch."""
        return self.missing(self._there, node)

    def missing(self, env: Collection[fx.Node], node: fx.Node) -> list[fx.Node]:
        """The same, where these are there."""
        waiting, found = [node], set[fx.Node]()
        while waiting:
            own = waiting.pop()
            if own not in env and own not in found:
                found.add(own)
                waiting += own.all_input_nodes
        return sorted(found, key=self._order.__getitem__)

    def forget(self, node: fx.Node) -> None:
        """A node is going to be computed anew."""
        self._there.discard(node)
        self._steps.append(lambda env, _: env.pop(node, None))

    def release(self, node: fx.Node) -> None:
        """The node is done: free those of its inputs that no later node needs.

        What the network is given stays: a value that is asked for once more is computed from it.
        """
        for source in node.all_input_nodes:
            self._waiting[source] -= 1
            if self._waiting[source] == 0 and source.op != "placeholder":
                self.forget(source)


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
        return in_memory_as(value, like)

    return map_tensors(moved, call)

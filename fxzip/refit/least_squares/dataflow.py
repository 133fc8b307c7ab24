"""Where values of a zipped network go: one run on the sample, call by call.

It answers one question: may the features of a value come in other combinations than the merge says, because whatever
reads them is fitted later? They may where, behind functions that act feature by feature, nothing follows but linear
calls that will be fitted, pooling, and residual sums of which the same holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...analysis.rules import RULES, elementwise, is_pointwise, reduction
from ...tracing import quiet_execution
from ...tracing.aten_calls import AtenCall, run, tensors_in
from ...tracing.calls import Call

Function = Callable[[Tensor], Tensor]
Site = tuple[fx.Node, int]

_SAME_PLACES = frozenset(["clone", "contiguous", "detach", "alias", "to", "_to_copy", "dropout", "native_dropout"])
_RESHAPES = frozenset(
    ["view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "squeeze", "unsqueeze"]
)  # fmt: skip
_SUMS = frozenset({"mean", "sum"})

# Number of a step; the axis of the features in its result, None once it is lost sight of; whether a sum lies in
# between, whose own fit sees to functions of its features; whether a function of every feature does.
_Place = tuple[int, int | None, bool, bool]


@dataclass(frozen=True, eq=False)
class Step:
    """One call on activations.

    Attributes:
        node, call: where: the call's number inside its node, counted as in `Survey`.
        name: of the call.
        inputs: numbers of the steps whose results it reads.
        single: whether it reads one tensor only.
        featurewise: whether it is a function of every element of that tensor by itself.
        apply: the call as a function of its first input.
        dim: along which it concatenates.
        shape: of the result.
        reduced: the axes of its input that it sums over; None where it is no sum.
    """

    node: fx.Node
    call: int
    name: str
    inputs: tuple[int, ...]
    single: bool
    featurewise: bool
    apply: Function
    dim: int
    shape: torch.Size
    reduced: tuple[int, ...] | None = None


@dataclass
class Flow:
    """Steps in order, who reads each, what each node returns, and which results the network returns."""

    steps: list[Step] = field(default_factory=list)
    readers: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    returned: dict[fx.Node, int] = field(default_factory=dict)
    final: set[int] = field(default_factory=set)

    def freedom(self, node: fx.Node, axis: int, fitted: Collection[Site]) -> Function | None:
        """What is done to each feature of a node's result before it is read; None unless all that reads it allows other
        combinations of the features.

        Args:
            node: whose result it is.
            axis: where its features lie along.
            fitted: the linear calls that will be fitted and read all features at once.
        """
        place = self.returned.get(node, -1)
        if place < 0:
            return None
        chain: list[Function] = []
        while len(self.readers[place]) == 1 and place not in self.final:
            step = self.steps[self.readers[place][0]]
            if not step.featurewise or (step.node, step.call) in fitted:
                break
            chain.append(step.apply)
            place = self.readers[place][0]
        if not chain and any(self.steps[number].name == "add" for number in self.readers[place]):
            summed = self.steps[place].name == "add"
            if not summed:  # the features of the sum count, not those of what is added
                return None
        return _composed(chain) if self._allowed((place, axis, False, bool(chain)), fitted) else None

    def sum_behind(self, node: fx.Node) -> fx.Node | None:
        """The node that adds the result of `node`, which nothing else reads, to another; None if there is none."""
        place = self.returned.get(node, -1)
        while place >= 0 and len(self.readers[place]) == 1 and place not in self.final:
            number = self.readers[place][0]
            step = self.steps[number]
            if step.name == "add" and len(step.inputs) == 2 and step.shape == self.steps[place].shape:
                return step.node
            if not step.single or step.name not in _SAME_PLACES | _RESHAPES:
                return None
            place = number
        return None

    def _allowed(self, start: _Place, fitted: Collection[Site]) -> bool:
        """Whether what reads a result will be fitted, or leads to such."""
        known: dict[_Place, bool] = {}
        waiting = [start]
        while waiting:
            place = waiting[-1]
            behind = None if place in known else self._leads(place, fitted)
            if place in known:
                waiting.pop()
            elif behind is None or any(known.get(own) is False for own in behind):
                known[place] = False
            elif more := [own for own in behind if own not in known]:
                waiting += more
            else:
                known[place] = True
        return known[start]

    def _leads(self, place: _Place, fitted: Collection[Site]) -> list[_Place] | None:
        """Where a result goes on to, but for calls that will be fitted; None if something else needs its features."""
        source, axis, summed, acted = place
        if source in self.final or not self.readers[source]:
            return None
        found: list[_Place] = []
        shape = self.steps[source].shape
        for number in self.readers[source]:
            step = self.steps[number]
            kept = axis if len(step.shape) == len(shape) else None
            if (step.node, step.call) in fitted:
                continue
            if step.name == "add" and len(step.inputs) == 2 and step.shape == shape:
                found.append((number, axis, True, False))
            elif step.name == "cat":
                if axis is None or step.dim % len(step.shape) != axis:
                    return None
                found.append((number, axis, summed, acted))
            elif not step.single:
                return None
            elif step.name in _SAME_PLACES:
                found.append((number, axis, summed, acted))
            elif summed and step.featurewise:
                found.append((number, axis, summed, True))
            elif step.name in _RESHAPES:
                found.append((number, None, summed, acted))
            elif step.reduced is not None:
                dims = {dim % len(shape) for dim in step.reduced}
                if axis is None or not dims or axis in dims:
                    return None
                gone = sum(dim < axis for dim in dims) if kept is None else 0
                found.append((number, axis - gone, summed, acted))
            elif step.name == "constant_pad_nd" or RULES.get(step.name) is reduction.positional:
                if "max" in step.name and not acted:  # no maximum of combinations is a combination of maxima
                    return None
                found.append((number, kept, summed, acted))
            else:
                return None
        return found


def _composed(chain: Collection[Function]) -> Function:
    def function(value: Tensor) -> Tensor:
        for apply in chain:
            value = apply(value)
        return value

    return function


class _Follow:
    """Files every call on activations."""

    def __init__(self) -> None:
        self.flow = Flow()
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []  # so that no number is given twice

    def on_node(self, node: fx.Node, value: Any) -> Any:
        """The node is done and has returned this."""
        tensors = tensors_in(value)
        if node.op == "placeholder":
            self.numbers |= {id(own): -1 for own in tensors}
        if isinstance(value, Tensor):
            self.flow.returned[node] = self.numbers.get(id(value), -1)
        if node.op == "output":
            self.flow.final |= {self.numbers.get(id(own), -1) for own in tensors}
        return value

    def on_call(self, call: AtenCall) -> Any:
        """Make a call, and file it if activations take part."""
        out = call.make()
        moving = [value for value in call.tensors() if id(value) in self.numbers]
        results = tensors_in(out)
        if moving and results:
            self._file(call, moving, results)
        self.kept.append(out)
        return out

    def _file(self, call: AtenCall, moving: list[Tensor], results: list[Tensor]) -> None:
        func, args, kwargs, tensors = call.func, call.args, call.kwargs, call.tensors()
        name, number = call.name, len(self.flow.steps)
        single = len(tensors) == 1 and bool(args) and args[0] is tensors[0]
        known = RULES.get(name) is elementwise.first_operand or (name not in RULES and is_pointwise(func))
        rest = args[1:]

        def apply(value: Tensor) -> Tensor:
            result = func(value.clone(), *rest, **kwargs)
            return tensors_in(result)[0]

        dim = args[1] if len(args) > 1 and isinstance(args[1], int) else 0
        inputs = tuple(self.numbers[id(value)] for value in moving)
        reduced = None
        if name in _SUMS:
            given = args[1] if len(args) > 1 else kwargs.get("dim")
            reduced = tuple(given) if isinstance(given, (list, tuple)) else () if given is None else (int(given),)
        self.flow.steps.append(
            Step(call.node, call.number, name, inputs, single, single and known, apply, dim, results[0].shape, reduced)
        )
        for source in inputs:
            self.flow.readers[source].append(number)
        for value in results:
            self.numbers[id(value)] = number


def follow(net: fx.GraphModule, sample: Call) -> Flow:
    """Where values go, from one run on a sample.

    >>> from torch import nn
    >>> net = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    >>> flow = follow(net, Call((torch.ones(1, 2),), {}))
    >>> [step.name for step in flow.steps]
    ['addmm', 'relu', 'addmm']
    >>> first, _, last = (node for node in net.graph.nodes if node.op == "call_module")
    >>> relu = flow.freedom(first, 1, {(last, flow.steps[-1].call)})
    >>> relu(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    >>> flow.freedom(first, 1, set()) is None  # what reads it stays as it is
    True
    """
    following = _Follow()
    with quiet_execution():
        run(net, sample, on_node=following.on_node, on_call=following.on_call)
    return following.flow

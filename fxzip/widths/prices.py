"""What a node costs as a function of its work, in the currency of a budget.

The work of a node goes with the lengths of the axes along which its features lie: those of its largest parameter, or,
without one, those of its value. FLOPs and numbers of parameters are in proportion to the work; seconds are not, and are
measured at some sizes (`latency.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..analysis.labelling import Labelling
from ..tracing import Program
from ..tracing.calls import map_tensors
from ..tracing.execution import flat_inputs, quiet_execution, storage_of


@dataclass(frozen=True)
class Price:
    """What a node costs, by its work relative to the model as it is; linear between points, and in line beyond them.

    >>> Price.proportional(6.0).at(0.5)
    3.0
    >>> seconds = Price(((0.5, 2.0), (1.0, 3.0), (2.0, 7.0)))
    >>> seconds.at(1.5), seconds.at(4.0), seconds.at(0.0)
    (5.0, 15.0, 1.0)

    Attributes:
        points: (work, cost), work rising; two at least.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def proportional(cls, cost: float) -> Price:
        """That of a node that costs in proportion to its work."""
        return cls(((0.0, 0.0), (1.0, float(cost))))

    def at(self, work: float) -> float:
        """The cost of so much work, never below zero."""
        place = min(max(bisect_left(self.points, (work,)), 1), len(self.points) - 1)
        (low, first), (high, last) = self.points[place - 1 : place + 1]
        return max(0.0, first + (last - first) * (work - low) / (high - low))


Prices = Sequence[Mapping[str, Price]]
"""Of every node of every model, by its name; nodes that cost nothing are left out."""


def flop_prices(flops: Sequence[Mapping[str, int]]) -> Prices:
    """In: the FLOPs of every node of every model."""
    return [{name: Price.proportional(cost) for name, cost in own.items() if cost} for own in flops]


def parameter_prices(labellings: Sequence[Labelling]) -> Prices:
    """Of a parameter that several nodes read the first has the price."""
    result = []
    for labelling in labellings:
        named = dict(labelling.program.module.named_parameters())
        seen: set[str] = set()
        own = {}
        for node in labelling.program.module.graph.nodes:
            new = (labelling.touches.get(node.name, frozenset()) & named.keys()) - seen
            seen |= new
            if new:
                own[node.name] = Price.proportional(sum(named[name].numel() for name in new))
        result.append(own)
    return result


def byte_prices(labellings: Sequence[Labelling]) -> Prices:
    """Of the parameters that a node is the first to read, and of its value if it lives when most values do.

    Where the peak is may change with the widths: what comes of it is measured on the result.
    """
    parameters = parameter_prices(labellings)
    result = []
    for labelling, counted in zip(labellings, parameters, strict=True):
        program = labelling.program
        width = {name: param.element_size() for name, param in program.module.named_parameters()}
        item = max(width.values(), default=4)
        living = _living_at_the_peak(program)
        own = {}
        for node in program.module.graph.nodes:
            spent = counted[node.name].at(1.0) * item if node.name in counted else 0.0
            spent += living.get(node.name, 0)
            if spent:
                own[node.name] = Price.proportional(spent)
        result.append(own)
    return result


class _Sizes(fx.Interpreter):
    """Runs a graph, and keeps the bytes of each node's value; a view lives in the memory of what it is a view of."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.bytes: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op not in ("placeholder", "get_attr", "output"):
            read = tree_leaves(self.fetch_args_kwargs_from_env(n))
            if storage_of(value) not in {storage_of(own) for own in read if isinstance(own, Tensor)}:
                self.bytes[n.name] = value.numel() * value.element_size()
        return value


def _living_at_the_peak(program: Program) -> dict[str, int]:
    """Nodes whose values live at the moment at which the most bytes do, with their bytes."""
    sized = _Sizes(program.module)
    own = map_tensors(torch.clone, program.sample)
    with quiet_execution():
        sized.run(*flat_inputs(program.module, own), enable_io_processing=False)

    living: dict[str, int] = {}
    best: dict[str, int] = {}
    nodes = program.module.graph.nodes
    left = {node.name: len(node.users) for node in nodes}
    for node in nodes:
        if node.name in sized.bytes:
            living[node.name] = sized.bytes[node.name]
        if sum(living.values()) > sum(best.values()):
            best = dict(living)
        for source in node.all_input_nodes:
            left[source.name] -= 1
            if left[source.name] == 0:
                living.pop(source.name, None)
    return best

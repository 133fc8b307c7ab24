"""What normalisations with statistics read: sums over all of it, taken as the network runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ..calibration import processes
from ..rewriting.module import ZippedModule, part_of
from .linear_calls.norms import norms_of
from .spread import Sums

_TESTED = 16  # values of each feature at least; they are held as long as the fit lasts


@dataclass(eq=False)
class Reading:
    """What a normalisation read: its names, sums over all of it, and some rows for a test."""

    norm: _NormBase
    name: str
    sums: Sums = field(default_factory=Sums)
    deviations: Sums = field(default_factory=Sums)  # of each instance, if it normalises instances
    calls: int = 0
    rows: Tensor | None = None
    wrong: str = ""

    def take(self, value: Any) -> None:
        """The argument of one call."""
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != self.norm.num_features:
            self.wrong = "it is called on something else than a batch"
            return
        if self.rows is None:
            self.rows = value.detach()[: math.ceil(_TESTED / max(math.prod(value.shape[2:]), 1))].clone()
        self.calls += 1
        if isinstance(self.norm, _InstanceNorm):
            variance, mean = torch.var_mean(value.detach().flatten(2).double(), 2)
            self.sums.add(mean, 1)
            self.deviations.add(variance, 1)
        else:
            self.sums.add(value, 1)

    def join(self) -> None:
        """Take in what the other processes have seen; rows are those of the first that has some."""
        every = processes.everyone((self.wrong, self.calls, self.rows if processes.count() > 1 else None))
        self.sums, self.deviations = self.sums.of_all(), self.deviations.of_all()
        if len(every) > 1:
            self.wrong = next((wrong for wrong, _, _ in every if wrong), "")
            self.calls = sum(calls for _, calls, _ in every)
            device = self.rows.device if self.rows is not None else torch.device("cpu")
            self.rows = next((rows.to(device) for _, _, rows in every if rows is not None), None)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance as the normalisation keeps them, float64."""
        mean, deviation = self.sums.result()
        variance = self.deviations.result()[0] if isinstance(self.norm, _InstanceNorm) else deviation.square()
        return mean, variance


@dataclass(frozen=True, eq=False)
class Readings:
    """What normalisations of a network read on some data, of this process.

    Attributes:
        by_name: of those that were seen on all of it, by their names in `norms_of`.
        batches: of the data.
    """

    by_name: Mapping[str, Reading] = field(default_factory=lambda: MappingProxyType({}))
    batches: int = 0


NO_READINGS = Readings()


def readings_by_node(network: ZippedModule) -> dict[fx.Node, Reading]:
    """The normalisations that nodes of trunk and heads call on one value, by these nodes; none that is called inside a
    leaf module, in a stem, or in another way, too."""
    norms, elsewhere = norms_of(network), set[_NormBase]()
    found: dict[fx.Node, _NormBase] = {}
    for node in network.graph.nodes:
        if node.op != "call_module":
            continue
        own = network.get_submodule(str(node.target))
        plain = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
        if own in norms and plain and not part_of(node).startswith("stem "):
            found[node] = own
        else:
            elsewhere |= {module for module in own.modules() if module in norms}
    readings = {norm: Reading(norm, norms[norm]) for norm in found.values() if norm not in elsewhere}
    return {node: readings[norm] for node, norm in found.items() if norm in readings}

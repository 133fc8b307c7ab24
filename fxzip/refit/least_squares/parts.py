"""The trunk or a head, as the walk of `LeastSquares` goes through it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ..linear_calls.units import Unit
from .dataflow import Function
from .free_features import Freedom
from .lockstep import Lockstep
from .regression_targets import HeadTargets, NarrowHeadTargets, TrunkTargets


@dataclass(eq=False)
class Part:
    """The trunk, or a head.

    Attributes:
        name: as in the nodes' meta.
        nodes: its nodes, in order.
        units: what can be fitted of it.
        originals: that have what its values should be.
        targets: what they should be.
        merged: the targets of features that were merged; None: none were.
        freedom: which of them may be other combinations than that; None: none.
    """

    name: str
    nodes: list[fx.Node]
    units: list[Unit]
    originals: Sequence[Lockstep]
    targets: TrunkTargets | HeadTargets | NarrowHeadTargets
    merged: TrunkTargets | None
    freedom: Freedom | None = None

    def starts(self) -> dict[fx.Node, list[Unit]]:
        """Units by the node of their first call."""
        found: dict[fx.Node, list[Unit]] = defaultdict(list)
        for unit in self.units:
            found[unit.sites[0].node].append(unit)
        return found

    def function(self, node: fx.Node) -> Function | None:
        """What acts on each feature of a result whose features are free; None elsewhere."""
        return None if self.freedom is None else self.freedom.function(node)

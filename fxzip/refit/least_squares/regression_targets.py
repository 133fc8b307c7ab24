"""What values of the zipped network should be: those of the originals, merged, or those of one original in its head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ...analysis import Labelling
from ...analysis.rules import varying
from ...rewriting.module import sources_of
from ...rewriting.zip_plan import ZipPlan
from ...tracing.randomness import unwatched
from ..linear_calls.counterparts import Counterparts, labels_at
from ..linear_calls.kernels import Places, as_rows, take
from ..linear_calls.units import Site, Unit
from ..unfit import Unfit
from .lockstep import Lockstep
from .node_interior import result
from .spilling import Env
from .target_merging import TargetMerging, find_merging


@dataclass(frozen=True, eq=False)
class ReadAt:
    """Where a value of an original is read: what a node returns, or the result of an ATen call of that name in it."""

    net: Lockstep
    node: fx.Node
    call: int | None = None
    name: str = ""

    def value(self, env: Env) -> Tensor:
        found: Tensor = (
            self.net.value(env, self.node)
            if self.call is None
            else result(self.net, env, self.node, self.call, self.name)
        )
        return found


@dataclass(frozen=True, eq=False)
class TargetValues:
    """Values on one batch.

    Attributes:
        axes: where the features lie along.
        shape: of the values, all places as one axis where the target is `flat`; `full` is that of the result itself.
        apart: from places to the originals' own features, not merged, one [places, n_k] for each.
        merged: from these to the values, [places, n].
        device: where they are.
    """

    axes: tuple[int, ...]
    shape: torch.Size
    full: torch.Size
    apart: Callable[[Places], list[Tensor]]
    merged: Callable[[Sequence[Tensor]], Tensor]
    device: torch.device


@dataclass(frozen=True, eq=False)
class RegressionTarget:
    """What a value should be.

    Attributes:
        axes: where its features lie along.
        readings: where the originals have it, in the order of the environments that `on` gets.
        merging: how theirs are merged; None: there is one, and it is taken as it is.
        flat: whether features come last and all places are seen as one axis.
    """

    axes: tuple[int, ...]
    readings: tuple[ReadAt, ...]
    merging: TargetMerging | None
    flat: bool = False

    def on(self, source: int, envs: Sequence[Env]) -> TargetValues:
        """The values on a batch from this source of data."""
        values = [reading.value(env) for reading, env in zip(self.readings, envs, strict=True)]
        full = list(values[0].shape)
        merging, axes = self.merging, self.axes
        if merging is not None and len(axes) == 1:
            full[-1 if self.flat else axes[0]] = merging.size
        if self.flat:
            values = [as_rows(value) for value in values]
        shape = torch.Size([math.prod(full[:-1]), full[-1]] if self.flat else full)

        def apart(places: Places) -> list[Tensor]:
            return [take(value, axes, places) for value in values]

        def merged(features: Sequence[Tensor]) -> Tensor:
            return features[0] if merging is None else merging.merged(source, features)

        return TargetValues(axes, shape, torch.Size(full), apart, merged, values[0].device)


def _seen(unit: Unit, site: Site) -> tuple[int, tuple[int, ...], bool]:
    """How a linear call's result is read: its number of axes, those of the features, and whether `flat`.

    As it is; or, features last, as one run of places, whatever shape the places have.
    """
    assert unit.kernel is not None
    axes = unit.kernel.axes
    last = axes == (len(site.shape) - 1,)
    if site.returned is None:
        return len(site.shape), (1,) if last else axes, last
    if site.returned == site.shape and site.end == (site.node, site.call):
        return len(site.shape), axes, False
    if not last or site.returned[-1] != site.shape[-1]:
        raise Unfit("its result is returned in another shape, in which its features do not come last")
    return len(site.returned), (1,), True


@dataclass(frozen=True, eq=False)
class TrunkTargets:
    """The targets of calls and nodes of the trunk."""

    plan: ZipPlan
    originals: Sequence[Lockstep]
    counterparts: Sequence[Counterparts]
    sources: int

    def of(self, unit: Unit, site: Site) -> RegressionTarget | None:
        """For a call of a unit; None where its features have no order of their own.

        Raises:
            Unfit: the originals do not have it as a value.
        """
        if unit.kernel is None or site.norm is not None:
            return self.at(site.output)
        ndim, axes, flat = _seen(unit, site)
        if site.returned is not None:
            found = self.at(site.output)
            if found is None or found.axes != ((ndim - 1,) if flat else axes):
                return None
            assert found.merging is not None
            return RegressionTarget(axes, found.readings, replace(found.merging, axes=axes), flat)
        twins = self.plan.trunk.alignment.pairs[sources_of(site.node)[0]]
        calls = [
            own.of(site, name, biased=unit.kernel.bias is not None)
            for own, name in zip(self.counterparts, twins, strict=True)
        ]
        with unwatched():
            merging = find_merging(self.plan, [(call.start[0].name, call.start[1]) for call in calls], self.sources)
        if merging is None or (merging.axes != unit.kernel.axes and not flat):
            return None
        readings = [ReadAt(net, *call.end, call.name) for net, call in zip(self.originals, calls, strict=True)]
        return RegressionTarget(axes, tuple(readings), replace(merging, axes=axes), flat)

    def at(self, node: fx.Node) -> RegressionTarget | None:
        """For what a node returns."""
        twins = self.plan.trunk.alignment.pairs[sources_of(node)[0]]
        with unwatched():
            merging = find_merging(self.plan, [(twin, None) for twin in twins], self.sources)
        readings = [ReadAt(net, net.nodes[twin]) for net, twin in zip(self.originals, twins, strict=True)]
        return None if merging is None else RegressionTarget(merging.axes, tuple(readings), merging)


@dataclass(frozen=True, eq=False)
class HeadTargets:
    """The targets of calls and nodes of one head: what its own network has there.

    Attributes:
        original: the network.
        counterparts: of its calls.
        plan: what is merged.
        model: which network it is.
    """

    original: Lockstep
    counterparts: Counterparts
    plan: ZipPlan
    model: int

    @property
    def labelling(self) -> Labelling:
        """Labels of the network."""
        return self.plan.trunk.labellings[self.model]

    def of(self, unit: Unit, site: Site) -> RegressionTarget | None:
        """For a call of a unit.

        Raises:
            Unfit: the original does not have it as a value, or has its features in another order.
        """
        if unit.kernel is None:
            return self.at(site.output)
        if site.norm is not None:
            self._in_order(self.labelling.fields.get(self._twin(site.norm).name, ()))
            return RegressionTarget(unit.kernel.axes, (ReadAt(self.original, self._twin(site.norm)),), None)
        _, axes, flat = _seen(unit, site)
        if site.returned is not None:
            self._in_order(self.labelling.fields.get(self._twin(site.output).name, ()))
            return RegressionTarget(axes, (ReadAt(self.original, self._twin(site.output)),), None, flat)
        call = self.counterparts.of(site, self._twin(site.node).name, biased=unit.kernel.bias is not None)
        self._in_order(labels_at(self.labelling, call.start[0].name, call.start[1]))
        return RegressionTarget(axes, (ReadAt(self.original, *call.end, call.name),), None, flat)

    def at(self, node: fx.Node) -> RegressionTarget | None:
        """For what a node returns; None where its features do not lie in one order."""
        twin = self._twin(node)
        fields = self.labelling.fields.get(twin.name, ())
        if len(fields) != 1 or self._of_the_trunk(fields):
            return None
        axes = tuple(sorted(varying(fields[0])))
        return RegressionTarget(axes, (ReadAt(self.original, twin),), None) if axes else None

    def _in_order(self, fields: Sequence[Tensor]) -> None:
        if self._of_the_trunk(fields):
            raise Unfit("its values hold features of the trunk beside its own, in the order of the trunk")

    def _of_the_trunk(self, fields: Sequence[Tensor]) -> bool:
        """Whether some of the fields are those of spaces that the head reads as they are merged, in another order than
        the network's own."""
        trunk, k = self.plan.trunk, self.model
        spaces = trunk.spaces[k]
        for labels in fields:
            reached = trunk.reach[k][labels.reshape(-1)]
            here = spaces.space_of[spaces.klass[reached[reached > 0]]].unique().tolist()
            for number in {own for own in here if own >= 0} & self.plan.folded[k]:
                matrix = self.plan.merges[number].U(k)
                if matrix.shape[0] != matrix.shape[1] or not torch.equal(
                    matrix, torch.eye(len(matrix), device="cpu").to(matrix)
                ):
                    return True
        return False

    def _twin(self, node: fx.Node) -> fx.Node:
        twin: fx.Node = self.original.nodes[sources_of(node)[0]]
        return twin


@dataclass(frozen=True, eq=False)
class NarrowHeadTargets:
    """The targets of a head that keeps fewer features, or of a network by itself: its own, merged where features are.

    Attributes:
        merged: in the plan of its model by itself.
        whole: of the head as it was.
    """

    merged: TrunkTargets
    whole: HeadTargets

    def of(self, unit: Unit, site: Site) -> RegressionTarget | None:
        """For a call of a unit; None where merged features have no order of their own."""
        found = self.merged.of(unit, site)
        node, call = site.output, None
        if unit.kernel is not None and site.norm is None and site.returned is None:
            name = sources_of(site.node)[0]
            own = self.whole.counterparts.of(site, name, biased=unit.kernel.bias is not None)
            node, call = site.node, own.start[1]
        return found if found is not None or self._narrow(node, call) else self.whole.of(unit, site)

    def at(self, node: fx.Node) -> RegressionTarget | None:
        """For what a node returns."""
        found = self.merged.at(node)
        return found if found is not None or self._narrow(node, None) else self.whole.at(node)

    def _narrow(self, node: fx.Node, call: int | None) -> bool:
        """Whether some of the features there are fewer than they were."""
        plan = self.merged.plan
        name, own = sources_of(node)[0], plan.trunk.spaces[0]
        found = [own.layout(labels.reshape(-1)).space for labels in labels_at(self.whole.labelling, name, call)]
        return any(not plan.kept.keys().isdisjoint(spaces.tolist()) for spaces in found)

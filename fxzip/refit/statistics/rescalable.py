"""Calls whose outputs can be rescaled feature by feature: where statistics are refitted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...analysis.rules import varying
from ...rewriting.batchnorm_affine import rescale
from ...rewriting.module import ZippedModule, part_of, sources_of
from ...rewriting.zip_plan import ZipPlan
from ...tracing.aten_calls import AtenCall, run
from ...tracing.calls import Call
from ..linear_calls.counterparts import Counterparts, labels_at
from ..linear_calls.parameter_uses import Survey, survey
from ..linear_calls.units import Unit, called, find_units
from ..unfit import Unfit

HookPoint = tuple[str, int | None]
"""Name of a node, and the number of an ATen call inside it, whose result is meant; None: what the node returns."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A call of the zipped network whose output can be rescaled feature by feature.

    Attributes:
        part: "trunk" or "head K".
        at: where the zipped network has the output.
        twins: model -> where it has it.
        labels: model -> the labels of the output's features; empty in heads.
        axis: along which these lie; -1: the last, of however many.
        unit: the parameters that are rescaled.
        norm: the BatchNorm whose output it is, if it is one's.
    """

    part: str
    at: HookPoint
    twins: Mapping[int, HookPoint]
    labels: Mapping[int, Tensor]
    axis: int
    unit: Unit
    norm: _BatchNorm | None

    @property
    def shifts(self) -> bool:
        """Whether there is a bias, or a place for one: else the output is scaled only."""
        kernel = self.unit.kernel
        return self.norm is not None or self.unit.owner is not None or (kernel is not None and kernel.bias is not None)

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Let it give scale · y + shift where it gave y. In place."""
        kernel, owner = self.unit.kernel, self.unit.owner
        if self.norm is not None:
            rescale(self.norm, scale, shift)
            return
        assert kernel is not None
        kernel.rescale(scale, shift)
        if owner is not None:
            weight = kernel.weight
            owner.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)


def find_layers(net: ZippedModule, plan: ZipPlan) -> list[Layer]:
    """Calls of the trunk that write merged features with parameters of their own, with the BatchNorm behind them where
    there is one, inside leaf modules too; and the BatchNorms of the heads. One run of each network on the sample."""
    programs = plan.trunk.alignment.programs
    found = survey(net, programs[0].small_call)
    counterparts = [Counterparts(found, program) for program in programs]
    layers = _trunk_layers(net, plan, found, counterparts)
    for k in range(len(programs)):
        layers += _head_layers(net, plan, found, k)
    return layers


def _units(net: ZippedModule, found: Survey, part: str) -> list[Unit]:
    """What one call of a part computes by itself with real parameters, one for each feature or a row of them."""
    nodes = {node for node in net.graph.nodes if part_of(node) == part}
    return [unit for unit in find_units(net, found, nodes, still=True)[0] if len(unit.sites) == 1]


def _norm(net: ZippedModule, unit: Unit) -> _BatchNorm | None:
    """The BatchNorm with a weight that gives a unit's output."""
    node = unit.norm if unit.kernel is not None else unit.sites[0].node
    module = None if node is None else called(net, node)
    return module if isinstance(module, _BatchNorm) and module.weight is not None else None


def _trunk_layers(net: ZippedModule, plan: ZipPlan, found: Survey, counterparts: Sequence[Counterparts]) -> list[Layer]:
    trunk = plan.trunk
    layers = []
    for unit in _units(net, found, "trunk"):
        (site,), norm = unit.sites, _norm(net, unit)
        if norm is None and (unit.kernel is None or len(unit.kernel.axes) > 1):
            continue
        whole = norm is not None or site.returned is not None

        try:
            points = _twins(plan, unit, counterparts, whole=whole)
        except Unfit:  # a model makes other calls there
            continue
        fields = [labels_at(label, *start) for label, (start, _) in zip(trunk.labellings, points, strict=True)]
        if any(len(own) != 1 or len(varying(own[0])) != 1 for own in fields):
            continue
        if any(bool((trunk.spaces[k].layout(own[0]).space < 0).any()) for k, own in enumerate(fields)):
            continue  # features that keep their places are not merged

        (axis,) = varying(fields[0][0])
        if not whole and axis == fields[0][0].ndim - 1:
            axis = -1  # the call that adds the bias may have its positions along more axes
        at = (site.output.name, None) if whole else (site.end[0].name, site.end[1])
        twins = {k: end for k, (_, end) in enumerate(points)}
        layers.append(Layer("trunk", at, twins, {k: own[0] for k, own in enumerate(fields)}, axis, unit, norm))
    return layers


def _twins(
    plan: ZipPlan, unit: Unit, counterparts: Sequence[Counterparts], *, whole: bool
) -> list[tuple[HookPoint, HookPoint]]:
    """For every model where its labels are known and where it has the output; `whole`: as what a node returns.

    Raises:
        Unfit: a model does not make such a call.
    """
    (site,) = unit.sites
    node: fx.Node = site.output if whole else site.node
    names = plan.trunk.alignment.pairs[sources_of(node)[0]]
    if whole:
        return [((name, None), (name, None)) for name in names]
    biased = unit.kernel is not None and unit.kernel.bias is not None
    calls = [own.of(site, name, biased=biased) for own, name in zip(counterparts, names, strict=True)]
    return [((c.start[0].name, c.start[1]), (c.end[0].name, c.end[1])) for c in calls]


def _head_layers(net: ZippedModule, plan: ZipPlan, found: Survey, k: int) -> list[Layer]:
    """The BatchNorms of a head that are called once."""
    layers = []
    for unit in _units(net, found, f"head {k}"):
        norm, node = _norm(net, unit), unit.sites[0].output
        if norm is not None:
            twin = sources_of(node)[0], None
            layers.append(Layer(f"head {k}", (node.name, None), {k: twin}, {}, 1, unit, norm))
    return layers


def at_hook_points(
    module: fx.GraphModule,
    call: Call,
    points: Collection[HookPoint],
    see: Callable[[HookPoint, Tensor], Tensor],
    *,
    only: Callable[[fx.Node], bool] | None = None,
) -> None:
    """Run a network on a batch; `see` gets what it has at these points, and gives the values to go on with."""

    def on_node(node: fx.Node, value: Any) -> Any:
        point = node.name, None
        return see(point, value) if point in points else value

    def on_call(made: AtenCall) -> Any:
        point = made.node.name, made.number
        return see(point, made.make()) if point in points else made.make()

    inside = any(number is not None for _, number in points)  # else attention may stay fused
    run(module, call, on_node=on_node, on_call=on_call if inside else None, only=only)

"""Refit by statistics: REPAIR (Jordan et al., ICLR 2023, section 4).

Averaged features vary less than the features they are averaged of. REPAIR gives every merged feature the mean and
standard deviation that its members have on average in their own networks: y* ← (y* - μ*) / σ* · σ̄ + μ̄, with
σ̄ = Σ_k M_k σ_k and μ̄ = Σ_k M_k μ_k. The correction is affine, so it is folded into the BatchNorm or the linear call
that gives y*. Layers are corrected in one pass over the data, each seeing inputs that are corrected already: on every
batch a layer is given the statistics that its members have on that batch, and the statistics are accumulated. The
heads read merged features too: their BatchNorms are corrected to what they give in their own networks.

That deviation is the right one for features that are copied to their readers. Where a method unmerges them by a matrix
U (x_k ≈ U_k y*), U was found for features that vary as the mixture does: there σ̄ is the deviation of Σ_k M_k y_k.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...analysis.spaces import slots
from ...calibration.batches import not_finite
from ...partition.alignment import attribute
from ...rewriting.merged_parameters import merged_layout
from ...rewriting.module import ZippedModule
from ...rewriting.zip_plan import ZipPlan
from ...tracing import flat_inputs, quiet_execution
from ...tracing.calls import Call
from ..spread import Sums
from .rescalable import Layer, head_layers, trunk_layers

_MeanStd = tuple[Tensor, Tensor]
_TINY = 1e-6  # a standard deviation below this share of the feature's size counts as none


def _check_finite(mean: Tensor, node: str, network: str, batch: int) -> None:
    if bad := int((~mean.isfinite()).sum()):
        raise not_finite(bad, node, network, batch)


class _Original(fx.Interpreter):
    """Runs an original and takes in what its layers give: in all, and on the last batch."""

    def __init__(self, module: fx.GraphModule, axes: dict[str, int], network: str) -> None:
        super().__init__(module)
        self.axes, self.network, self.number = axes, network, 0
        self.sums = {name: Sums() for name in axes}
        self.batch: dict[str, _MeanStd] = {}
        self.values: dict[str, Tensor] = {}  # of the batch, features last; of layers in `kept`
        self.kept: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.axes:
            mean, _ = self.batch[n.name] = self.sums[n.name].add(value, self.axes[n.name])
            _check_finite(mean, n.name, self.network, self.number)
            if n.name in self.kept:
                self.values[n.name] = value.detach().movedim(self.axes[n.name], -1).clone()
        return value


@dataclass(frozen=True)
class _Move:
    """Where features of one space go in a layer."""

    sink: Tensor
    sources: tuple[Tensor, ...]
    merges: tuple[Tensor, ...]  # M_k
    mixed: bool  # unmerged by more than copies
    sums: Sums = field(default_factory=Sums)  # of Σ_k M_k y_k, if mixed

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        """Σ_k M_k v_k of values whose last axis is that of the features."""
        parts = (
            v[..., at.to(v.device)] @ m.to(v).T for v, at, m in zip(values, self.sources, self.merges, strict=True)
        )
        return sum(parts, torch.zeros((), dtype=values[0].dtype, device=values[0].device))


@dataclass(frozen=True)
class _Goal:
    """What a layer of the zipped network should give: Σ_k M_k v_k, of values v_k that its twins give."""

    layer: Layer
    moves: tuple[_Move, ...]

    @classmethod
    def of(cls, plan: ZipPlan, layer: Layer) -> _Goal:
        if layer.part != "trunk":
            return cls(layer, ())
        trunk = plan.trunk
        layouts = [trunk.spaces[k].layout(trunk.labellings[k].fields[twin][0]) for k, twin in layer.twins.items()]
        merged = merged_layout(trunk.spaces[0], trunk.labellings[0].fields[layer.twins[0]][0], plan.merges)
        moves = []
        for space in merged.space.unique().tolist():
            sources = tuple(slots(layout, trunk.partners[k][space]) for k, layout in enumerate(layouts))
            merges = tuple(plan.merges[space].M(k) for k in range(len(layouts)))
            mixed = plan.merges[space].labels() is None
            moves.append(_Move(slots(merged, space), sources, merges, mixed))
        return cls(layer, tuple(moves))

    @property
    def mixed(self) -> bool:
        """Whether the values of the twins are needed, not only their statistics."""
        return any(move.mixed for move in self.moves)

    def on_batch(self, originals: Sequence[_Original]) -> _MeanStd:
        """Mean and standard deviation on the batch that the originals have run."""
        twins = self.layer.twins.items()
        seen = [originals[k].batch[name] for k, name in twins]
        spreads = {}
        for number, move in enumerate(self.moves):
            if move.mixed:
                values = move([originals[k].values[name] for k, name in twins]).flatten(-2)
                spreads[number] = move.sums.add(values, values.ndim - 1)[1]
        return self._merged(seen, spreads)

    def in_all(self, originals: Sequence[_Original]) -> _MeanStd:
        """Mean and standard deviation over all batches so far."""
        seen = [originals[k].sums[name].result() for k, name in self.layer.twins.items()]
        return self._merged(seen, {i: move.sums.result()[1] for i, move in enumerate(self.moves) if move.mixed})

    def _merged(self, seen: Sequence[_MeanStd], spreads: Mapping[int, Tensor]) -> _MeanStd:
        if not self.moves:
            return seen[0]
        means, deviations = zip(*seen, strict=True)
        mean = means[0].new_zeros(sum(move.sink.numel() for move in self.moves))
        spread = torch.zeros_like(mean)
        for number, move in enumerate(self.moves):
            sink = move.sink.to(mean.device)
            mean[sink] = move(means)
            spread[sink] = spreads[number].reshape(sink.shape) if move.mixed else move(deviations)
        return mean, spread


class _Zipped(fx.Interpreter):
    """Runs the zipped network with every layer given the statistics of its goal on the batch (`targets`)."""

    def __init__(self, module: ZippedModule, layers: list[Layer]) -> None:
        super().__init__(module)
        self.layers = {layer.key: layer for layer in layers}
        self.sums = {key: Sums() for key in self.layers}
        self.targets: dict[tuple[str, str], _MeanStd] = {}
        self.number = 0  # of the batch

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return None
        value = super().run_node(n)
        made = n.meta.get("fxzip", {})
        layer = self.layers.get((made.get("part", ""), made.get("from", [""])[0]))
        if layer is not None:
            mean, std = self.sums[layer.key].add(value, layer.axis)
            _check_finite(mean, n.name, "the zipped network", self.number)
            scale, shift = _correction(mean, std, *self.targets[layer.key])
            shape = [1] * value.ndim
            shape[layer.axis] = -1
            value = value * scale.to(value.dtype).reshape(shape) + shift.to(value.dtype).reshape(shape)
        return value


def _correction(mean: Tensor, std: Tensor, target_mean: Tensor, target_std: Tensor) -> tuple[Tensor, Tensor]:
    """scale, shift with scale · (mean, std) + shift = target; features that do not vary are only shifted."""
    alive = std > _TINY * (mean.abs() + target_std)
    scale = torch.where(alive, target_std / std.clamp(min=torch.finfo(std.dtype).tiny), torch.ones_like(std))
    return scale, target_mean - scale * mean


def repair(zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
    """REPAIR: the zipped network with the mean and variance of every merged feature restored. A new module.

    Originals and zipped network run side by side, once over the data.
    """
    layers = trunk_layers(plan) + head_layers(plan)
    result = copy.deepcopy(zipped)
    if not layers:
        return result
    goals = [_Goal.of(plan, layer) for layer in layers]
    originals = [
        _Original(program.module, {layer.twins[k]: layer.axis for layer in layers if k in layer.twins}, f"model {k}")
        for k, program in enumerate(plan.trunk.alignment.programs)
    ]
    for goal in goals:
        if goal.mixed:
            for k, name in goal.layer.twins.items():
                originals[k].kept.add(name)
    run = _Zipped(result, layers)
    with quiet_execution():
        for run.number, call in enumerate(data):
            for original, program in zip(originals, plan.trunk.alignment.programs, strict=True):
                original.number = run.number
                original.run(*flat_inputs(program.module, call))
            for goal in goals:
                run.targets[goal.layer.key] = goal.on_batch(originals)
            run.run(*flat_inputs(result, call))
    for goal in goals:
        _fold(result, goal.layer, *_correction(*run.sums[goal.layer.key].result(), *goal.in_all(originals)))
    return result


def _fold(result: ZippedModule, layer: Layer, scale: Tensor, shift: Tensor) -> None:
    """Put y ← scale · y + shift into the layer's weight and bias."""
    owner = attribute(result, layer.weight.rpartition(".")[0])
    weight = attribute(result, layer.weight)
    with torch.no_grad():
        rows = 1 if getattr(owner, "transposed", False) and getattr(owner, "groups", 1) == 1 else 0
        if getattr(owner, "transposed", False) and owner.groups > 1:
            return
        shape = [1] * weight.ndim
        shape[rows] = -1
        weight.mul_(scale.to(weight).reshape(shape))
        bias = getattr(owner, "bias", None)
        if bias is not None:
            bias.copy_(scale.to(bias) * bias + shift.to(bias))
        elif "bias" in owner._parameters:
            owner.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)

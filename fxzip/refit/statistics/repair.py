"""Refit by statistics: REPAIR (Jordan et al., ICLR 2023, section 4).

Averaged features vary less than the features they are averaged of. REPAIR gives every merged feature the mean and
standard deviation that its members have on average in their own networks: y* ← (y* - μ*) / σ* · σ̄ + μ̄, with
σ̄ = Σ_k M_k σ_k and μ̄ = Σ_k M_k μ_k. The correction is affine, so it is folded into the BatchNorm or the linear call
that gives y*. Layers are corrected in one pass over the data, each seeing inputs that are corrected already: on every
batch a layer is given the statistics that its members have on that batch, and the statistics are accumulated. The
heads read merged features too: their BatchNorms are corrected to what they give in their own networks. Linear calls are
found wherever they are made, inside leaf modules too.

That deviation is the right one for features that are copied to their readers. Where a method unmerges them by a matrix
U (x_k ≈ U_k y*), U was found for features that vary as the mixture does: there σ̄ is the deviation of Σ_k M_k y_k.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...analysis.spaces import slots
from ...calibration.rejections import not_finite
from ...rewriting.merged_parameters import merged_layout
from ...rewriting.module import ZippedModule
from ...rewriting.zip_plan import ZipPlan
from ...tracing import Program, quiet_execution
from ...tracing.calls import Call
from ..spread import Sums
from .rescalable import HookPoint, Layer, at_hook_points, find_layers

_MeanStd = tuple[Tensor, Tensor]
_TINY = 1e-6  # a standard deviation below this share of the feature's size counts as none


def _check_finite(mean: Tensor, node: str, network: str, batch: int) -> None:
    if bad := int((~mean.isfinite()).sum()):
        raise not_finite(bad, node, network, batch)


class _Original:
    """An original, and what its layers gave: in all, and on the last batch.

    Attributes:
        axes: where its layers have their outputs, and along which axis the features lie there.
        kept: those whose values are needed.
        values: of the batch, features last.
    """

    def __init__(self, program: Program, name: str, axes: Mapping[HookPoint, int], kept: Collection[HookPoint]) -> None:
        self.program, self.name, self.axes, self.kept = program, name, axes, kept
        self.sums = {point: Sums() for point in axes}
        self.batch: dict[HookPoint, _MeanStd] = {}
        self.values: dict[HookPoint, Tensor] = {}

    def run(self, call: Call, batch: int) -> None:
        """Run it on a batch."""

        def see(point: HookPoint, value: Tensor) -> Tensor:
            mean, _ = self.batch[point] = self.sums[point].add(value, self.axes[point])
            _check_finite(mean, point[0], self.name, batch)
            if point in self.kept:
                self.values[point] = value.detach().movedim(self.axes[point], -1).clone()
            return value

        at_hook_points(self.program.module, call, self.axes, see)


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
class _Target:
    """The statistics that a layer of the zipped network should have: of Σ_k M_k v_k, of values v_k of its twins."""

    layer: Layer
    moves: tuple[_Move, ...]

    @classmethod
    def of(cls, plan: ZipPlan, layer: Layer) -> _Target:
        if layer.part != "trunk":
            return cls(layer, ())
        trunk = plan.trunk
        layouts = [trunk.spaces[k].layout(labels) for k, labels in layer.labels.items()]
        merged = merged_layout(trunk.spaces[0], layer.labels[0], plan.merges)
        moves = []
        for space in merged.space.unique().tolist():
            sources = tuple(slots(layout, space) for layout in layouts)
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
        """Mean and standard deviation over all batches so far, of all processes."""
        seen = [originals[k].sums[name].of_all().result() for k, name in self.layer.twins.items()]
        mixed = {i: move.sums.of_all().result()[1] for i, move in enumerate(self.moves) if move.mixed}
        return self._merged(seen, mixed)

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


def _correction(
    layer: Layer, mean: Tensor, std: Tensor, target_mean: Tensor, target_std: Tensor
) -> tuple[Tensor, Tensor]:
    """scale, shift with scale · (mean, std) + shift = target; features that do not vary are only shifted, and those of
    a layer that has no place for a bias only scaled."""
    alive = std > _TINY * (mean.abs() + target_std)
    scale = torch.where(alive, target_std / std.clamp(min=torch.finfo(std.dtype).tiny), torch.ones_like(std))
    return scale, target_mean - scale * mean if layer.shifts else torch.zeros_like(scale)


def repair(zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
    """REPAIR: the zipped network with the mean and variance of every merged feature restored. A new module.

    Originals and zipped network run side by side, once over the data.
    """
    result = copy.deepcopy(zipped)
    with quiet_execution():
        layers = find_layers(result, plan)
        if not layers:
            return result
        targets = [_Target.of(plan, layer) for layer in layers]
        originals = _originals(plan, targets)
        sums = {layer.at: Sums() for layer in layers}
        for number, call in enumerate(data):
            for original in originals:
                original.run(call, number)
            _correct(result, call, targets, originals, sums, number)

    for target in targets:
        layer = target.layer
        with torch.no_grad():
            layer.rescale(*_correction(layer, *sums[layer.at].of_all().result(), *target.in_all(originals)))
    return result


def _originals(plan: ZipPlan, targets: Sequence[_Target]) -> list[_Original]:
    result = []
    for k, program in enumerate(plan.trunk.alignment.programs):
        mine = [target for target in targets if k in target.layer.twins]
        axes = {target.layer.twins[k]: target.layer.axis for target in mine}
        kept = {target.layer.twins[k] for target in mine if target.mixed}
        result.append(_Original(program, f"model {k}", axes, kept))
    return result


def _correct(
    net: ZippedModule, call: Call, targets: Sequence[_Target], originals: Sequence[_Original],
    sums: Mapping[HookPoint, Sums], batch: int,
) -> None:  # fmt: skip
    """Run the zipped network with every layer given the statistics of its target on the batch, and sum up what it has
    without."""
    wanted = {target.layer.at: (target.layer, target.on_batch(originals)) for target in targets}

    def see(point: HookPoint, value: Tensor) -> Tensor:
        layer, goal = wanted[point]
        mean, std = sums[point].add(value, layer.axis)
        _check_finite(mean, point[0], "the zipped network", batch)
        scale, shift = _correction(layer, mean, std, *goal)
        shape = [1] * value.ndim
        shape[layer.axis] = -1
        return value * scale.to(value.dtype).reshape(shape) + shift.to(value.dtype).reshape(shape)

    at_hook_points(net, call, wanted, see, only=lambda node: node.op != "output")

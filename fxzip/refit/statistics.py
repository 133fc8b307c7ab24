"""Refit by statistics: REPAIR (Jordan et al., ICLR 2023, section 4).

Averaged features vary less than the features they are averaged of. REPAIR gives every merged feature the mean and
standard deviation that its members have on average in their own networks: y* ← (y* - μ*) / σ* · σ̄ + μ̄, with
σ̄ = Σ_k M_k σ_k and μ̄ = Σ_k M_k μ_k. The correction is affine, so it is folded into the BatchNorm or the linear call
that gives y*. Layers are corrected in one pass over the data, each seeing inputs that are corrected already: on every
batch a layer is given the statistics that its members have on that batch, and the statistics are accumulated. The
heads read merged features too: their BatchNorms are corrected to what they give in their own networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..align import attribute
from ..analysis.spaces import slots
from ..basis import merged_layout
from ..inputs import Call, not_finite
from ..plan import ZipPlan, head_nodes
from ..rules import varying
from ..tracing import flat_inputs, quiet_execution
from ..zipped import ZippedModule

_MeanStd = tuple[Tensor, Tensor]
_TINY = 1e-6  # a standard deviation below this share of the feature's size counts as none


@dataclass(frozen=True)
class _Layer:
    """A call whose output can be rescaled feature by feature."""

    part: str  # "trunk" or "head K"
    name: str  # node in model 0, or in the head's own model
    twins: Mapping[int, str]  # model -> its node
    axis: int
    weight: str  # target in the zipped module

    @property
    def key(self) -> tuple[str, str]:
        return self.part, self.name


@dataclass
class _Sums:
    count: float = 0.0
    total: Tensor | None = None
    square: Tensor | None = None

    def add(self, value: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Take in a batch; returns its mean and standard deviation per feature."""
        exact = value.detach() if value.dtype in (torch.float32, torch.float64) else value.detach().float()
        variance, mean = torch.var_mean(exact, [a for a in range(value.ndim) if a != axis], correction=0)
        variance, mean, count = variance.double(), mean.double(), value.numel() / value.shape[axis]
        total, square = mean * count, (variance + mean.square()) * count
        self.count += count
        self.total = total if self.total is None else self.total + total
        self.square = square if self.square is None else self.square + square
        return mean, variance.sqrt()

    def result(self) -> tuple[Tensor, Tensor]:
        assert self.total is not None
        assert self.square is not None
        return _mean_std(self.count, self.total, self.square)


def _mean_std(count: float, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    mean = total / count
    return mean, (square / count - mean.square()).clamp(min=0).sqrt()


def _layers(plan: ZipPlan) -> list[_Layer]:
    """Calls that write merged features with parameters of their own, and with no BatchNorm behind to rescale them."""
    trunk = plan.trunk
    label, program = trunk.labellings[0], trunk.alignment.programs[0]
    users: dict[str, int] = {}
    for node in trunk.nodes:
        for param in label.touches[node]:
            users[param] = users.get(param, 0) + 1
    found: dict[str, _Layer] = {}
    for node in program.module.graph.nodes:
        if node.name not in set(trunk.nodes) or node.op != "call_module":
            continue
        module = attribute(program.module, str(node.target))
        fields = label.fields.get(node.name, ())
        params = label.touches[node.name]
        if len(fields) != 1 or len(varying(fields[0])) != 1 or any(users[p] > 1 for p in params):
            continue
        if not bool((trunk.spaces[0].layout(fields[0]).space >= 0).all()) or not _writes(plan, node, fields[0]):
            continue
        (axis,) = varying(fields[0])
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        weight = getattr(module, "weight", None)
        linear = isinstance(weight, Tensor) and weight.ndim > 1 and list(dict(module.named_children())) == []
        if linear and not isinstance(module, nn.Embedding) and f"{node.target}.weight" in params:
            found[node.name] = _layer(plan, node, axis)
        elif norm and isinstance(weight, Tensor):
            found.pop(node.all_input_nodes[0].name, None)
            found[node.name] = _layer(plan, node, axis)
    return list(found.values())


def _writes(plan: ZipPlan, node: fx.Node, labels: Tensor) -> bool:
    """Whether the weight of a module call has one entry (or row) per feature of what the call returns."""
    spaces = plan.trunk.spaces[0]
    weight = spaces.labelling.params.get(f"{node.target}.weight")
    mine = spaces.klass[labels.reshape(-1)]
    runs = [run.reshape(-1) for run in weight.fields[:2]] if weight is not None else []
    return any(len(run) == len(mine) and bool((spaces.klass[run] == mine).all()) for run in runs)


def _layer(plan: ZipPlan, node: fx.Node, axis: int) -> _Layer:
    twins = plan.trunk.alignment.pairs[node.name]
    return _Layer("trunk", node.name, dict(enumerate(twins)), axis, f"trunk.{node.target}.weight")


def _head_layers(plan: ZipPlan) -> list[_Layer]:
    """The BatchNorms of the heads that are called once."""
    found = []
    for k, program in enumerate(plan.trunk.alignment.programs):
        own = set(head_nodes(plan.trunk, k))
        calls = [n for n in program.module.graph.nodes if n.name in own and n.op == "call_module"]
        for node in calls:
            module = attribute(program.module, str(node.target))
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(module.weight, Tensor)
            if norm and sum(attribute(program.module, str(n.target)) is module for n in calls) == 1:
                found.append(_Layer(f"head {k}", node.name, {k: node.name}, 1, f"head_{k}.{node.target}.weight"))
    return found


def _check_finite(mean: Tensor, node: str, network: str, batch: int) -> None:
    if bad := int((~mean.isfinite()).sum()):
        raise not_finite(bad, node, network, batch)


class _Original(fx.Interpreter):
    """Runs an original and takes in what its layers give: in all, and on the last batch."""

    def __init__(self, module: fx.GraphModule, axes: dict[str, int], network: str) -> None:
        super().__init__(module)
        self.axes, self.network, self.number = axes, network, 0
        self.sums = {name: _Sums() for name in axes}
        self.batch: dict[str, _MeanStd] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.axes:
            mean, _ = self.batch[n.name] = self.sums[n.name].add(value, self.axes[n.name])
            _check_finite(mean, n.name, self.network, self.number)
        return value


def _mean(values: Tensor, matrix: Tensor) -> Tensor:
    return values @ matrix.T


def _spread(deviations: Tensor, matrix: Tensor) -> Tensor:
    """M_k σ_k; where M_k is no mean, the deviations of M_k x_k with the features of the model taken as uncorrelated."""
    if bool((matrix >= 0).all()):
        return _mean(deviations, matrix)
    return _mean(deviations.square(), matrix.square()).sqrt()


@dataclass(frozen=True)
class _Goal:
    """What a layer of the zipped network should give: Σ_k M_k v_k, of values v_k that its twins give."""

    layer: _Layer
    moves: tuple[tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]], ...]  # sink, source and M_k per model

    @classmethod
    def of(cls, plan: ZipPlan, layer: _Layer) -> _Goal:
        if layer.part != "trunk":
            return cls(layer, ())
        trunk = plan.trunk
        layouts = [trunk.spaces[k].layout(trunk.labellings[k].fields[twin][0]) for k, twin in layer.twins.items()]
        merged = merged_layout(trunk.spaces[0], trunk.labellings[0].fields[layer.twins[0]][0], plan.merges)
        moves = []
        for space in merged.space.unique().tolist():
            sources = tuple(slots(layout, trunk.partners[k][space]) for k, layout in enumerate(layouts))
            merges = tuple(plan.merges[space].M(k) for k in range(len(layouts)))
            moves.append((slots(merged, space), sources, merges))
        return cls(layer, tuple(moves))

    def __call__(self, seen: Sequence[_MeanStd]) -> _MeanStd:
        """Mean and standard deviation, from those of the twins."""
        return self._merged([mean for mean, _ in seen]), self._merged([std for _, std in seen], _spread)

    def _merged(self, values: Sequence[Tensor], mapped: Callable[[Tensor, Tensor], Tensor] = _mean) -> Tensor:
        if not self.moves:
            return values[0]
        result = values[0].new_zeros(sum(sink.numel() for sink, _, _ in self.moves))
        for sink, sources, merges in self.moves:
            parts = [mapped(v[at.to(v.device)], m.to(v)) for v, at, m in zip(values, sources, merges, strict=True)]
            result[sink.to(result.device)] = torch.stack(parts).sum(0)
        return result


class _Zipped(fx.Interpreter):
    """Runs the zipped network with every layer given the statistics of its goal on the batch (`targets`)."""

    def __init__(self, module: ZippedModule, layers: list[_Layer]) -> None:
        super().__init__(module)
        self.layers = {layer.key: layer for layer in layers}
        self.sums = {key: _Sums() for key in self.layers}
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
    layers = _layers(plan) + _head_layers(plan)
    result = copy.deepcopy(zipped)
    if not layers:
        return result
    goals = [_Goal.of(plan, layer) for layer in layers]
    originals = [
        _Original(program.module, {layer.twins[k]: layer.axis for layer in layers if k in layer.twins}, f"model {k}")
        for k, program in enumerate(plan.trunk.alignment.programs)
    ]
    run = _Zipped(result, layers)
    with quiet_execution():
        for run.number, call in enumerate(data):
            for original, program in zip(originals, plan.trunk.alignment.programs, strict=True):
                original.number = run.number
                original.run(*flat_inputs(program.module, call))
            for goal in goals:
                run.targets[goal.layer.key] = goal([originals[k].batch[n] for k, n in goal.layer.twins.items()])
            run.run(*flat_inputs(result, call))
    for goal in goals:
        wanted = goal([originals[k].sums[n].result() for k, n in goal.layer.twins.items()])
        _fold(result, goal.layer, *_correction(*run.sums[goal.layer.key].result(), *wanted))
    return result


def _fold(result: ZippedModule, layer: _Layer, scale: Tensor, shift: Tensor) -> None:
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

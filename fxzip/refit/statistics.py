"""Refit by statistics: BatchNorm reset, and REPAIR (Jordan et al., ICLR 2023, section 4).

Averaged features vary less than the features they are averaged of. REPAIR gives every merged feature the mean and
standard deviation that its members have on average in their own networks: y* ← (y* - μ*) / σ* · σ̄ + μ̄, with
σ̄ = Σ_k M_k σ_k and μ̄ = Σ_k M_k μ_k. The correction is affine, so it is folded into the BatchNorm or the linear call that
gives y*. Layers are corrected in one pass over the data, each seeing inputs that are corrected already: on every batch
a layer is normalised by that batch's statistics, as BatchNorm is in training, and the statistics are accumulated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..align import attribute
from ..analysis.spaces import slots
from ..inputs import Call
from ..plan import ZipPlan
from ..rewrite import ZippedModule
from ..rules import varying
from ..tracing import flat_inputs, quiet_execution

_TINY = 1e-6  # a standard deviation below this share of the feature's size counts as none


@dataclass(frozen=True)
class _Layer:
    """A call of the trunk whose output can be rescaled feature by feature."""

    name: str  # node in model 0
    twins: tuple[str, ...]
    axis: int
    weight: str  # target in the zipped module
    bias: str | None
    norm: bool


@dataclass
class _Sums:
    count: float = 0.0
    total: Tensor | None = None
    square: Tensor | None = None

    def add(self, value: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Take in a batch; returns its mean and standard deviation per feature."""
        flat = value.detach().movedim(axis, -1).flatten(0, -2).double()
        total, square = flat.sum(0), flat.square().sum(0)
        self.count += len(flat)
        self.total = total if self.total is None else self.total + total
        self.square = square if self.square is None else self.square + square
        return _mean_std(float(len(flat)), total, square)

    def result(self) -> tuple[Tensor, Tensor]:
        assert self.total is not None
        assert self.square is not None
        return _mean_std(self.count, self.total, self.square)


def _mean_std(count: float, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    mean = total / count
    return mean, (square / count - mean.square()).clamp(min=0).sqrt()


def _layers(plan: ZipPlan) -> list[_Layer]:
    """Calls that write merged features with parameters of their own, and are not rescaled by a BatchNorm behind them."""
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
        if not bool((trunk.spaces[0].layout(fields[0]).space >= 0).all()):
            continue
        (axis,) = varying(fields[0])
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        weight = getattr(module, "weight", None)
        linear = isinstance(weight, Tensor) and weight.ndim > 1 and list(dict(module.named_children())) == []
        if linear and not isinstance(module, nn.Embedding) and f"{node.target}.weight" in params:
            bias = f"trunk.{node.target}.bias" if getattr(module, "bias", None) is not None else None
            found[node.name] = _layer(plan, node, axis, bias, norm=False)
        elif norm and isinstance(weight, Tensor):
            found.pop(node.all_input_nodes[0].name, None)
            found[node.name] = _layer(plan, node, axis, f"trunk.{node.target}.bias", norm=True)
    return list(found.values())


def _layer(plan: ZipPlan, node: fx.Node, axis: int, bias: str | None, *, norm: bool) -> _Layer:
    twins = plan.trunk.alignment.pairs[node.name]
    return _Layer(node.name, twins, axis, f"trunk.{node.target}.weight", bias, norm)


class _Original(fx.Interpreter):
    """Runs an original and takes in what its layers give."""

    def __init__(self, module: fx.GraphModule, wanted: dict[str, tuple[_Sums, int]]) -> None:
        super().__init__(module)
        self.wanted = wanted

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            sums, axis = self.wanted[n.name]
            sums.add(value, axis)
        return value


def _targets(plan: ZipPlan, layers: list[_Layer], data: Iterable[Call]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation that each merged feature should have, per layer."""
    trunk = plan.trunk
    models = range(len(trunk.spaces))
    sums = [{layer.twins[k]: (_Sums(), layer.axis) for layer in layers} for k in models]
    with quiet_execution():
        for call in data:
            for k in models:
                module = trunk.alignment.programs[k].module
                _Original(module, sums[k]).run(*flat_inputs(module, call))
    result = {}
    for layer in layers:
        seen = [sums[k][layer.twins[k]][0].result() for k in models]
        result[layer.name] = (_merged(plan, layer, [m for m, _ in seen]), _merged(plan, layer, [s for _, s in seen]))
    return result


def _merged(plan: ZipPlan, layer: _Layer, values: list[Tensor]) -> Tensor:
    """Σ_k M_k v_k for values per feature at a layer's output."""
    trunk = plan.trunk
    layouts = [trunk.spaces[k].layout(trunk.labellings[k].fields[twin][0]) for k, twin in enumerate(layer.twins)]
    result = values[0].new_zeros(len(layouts[0].space))
    for space in layouts[0].space.unique().tolist():
        sink = slots(layouts[0], space)
        total = torch.zeros(sink.shape, dtype=values[0].dtype, device=values[0].device)
        for k, value in enumerate(values):
            part = value[slots(layouts[k], trunk.partners[k][space]).to(value.device)]
            total = total + part @ plan.merges[space].M(k).T.to(value)
        result[sink.to(result.device)] = total
    return result


class _Zipped(fx.Interpreter):
    """Runs the zipped network with every layer normalised on the batch."""

    def __init__(self, module: ZippedModule, layers: dict[str, _Layer], targets: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__(module)
        self.layers, self.targets = layers, targets
        self.sums = {name: _Sums() for name in layers}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output" or n.meta.get("fxzip", {}).get("part", "trunk") != "trunk":
            return None
        value = super().run_node(n)
        layer = self.layers.get(n.meta.get("fxzip", {}).get("from", [""])[0])
        if layer is not None:
            mean, std = self.sums[layer.name].add(value, layer.axis)
            scale, shift = _correction(mean, std, *self.targets[layer.name])
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

    `data` is iterated twice.
    """
    layers = _layers(plan)
    result = copy.deepcopy(zipped)
    if not layers:
        return result
    targets = _targets(plan, layers, data)
    run = _Zipped(result, {layer.name: layer for layer in layers}, targets)
    with quiet_execution():
        for call in data:
            run.run(*flat_inputs(result, call))
    for layer in layers:
        _fold(result, layer, *_correction(*run.sums[layer.name].result(), *targets[layer.name]))
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


def reset_batchnorm(zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
    """BatchNorm statistics of the trunk re-estimated on `data`: the mean over batches, in training mode. A new module."""
    result = copy.deepcopy(zipped)
    names = [
        str(node.target)
        for node in result.graph.nodes
        if node.op == "call_module" and node.meta.get("fxzip", {}).get("part") == "trunk"
        and isinstance(attribute(result, str(node.target)), nn.modules.batchnorm._BatchNorm)
    ]  # fmt: skip
    norms = [attribute(result, name) for name in dict.fromkeys(names)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        return result
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    run = _Zipped(result, {}, {})
    with quiet_execution():
        for call in data:
            run.run(*flat_inputs(result, call))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    del plan
    return result

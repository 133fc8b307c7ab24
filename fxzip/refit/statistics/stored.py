"""Refit without data: variances of merged features from the statistics that BatchNorms have stored.

A BatchNorm behind a linear call knows the mean μ and the variance σ² of what the call gives. The merged call gives
y* = Σ_k M_k y_k, if its inputs are those of the originals. Its mean is Σ_k M_k μ_k. Its variance is not the mean of
the variances: averaged features vary less than their members, and a BatchNorm that divides by too large a deviation
passes on less, layer after layer. With the correlation of two features estimated by the cosine of their kernels (exact
for uncorrelated inputs of equal size),

    σ*² = ‖ Σ_k M_k r_k ‖²,   r_k = σ_k W_k U_k / ‖W_k‖   row by row.

A method of task vectors makes other kernels W* than that mean. Then σ*² = ‖W*‖² · mean_k σ_k² / ‖W_k‖²: a variance goes
with the square of its kernel.

What that leaves out are the inputs' own correlations; with a few batches of data, REPAIR (Jordan et al., ICLR 2023)
measures what is estimated here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...partition.alignment import attribute
from ...rewriting.merged_parameters import Change, share
from ...rewriting.module import ZippedModule, part_of
from ...rewriting.zip_plan import ZipPlan
from ...tracing import quiet_execution
from ...tracing.calls import Call
from ..linear_calls.parameter_uses import storage_of, survey
from ..linear_calls.units import find_units
from ..refitted import Refitted, noting


@noting
def stored_statistics(zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> Refitted:
    """The zipped network with the running variances of its BatchNorms estimated as above; `data` is not looked at.

    In: a zipped network and its plan. Out: a new module; networks without BatchNorm come back as they are.
    """
    del data
    result = copy.deepcopy(zipped)
    norms = _norms(result, plan)
    for norm in norms:
        held = attribute(result, f"trunk.{norm.variance}")
        variance = _variance(plan, norm)
        if plan.combination is not None:
            kernel = attribute(result, f"trunk.{norm.weight}").detach().double()
            variance = _gain(plan, norm) * _squares(kernel, norm.axis)
        held.copy_(variance.to(held))
    if norms:
        return Refitted(result)
    return Refitted(result, ("no BatchNorm has stored the statistics of a linear call: the refit changed nothing",))


@dataclass(frozen=True)
class _Norm:
    """A BatchNorm with the linear call in front of it: names of model 0's parameters, and the axis of the weight that
    its outputs lie along."""

    variance: str
    weight: str
    axis: int


def _norms(net: ZippedModule, plan: ZipPlan) -> list[_Norm]:
    """The BatchNorms of the trunk behind linear calls with whole parameters as their weights."""
    trunk = plan.trunk
    nodes = {node for node in net.graph.nodes if part_of(node) == "trunk"}
    with quiet_execution():
        units, _ = find_units(net, survey(net, trunk.alignment.programs[0].small_call), nodes, still=True)
    names = {storage_of(param): name.removeprefix("trunk.") for name, param in net.named_parameters()}
    found = []
    for unit in units:
        if unit.norm is None or unit.kernel is None:
            continue
        variance = f"{str(unit.norm.target).removeprefix('trunk.')}.running_var"
        weight = names.get(storage_of(unit.kernel.weight), "")
        axis = unit.kernel.outputs_along(attribute(net, f"trunk.{weight}")) if weight else None
        # What has no labels, or is computed from others, has no counterpart in the models.
        if axis is not None and variance in trunk.labellings[0].params and weight in trunk.labellings[0].params:
            found.append(_Norm(variance, weight, axis))
    return found


def _variance(plan: ZipPlan, norm: _Norm) -> Tensor:
    """σ*², [features]."""
    trunk = plan.trunk
    total = torch.zeros((), device="cpu")
    for k, program in enumerate(trunk.alignment.programs):
        change = Change(trunk.spaces[k], trunk.spaces[0], plan.merges, k)
        names = [trunk.alignment.params[name][k] for name in (norm.weight, norm.variance)]
        kernel, own = (attribute(program.module, name).detach().double() for name in names)
        size = kernel.square().sum([a for a in range(kernel.ndim) if a != norm.axis], keepdim=True).sqrt()
        deviation = own.sqrt().reshape([-1 if a == norm.axis else 1 for a in range(kernel.ndim)])
        rows = deviation * kernel / size.clamp(min=torch.finfo(size.dtype).tiny)
        part = share(rows, names[0], norm.weight, change)
        total = part.value + total.to(part.value)
    return _squares(total, norm.axis)


def _gain(plan: ZipPlan, norm: _Norm) -> Tensor:
    """The mean of σ_k² / ‖W_k‖², [features], for features that stand where they are in all models."""
    found = []
    for k, program in enumerate(plan.trunk.alignment.programs):
        names = [plan.trunk.alignment.params[name][k] for name in (norm.weight, norm.variance)]
        kernel, variance = (attribute(program.module, name).detach().double() for name in names)
        size = _squares(kernel, norm.axis)
        found.append(variance / size.clamp(min=torch.finfo(size.dtype).tiny))
    return torch.stack(found).mean(0)


def _squares(kernel: Tensor, axis: int) -> Tensor:
    """Sums of squares over all axes but one."""
    return kernel.square().sum([a for a in range(kernel.ndim) if a != axis])

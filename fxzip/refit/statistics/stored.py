"""Refit without data: variances of merged features from the statistics that BatchNorms have stored.

A BatchNorm behind a linear call knows the mean μ and the variance σ² of what the call gives. The merged call gives
y* = Σ_k M_k y_k, if its inputs are those of the originals. Its mean is Σ_k M_k μ_k. Its variance is not the mean of
the variances: averaged features vary less than their members, and a BatchNorm that divides by too large a deviation
passes on less, layer after layer. With the correlation of two features estimated by the cosine of their kernels (exact
for uncorrelated inputs of equal size),

    σ*² = ‖ Σ_k M_k r_k ‖²,   r_k = σ_k W_k U_k / ‖W_k‖   row by row.

What that leaves out are the inputs' own correlations; with a few batches of data, REPAIR (Jordan et al., ICLR 2023)
measures what is estimated here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from ...partition.alignment import attribute
from ...rewriting.batchnorm_folding import FoldedNorm, find_norms
from ...rewriting.merged_parameters import share
from ...rewriting.module import ZippedModule
from ...rewriting.zip_plan import ZipPlan
from ...tracing.calls import Call


def stored_statistics(zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
    """The zipped network with the running variances of its BatchNorms estimated as above; `data` is not looked at.

    In: a zipped network and its plan. Out: a new module; networks without BatchNorm come back as they are.
    """
    del data
    result = copy.deepcopy(zipped)
    trunk = plan.trunk
    module = trunk.alignment.programs[0].module
    norms = [
        norm
        for norm in find_norms(module, set(trunk.nodes))
        if norm.linear and f"{norm.norm}.running_var" in trunk.labellings[0].params
    ]
    for norm in norms:
        held = attribute(result, f"trunk.{norm.norm}").running_var
        held.copy_(_variance(plan, norm).to(held))
    if not norms:
        result.meta["fxzip_fit"] = "no BatchNorm has stored the statistics of a linear call: the refit changed nothing"
    return result


def _variance(plan: ZipPlan, norm: FoldedNorm) -> Tensor:
    """σ*², [features]."""
    trunk = plan.trunk
    weight, variance = f"{norm.linear}.weight", f"{norm.norm}.running_var"
    total = torch.zeros(())
    for k, program in enumerate(trunk.alignment.programs):
        names = [trunk.alignment.params[name][k] for name in (weight, variance)]
        kernel, own = (attribute(program.module, name).detach().double() for name in names)
        size = kernel.square().sum([a for a in range(kernel.ndim) if a != norm.axis], keepdim=True).sqrt()
        deviation = own.sqrt().reshape([-1 if a == norm.axis else 1 for a in range(kernel.ndim)])
        rows = deviation * kernel / size.clamp(min=torch.finfo(size.dtype).tiny)
        part = share(rows, names[0], weight, trunk.spaces[k], trunk.spaces[0], trunk.partners[k], plan.merges, k)
        total = part.value + total.to(part.value)
    return total.square().sum([a for a in range(total.ndim) if a != norm.axis])

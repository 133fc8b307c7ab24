"""Each network on its own in the basis of a plan: the same function, its features where the first network has them.

That takes a plan whose merges pair features one to one: U_k is a permutation, and θ_k' has every written axis moved by
U_kᵀ and every axis that is summed over by U_k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..matching import Merge
from .merged_parameters import Change, share
from .zip_plan import ZipPlan


def check_paired(plan: ZipPlan, what: str) -> None:
    """Every space must be matched one to one; `what` needs it.

    Raises:
        InputError: a space is not, with the first such.
    """
    lost = [
        number for number, merge in plan.merges.items() if not all(merge.bijective(k) for k in range(len(merge.sizes)))
    ]
    if lost:
        name = plan.trunk.spaces[0].spaces[lost[0]].name
        raise InputError(
            f"{what} needs features that are paired one to one; the method does not in {len(lost)} of "
            f'{len(plan.merges)} spaces, first in that of `{name}`. Use `method="permute"`, or `"average"` for '
            "networks fine-tuned from one initialisation."
        )


def aligned_tensors(plan: ZipPlan, k: int) -> dict[str, Tensor]:
    """Floating parameters and buffers of model k in the plan's basis, float64, by their names in model 0."""
    trunk = plan.trunk
    module = trunk.alignment.programs[k].module
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    merges = {s: Merge(m.U(k).T, m.U(k), (m.sizes[k],), 1.0) for s, m in plan.merges.items()}
    change = Change(trunk.spaces[k], trunk.spaces[0], merges, 0)
    result = {}
    for name in sorted({param for node in trunk.nodes for param in trunk.labellings[0].touches[node]}):
        twin = trunk.alignment.params[name][k]
        value = tensors[twin].detach()
        if not (value.is_floating_point() or value.is_complex()):
            continue
        value = value.to(torch.promote_types(value.dtype, torch.float64))
        if name in trunk.spaces[0].labelling.params:
            part = share(value, twin, name, change)
            value = part.value
        result[name] = value
    return result

"""BatchNorms of a trunk whose features are mixed by linear maps (CCA Merge) instead of averaged.

A BatchNorm in evaluation is affine, s · (W x + b) + t (see `folding`), but not linear in its tensors: M γ, M σ² make no
sense for an M that is no mean. So it is taken into the linear call in front of it, W* = Σ_k M_k (s_k W_k) U_k, and
set so that it only shifts,

    β* = Σ_k M_k β_k,   μ* = Σ_k M_k s_k (μ_k - b_k),   γ* = √(σ*² + ε) = g,   g² = mean_k of T_k² γ_k²,  T_k = K M_k

which is exact. With g, the deviation that its features have if those of a model are uncorrelated, statistics may be
estimated anew. A BatchNorm behind anything else takes g and the like for σ*, which is an approximation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..matching.activations.cca import is_mean
from ..partition.alignment import attribute
from .batchnorm_folding import FoldedNorm, find_norms, scale_and_shift
from .merged_parameters import Merges, merged_param
from .module import set_tensor
from .zip_plan import ZipPlan


def mix_norms(module: nn.Module, plan: ZipPlan) -> None:
    """Set the BatchNorms whose features are mixed, and the linear calls in front of them. In place.

    Args:
        module: model 0's graph module with merged parameters.
        plan: of the zip.
    """
    trunk = plan.trunk
    mixed = {space for space, merge in plan.merges.items() if not is_mean(merge)}
    for found in find_norms(trunk.alignment.programs[0].module, set(trunk.nodes)) if mixed else ():
        labels = trunk.spaces[0].labelling.params.get(f"{found.norm}.running_var")
        here = trunk.spaces[0].layout(labels.fields[0].reshape(-1)).space if labels is not None else torch.zeros(0)
        if not mixed.isdisjoint(here.tolist()):
            _Mixed.of(module, plan, found, mixed).set()


@dataclass(frozen=True, eq=False)
class _Mixed:
    """One BatchNorm of the trunk and its twins, each with the linear call in front of it, if there is one."""

    module: nn.Module
    plan: ZipPlan
    found: FoldedNorm
    twins: tuple[tuple[Any, Any], ...]
    squared: Merges  # K M_k² in the place of M_k

    @classmethod
    def of(cls, module: nn.Module, plan: ZipPlan, found: FoldedNorm, mixed: Collection[int]) -> _Mixed:
        params = plan.trunk.alignment.params
        names = [params[f"{found.norm}.running_var"]]
        names.append(params[f"{found.linear}.weight"] if found.linear else names[0])
        twins = tuple(
            (attribute(program.module, norm.rpartition(".")[0]), attribute(program.module, linear.rpartition(".")[0]))
            for program, norm, linear in zip(plan.trunk.alignment.programs, *names, strict=True)
        )
        squared = {
            s: replace(merge, merge=merge.merge.square() * len(merge.sizes)) if s in mixed else merge
            for s, merge in plan.merges.items()
        }
        return cls(module, plan, found, twins, squared)

    def set(self) -> None:
        norm = attribute(self.module, self.found.norm)
        spread = torch.ones_like(norm.running_var)
        if norm.weight is not None:
            self._merge(
                f"{self.found.norm}.weight", [own.weight.detach().square() for own, _ in self.twins], self.squared
            )
            spread = norm.weight.detach().clamp(min=2 * norm.eps)
            set_tensor(self.module, f"{self.found.norm}.weight", spread.sqrt())
        variance = f"{self.found.norm}.running_var"
        if self.found.linear:
            self._fold()
            set_tensor(self.module, variance, spread - norm.eps)
        else:
            self._merge(variance, [own.running_var for own, _ in self.twins], self.squared)

    def _fold(self) -> None:
        scales = [scale_and_shift(own)[0] for own, _ in self.twins]
        weights, means = [], []
        for scale, (own, linear) in zip(scales, self.twins, strict=True):
            shape = [-1 if axis == self.found.axis else 1 for axis in range(linear.weight.ndim)]
            weights.append(linear.weight.detach() * scale.reshape(shape))
            means.append(scale * (own.running_mean - (0 if linear.bias is None else linear.bias.detach())))
        self._merge(f"{self.found.linear}.weight", weights, self.plan.merges)
        self._merge(f"{self.found.norm}.running_mean", means, self.plan.merges)
        bias = attribute(self.module, self.found.linear).bias
        if bias is not None:
            set_tensor(self.module, f"{self.found.linear}.bias", torch.zeros_like(bias))

    def _merge(self, name: str, values: Sequence[Tensor], merges: Merges) -> None:
        """Merge values as if they were the tensors of that name."""
        trunk = self.plan.trunk
        merged = merged_param(trunk.alignment.params[name], values, trunk.spaces, trunk.partners, merges)
        set_tensor(self.module, name, merged)

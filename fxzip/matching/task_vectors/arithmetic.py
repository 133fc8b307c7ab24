"""Task arithmetic (Ilharco et al., ICLR 2023, arXiv 2212.04089): task vectors, added up.

    θ* = θ_0 + λ Σ_k w_k τ_k

With λ = 1 / K that is the mean of the networks. Where λ cannot be tuned, 0.4 is what the authors of TIES (arXiv
2306.01708, section 6) took for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..weights_of_models import Weights, check_weights
from .method import Parameter, TaskVectorMethod

UNTUNED = 0.4
"""λ where no weights are given."""


@dataclass(frozen=True)
class TaskArithmetic(TaskVectorMethod):
    """Add task vectors to the base.

    >>> base, tuned = torch.zeros(2), (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    >>> TaskArithmetic(scale=0.5).combine([Parameter("weight", base, tuned)])
    [tensor([0.5000, 1.0000])]

    Attributes:
        scale: λ; None: 0.4, or 1 where `weights` are given.
        weights: w_k, the coefficients themselves, of any sign; None: 1 each.
    """

    name: ClassVar[str] = "task-arithmetic"
    scale: float | None = None
    weights: Weights = None

    def __post_init__(self) -> None:
        check_weights(self.weights, positive=False)

    def combine(self, parameters: Sequence[Parameter]) -> list[Tensor]:
        """θ_0 + λ Σ w_k τ_k."""
        scale = (UNTUNED if self.weights is None else 1.0) if self.scale is None else self.scale
        return [self._combined(one, scale) for one in parameters]

    def _combined(self, one: Parameter, scale: float) -> Tensor:
        weights = self.weights or (1.0,) * len(one.values)
        total = torch.zeros_like(one.base)
        for weight, value in zip(weights, one.values, strict=True):
            total += weight * (value - one.base)
        return one.base + scale * total

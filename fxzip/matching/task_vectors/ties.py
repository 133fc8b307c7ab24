"""TIES-Merging (Yadav et al., NeurIPS 2023, arXiv 2306.01708): trim, elect signs, mean of those who agree.

Each task vector keeps its greatest entries by magnitude, a share `density` of all of them; the rest is 0. The sign of
an entry of the merged vector is that of Σ_k τ_k there. The entry is the mean over the task vectors of that sign there.
θ* = θ_0 + λ τ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import OptionError
from ..weights_of_models import Weights, check_weights, relative
from .method import Parameter, TaskVectorMethod


@dataclass(frozen=True)
class Ties(TaskVectorMethod):
    """Trim, elect signs, merge.

    >>> base, tuned = torch.zeros(4), (torch.tensor([9.0, 0.1, -5.0, 0.0]), torch.tensor([7.0, 0.2, 6.0, 0.1]))
    >>> Ties(density=0.5).combine([Parameter("weight", base, tuned)])
    [tensor([8., 0., 6., 0.])]

    Attributes:
        density: share of the entries that each task vector keeps; the paper's 0.2.
        scale: λ; the paper's 1, for those who cannot tune it.
        weights: of the models, in the election and in the mean; only their ratios count. None: all alike.
    """

    name: ClassVar[str] = "ties"
    density: float = 0.2
    scale: float = 1.0
    weights: Weights = None

    def __post_init__(self) -> None:
        check_weights(self.weights)
        if not 0 < self.density <= 1:
            raise OptionError(f"`Ties` needs 0 < density <= 1; found density={self.density}. The paper's is 0.2.")

    def combine(self, parameters: Sequence[Parameter]) -> list[Tensor]:
        """θ_0 + λ τ; entries of all parameters together are trimmed."""
        if not parameters:
            return []
        least = [self._least(k, parameters) for k in range(len(parameters[0].values))]
        return [one.base + self.scale * self._elected(one, least) for one in parameters]

    def _least(self, k: int, parameters: Sequence[Parameter]) -> Tensor:
        """The least magnitude that model k's task vector keeps."""
        sizes = torch.cat([(one.values[k] - one.base).abs().flatten().float() for one in parameters])
        kept = max(round(self.density * len(sizes)), 1)
        return sizes.kthvalue(len(sizes) - kept + 1).values

    def _elected(self, one: Parameter, least: Sequence[Tensor]) -> Tensor:
        """τ. Where the trimmed vectors cancel no sign is elected, and τ is 0."""
        vectors = one.vectors()
        bounds = torch.stack(list(least)).reshape(-1, *[1] * one.base.ndim)
        vectors = torch.where(vectors.abs().float() >= bounds, vectors, 0)
        weights = vectors.new_tensor(relative(self.weights, len(vectors))).reshape(bounds.shape)
        agree = (vectors.sign() == (weights * vectors).sum(0).sign()) & (vectors != 0)
        heard = (weights * agree).sum(0)
        return (weights * vectors * agree).sum(0) / torch.where(heard == 0, 1, heard)

"""Matching by optimal transport: features of one model are spread over those of another at the least cost.

Singh and Jaggi, "Model Fusion via Optimal Transport" (NeurIPS 2020, arXiv 1910.05653). With uniform masses on the
features of model 0 and of model k and cost 1 - S, the coupling T [n_0, n_k] is the cheapest that has these masses as
its sums. Every merged feature sits at a feature of model 0, and

    M = (I, n_0 T_1, ..., n_0 T_{K-1}) / K,   U_0 = I,   U_k = n_k T_kᵀ,

whose rows sum to 1. With equal widths T is a relabelling and the result is that of `Permute`. With different widths, or
with an entropic term, U mixes features: as for clusters, that is exact through linear calls and an approximation
through nonlinear ones, and heads read their features through a matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError, OptionError
from ..merge import Merge
from ..method import SpaceMethod
from ..moments import Moments
from ..similarities import similarity
from .permute import Permute


@dataclass(frozen=True)
class Transport(SpaceMethod):
    """Optimal transport of each model's features onto those of the first. Needs POT: `pip install 'fxzip[ot]'`.

    O(n³ log n) time for each pair of models, much less with `entropy`.

    Attributes:
        entropy: weight of the entropic term (Sinkhorn's algorithm), in units of similarity; 0: none.

    Raises:
        OptionError: `entropy` is negative, or POT is not installed.
    """

    name: ClassVar[str] = "transport"

    entropy: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.entropy < math.inf:
            raise OptionError(
                f"`Transport` needs a finite entropy >= 0; got entropy={self.entropy}. The exact coupling is 0."
            )

    @property
    def one_to_one(self) -> bool:
        """Whether the coupling of equal widths is a relabelling: without an entropic term."""
        return not self.entropy

    def relabelling(self) -> Permute:
        """`Permute`, for couplings of different widths are none."""
        return Permute()

    def __call__(self, moments: Moments, size: int | None = None) -> Merge:
        """The merge to the n_0 features of the first model.

        Raises:
            OptionError: `size` is not n_0, or POT is not installed.
            DataError: nothing was observed, or the moments are not finite.
        """
        n, count = moments.sizes[0], len(moments.sizes)
        if size not in (None, n):
            raise OptionError(f"`transport` keeps the features of the first model: `size` must be {n}; got {size}.")

        library = _library()
        alike = similarity(moments)
        merge, unmerge = [torch.eye(n, device="cpu").double()], [torch.eye(n, device="cpu").double()]

        value = 0.0
        for start, end in pairwise(moments.offsets()[1:]):
            cross = alike[:n, start:end].cpu()
            coupling = _coupling(library, cross, self.entropy)
            merge.append(_tidy(coupling / coupling.sum(1, keepdim=True)))
            unmerge.append(_tidy((coupling / coupling.sum(0)).T))
            value += float((coupling * cross).sum()) / (count - 1)

        joint, back = torch.cat(merge, 1) / count, torch.cat(unmerge)
        return Merge(joint.to(alike.device), back.to(alike.device), moments.sizes, value if count > 1 else 1.0)


def _library() -> Any:
    try:
        import ot
    except ImportError as error:
        raise InputError(
            "`transport` needs the package POT, which is not installed. Install it with `pip install 'fxzip[ot]'`, "
            'or use `method="permute"`, which is the same for equal widths.'
        ) from error
    return ot


def _coupling(library: Any, cross: Tensor, entropy: float) -> Tensor:
    """The cheapest coupling of uniform masses, [n_0, n_k]."""
    rows, columns = (torch.full((n,), 1 / n, dtype=torch.float64, device="cpu").numpy() for n in cross.shape)
    cost = (1 - cross).numpy()
    if entropy:
        found = library.sinkhorn(rows, columns, cost, entropy, method="sinkhorn_log", numItermax=10_000)
    else:
        found = library.emd(rows, columns, cost, numItermax=10_000_000)
    return torch.as_tensor(found, dtype=torch.float64)


def _tidy(matrix: Tensor) -> Tensor:
    """Entries that differ from 0 or 1 by rounding only are made so: a relabelling is then seen as one."""
    return torch.where((matrix - matrix.round()).abs() < 1e-9, matrix.round(), matrix)

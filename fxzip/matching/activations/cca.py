"""CCA Merge: features are not paired but mixed, so that canonical correlations are greatest.

Horoi et al., "Harmony in Diversity: Merging Neural Networks with Canonical Correlation Analysis" (ICML 2024, arXiv
2407.05385, section 4). With the covariances S_00, S_kk and S_0k of the features of model 0 and of model k, and the
singular value decomposition of the whitened cross-covariance

    S_00^-½ S_0k S_kk^-½ = A diag(ρ) Bᵀ,      ρ: canonical correlations

the canonical directions of model k are written in the basis of model 0,

    T_k = S_00^½ A Bᵀ S_kk^-½,   M = (I, T_1, ..., T_{K-1}) / K,   U_0 = I,   U_k = T_k⁻¹ = S_kk^½ B Aᵀ S_00^-½.

T_k x_k has the covariance of x_0, and if x_k = Q x_0 for an orthogonal Q, then T_k = Qᵀ. The ridge γ is added to the
covariances that are inverted; the greater, the closer to an orthogonal T_k (Procrustes).

Directions in which no feature varies are left open by that; the means decide there, since m_j m_kᵀ is added to S_jk
with a small weight.

T_k is exact through linear calls. Through nonlinear ones it is an approximation, and so it is for the parameters of
a normalisation, which take M as biases do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import DataError, InputError, OptionError
from ..merge import Merge
from ..method import SpaceMethod
from ..moments import Moments

MEANS = 1e-4
"""How much the means count against the covariances."""


@dataclass(frozen=True)
class CCA(SpaceMethod):
    """Canonical correlation analysis of each model's features with those of the first. Needs equal widths.

    >>> from fxzip.matching.moments import moments
    >>> x, (q, _) = torch.randn(99, 3), torch.linalg.qr(torch.randn(3, 3))
    >>> merge = CCA()(moments([x, x @ q.T]))
    >>> torch.allclose(merge.U(1), q.double(), atol=1e-5)
    True

    O(K n³) time. Where only relabellings are legal `Permute` serves.

    Attributes:
        ridge: γ, in units of the mean variance of the features of a model.

    Raises:
        OptionError: `ridge` is negative or not finite.
    """

    name: ClassVar[str] = "cca"

    ridge: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < math.inf:
            raise OptionError(f"`CCA` needs a finite ridge >= 0; got ridge={self.ridge}. The default is 0.1.")

    def __call__(self, moments: Moments, size: int | None = None) -> Merge:
        """The merge to the n features of the first model. Its `correlation` is the mean of the ρ, ridge and all.

        Raises:
            OptionError: widths differ, or `size` is another one.
            DataError: nothing was observed, the moments are not finite, covariances without a ridge are singular, or
                the models' features are of magnitudes too far apart.
        """
        n = moments.sizes[0]
        if size not in (None, n) or len(set(moments.sizes)) > 1:
            raise InputError(
                f"`cca` keeps the features of the first model and needs as many in all: {n} and no other number; got "
                f'widths {list(moments.sizes)} and `size` {size}. Use `method="zip"` for other widths.'
            )
        covariance = _covariance(moments)
        first = slice(0, n)
        root, inverse = _roots(covariance[first, first], self.ridge)
        merge, unmerge, correlations = [torch.eye(n).to(root)], [torch.eye(n).to(root)], []
        for own in _runs(moments)[1:]:
            root_k, inverse_k = _roots(covariance[own, own], self.ridge)
            a, rho, bt = torch.linalg.svd(inverse @ covariance[first, own] @ inverse_k)
            merge.append(root @ a @ bt @ inverse_k)
            unmerge.append(root_k @ (a @ bt).T @ inverse)
            correlations.append(float(rho.mean()))
        mean = sum(correlations) / len(correlations) if correlations else 1.0
        found = Merge(torch.cat(merge, 1) / len(moments.sizes), torch.cat(unmerge), moments.sizes, mean)
        if not bool(found.merge.isfinite().all() and found.unmerge.isfinite().all()):
            spread = ", ".join(f"{float(moments.covariance.diagonal()[own].mean()):.1e}" for own in _runs(moments))
            raise DataError(
                f"`cca` needs features of comparable magnitude; the mean variances of the models are {spread}, and "
                'what turns one into another overflows. Rescale the models, or use `method="zip"`.'
            )
        return found


def _runs(moments: Moments) -> list[slice]:
    """Where each model's features lie."""
    return [slice(*pair) for pair in pairwise(moments.offsets())]


def _covariance(moments: Moments) -> Tensor:
    if moments.count == 0:
        raise DataError("`cca` needs observed features; these moments hold 0 positions. Pass `data` that reaches them.")
    found = moments.covariance
    if not bool(found.isfinite().all()):
        raise DataError(
            "`cca` needs finite moments; some covariances are not. Look for overflow or NaN in the features, or in "
            "`data`."
        )
    return found.addr_(moments.mean, moments.mean, alpha=MEANS)


def _roots(covariance: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """(S + γ)^½ and (S + γ)^-½ of a covariance [n, n], γ in units of its mean diagonal; 1 where nothing varies."""
    values, vectors = torch.linalg.eigh(covariance)
    scale = float(covariance.diagonal().mean())
    values = values.clamp(min=0) + (ridge * scale if scale > 0 else 1.0)
    if float(values.min()) <= 1e-12 * float(values.max()):
        raise DataError(
            f"`CCA(ridge={ridge:g})` needs covariances of full rank; the features of a space span fewer than their "
            f"{len(values)} dimensions on `data`. Pass more data, or a ridge such as `CCA(ridge=0.1)`."
        )
    root = values.sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def shares(merge: Merge, k: int) -> Tensor:
    """How much model k counts in each merged feature, [m]: the row sums of M_k where rows of M are means, else 1 / K.

    >>> shares(Merge.from_clusters(torch.tensor([0, 1, 1]), sizes=(2, 1)), 0)
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if is_mean(merge):
        held = merge.entries[0][k]
        return held.weights.new_zeros(merge.size).index_add_(0, held.rows, held.weights)
    return merge.merge.new_full((len(merge.merge),), 1 / len(merge.sizes))


def is_mean(merge: Merge) -> bool:
    """Whether every row of M is a weighted mean: no entry below zero, and a sum of 1.

    >>> is_mean(Merge.identity(2, models=2))
    True
    """
    return merge.averages

"""What a head or a next layer can still read: an unmerge matrix by linear regression, whatever the merge matrix is.

Averages of clusters are copied back to their members, x_i ≈ x*_c(i), as if the members were equal. But x* = M x tells
more about feature i than its own cluster does: the other clusters correlate with it too. The best linear reading is

    U = argmin E‖x - U M x‖² = C Mᵀ (M C Mᵀ)⁻¹,      C the covariance of the features,

here as a correction of the membership U₀ with a ridge, U = U₀ + (I - U₀ M) C Mᵀ (M C Mᵀ + λ)⁻¹. M U = I whatever λ, and
where the members of every cluster are equal, as in a relabelled copy, nothing is added. Linear calls take U into their
weights: it costs nothing in the trunk, needs no labels and no second pass, and is exact where the copy is.

The idea is that of lossy unmerging; ZipIt! (arXiv 2305.03053, section 3) takes U = 2 Mᵀ, the copy. What follows from
regressing weights instead of features on the network's own inputs is `refit="lstsq"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from ...errors import OptionError
from ..merge import Merge
from ..method import Method
from ..moments import Moments
from ..problem import Evidence, Problem
from .zipit import Zip


@dataclass(frozen=True)
class Recover(Method):
    """Features merged by another method, and unmerged by linear regression.

    >>> from fxzip.matching.problem import Space
    >>> from fxzip.matching.moments import moments
    >>> x = torch.randn(99, 3)
    >>> [merge] = Recover().match(Problem((Space((3, 3), moments=moments([x, x[:, [2, 0, 1]]])),)))
    >>> merge.U(1).round(decimals=6).abs()
    tensor([[0., 0., 1.],
            [1., 0., 0.],
            [0., 1., 0.]], dtype=torch.float64)

    Where only relabellings are legal, and in blocks, features come back as the inner method has them. Time of the inner
    method, and O(N² m).

    Attributes:
        inner: the method that merges; its U must be a membership.
        ridge: λ relative to the mean variance of the merged features.
    """

    name: ClassVar[str] = "recover"

    inner: Method = field(default_factory=Zip)
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise OptionError(f"`Recover` needs `ridge` > 0; got ridge={self.ridge}. The default is 1e-3.")

    @property
    def needs(self) -> frozenset[Evidence]:
        """The evidence of the inner method, and moments."""
        return self.inner.needs | {"moments"}

    def match(self, problem: Problem) -> Sequence[Merge]:
        """A merge for every space of the problem.

        Raises:
            InputError, DataError: as the inner method does.
        """
        return [
            recovered(merge, space.moments, self.ridge)
            if space.legality == "free" and space.tie is None and space.moments is not None
            else merge
            for space, merge in zip(problem.spaces, self.inner.match(problem), strict=True)
        ]

    def relabelling(self) -> Method:
        """That of the inner method."""
        return self.inner.relabelling()


def recovered(merge: Merge, moments: Moments, ridge: float) -> Merge:
    """The merge with U by regression; as it is where its U is no membership, or where features are only relabelled.

    >>> from fxzip.matching.moments import moments
    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    >>> recovered(Merge.from_clusters(torch.tensor([0, 0]), (2,)), moments([x]), 1e-9).unmerge.round(decimals=6)
    tensor([[0.4000],
            [1.6000]], dtype=torch.float64)
    """
    if merge.labels() is None or merge.size == sum(merge.sizes):
        return merge

    M, U, C = (value.to(moments.outer.device) for value in (merge.merge, merge.unmerge, moments.covariance))
    passed = C @ M.T
    kept = M @ passed
    scale = float(kept.diagonal().mean())
    if scale <= 0:
        return merge

    missed = passed - U @ kept
    ridged = kept + ridge * scale * torch.eye(len(kept), dtype=kept.dtype, device=kept.device)
    factor, info = torch.linalg.cholesky_ex(ridged)

    return merge if int(info) else replace(merge, unmerge=U + torch.cholesky_solve(missed.T, factor).T)

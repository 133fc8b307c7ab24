"""The reconstruction error of features that are taken from their own cluster alone, for the choice of widths.

A downstream weight W makes an output o, to which feature j, of variance σ_j², adds the variance σ_j² W_oj²; e_j is the
share of j in the variance of an output, averaged over all outputs of all weights. Features are vectors v_j = √e_j z_j
(z: standardised), and a cluster keeps one direction of its members, the principal one:

    error of merging clusters r, s  =  λ_r + λ_s - λ_max [[λ_r, c], [c, λ_s]],      c = max(0, <r, s>)

with λ_r the variance that cluster r has kept. The pair with the least error goes first. What other clusters explain
of a feature makes the error smaller: that is what `matching/energy/energy.py` counts, and clusters are chosen by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..moments import Moments
from ..similarities import similarity

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def variance_shares(moments: Moments, downstream: Sequence[Sequence[Tensor]]) -> Tensor:
    """e_j, float64 [N]: shares in the variance that each model's features pass on, each model's summing to 1.

    >>> from fxzip.matching.moments import moments
    >>> x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    >>> variance_shares(moments([x]), [[torch.tensor([[[1.0, 0.5]]])]])
    tensor([0.5000, 0.5000], dtype=torch.float64)

    Args:
        moments: of the space.
        downstream: for each model the weights of every parameter that sums over the space, [outputs, taps, n_k].
            Without any, each feature of a model gets the same share.
    """
    parts, tiny = [], torch.finfo(torch.float64).tiny
    for k, variance in enumerate(moments.covariance.diagonal().clamp(min=0).split(list(moments.sizes))):
        total = torch.zeros_like(variance)
        for weights in downstream[k] if downstream else ():
            passed = variance * weights.to(variance).square().sum(1)
            share = (passed / passed.sum(1, keepdim=True).clamp(min=tiny)).sum(0)
            total += share / share.sum().clamp(min=tiny)
        alive = float(total.sum())
        parts.append(total / alive if alive > 0 else torch.full_like(variance, 1 / max(len(variance), 1)))

    return torch.cat(parts)


def reconstruction_errors(moments: Moments, share: Tensor, floor: float) -> Floats:
    """Reconstruction error with m features kept, for m = 0, ..., N: float64 [N + 1], falling to 0; for m = 0 it is K.

    >>> from fxzip.matching.moments import moments
    >>> x = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    >>> reconstruction_errors(moments([x, x]), torch.full((4,), 0.5), 0.01).round(6).tolist()  # two pairs, uncorrelated
    [2.0, 1.0, 0.0, 0.0, 0.0]
    """
    alike = similarity(moments).cpu().numpy()
    share = share.clamp(min=floor * float(share.mean()))
    state = Clusters(alike, share.cpu().numpy())
    losses = np.zeros(len(share) + 1)
    for size in range(len(share) - 1, 0, -1):
        losses[size] = losses[size + 1] + state.step()
    losses[0] = float(share.sum())
    return losses


def pair_losses(own: float | Floats, other: Floats, inner: Floats) -> Floats:
    """λ_r + λ_s - λ_max (see the module) of one cluster with others, or of each of some, at least 0.

    >>> pair_losses(1.0, np.array([1.0, 1.0, 0.5]), np.array([1.0, 0.0, -0.5]))
    array([0. , 1. , 0.5])

    Args:
        own: λ_r; of several [rows, 1].
        other: λ_s, [N].
        inner: <r, s>, [N]; of several [rows, N].
    """
    product = np.maximum(inner, 0.0) ** 2
    losses: Floats = np.maximum((own + other) / 2 - np.sqrt(((own - other) / 2) ** 2 + product), 0.0)
    return losses


class Clusters:
    """The greedy loop: S[r, s] = <r, s>; each row remembers the partner with which its error is least.

    A remembered loss whose pair is gone is a lower bound of the row's present one, so it is looked up anew only when it
    comes first in line.
    """

    def __init__(self, alike: Floats, share: Floats) -> None:
        n = len(share)
        root = np.sqrt(share)
        self.S = alike * root[:, None] * root[None, :]
        np.fill_diagonal(self.S, share)
        self.cluster: Ints = np.arange(n)
        self.coefficients = np.ones(n)
        self.gone = np.zeros(n, dtype=bool)
        self.loss, self.partner, self.stale = np.full(n, np.inf), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool)

        for r in range(n):
            self._look(r)

    def step(self) -> float:
        """Merge the pair with the least error. Out: the error."""
        while True:
            r = int(self.loss.argmin())
            if not self.stale[r]:
                lost = float(self.loss[r])
                self._merge(r, int(self.partner[r]))
                return max(lost, 0.0)
            self._look(r)

    def _losses(self, r: int) -> Floats:
        """The error of merging r with each cluster, inf with itself and those that are gone."""
        loss = pair_losses(self.S[r, r], self.S.diagonal(), self.S[r])
        loss[self.gone] = np.inf
        loss[r] = np.inf
        return loss

    def _look(self, r: int) -> None:
        losses = self._losses(r)
        self.partner[r] = int(losses.argmin())
        self.loss[r], self.stale[r] = losses[self.partner[r]], False

    def _merge(self, r: int, s: int) -> None:
        """Cluster s joins cluster r; r becomes the principal direction of both."""
        S = self.S
        angle = 0.5 * np.arctan2(2 * max(S[r, s], 0.0), S[r, r] - S[s, s])
        p, q = np.cos(angle), np.sin(angle)
        kept = p * p * S[r, r] + q * q * S[s, s] + 2 * p * q * max(S[r, s], 0.0)
        row = p * S[r] + q * S[s]
        S[r], S[:, r], S[r, r] = row, row, kept
        self.coefficients[self.cluster == r] *= p
        self.coefficients[self.cluster == s] *= q
        self.cluster[self.cluster == s] = r
        self.gone[s], self.loss[s], self.stale[s] = True, np.inf, False
        self.stale |= ((self.partner == r) | (self.partner == s)) & ~self.gone
        self._look(r)
        losses = self._losses(r)
        nearer = losses < self.loss
        nearer[r] = False
        self.loss[nearer], self.partner[nearer], self.stale[nearer] = losses[nearer], r, False

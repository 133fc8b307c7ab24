"""Clusters that lose the least energy: for a refit, which finds the best use of whatever features there are.

A weight W that reads the space makes an output o of it, to which feature j, of variance σ_j², adds the energy
σ_j² W_oj²; e_j is the share of j in the energy of an output, averaged over all outputs of all readers. Zipping by
correlation alone spends as many features on what nobody reads as on what everybody does. Here features are vectors
v_j = √e_j z_j (z: standardised), and a cluster keeps one direction of its members, the principal one:

    energy lost by merging clusters r, s  =  λ_r + λ_s - λ_max [[λ_r, c], [c, λ_s]],      c = max(0, <r, s>)

with λ_r the energy that cluster r has kept. The pair that loses the least goes first. The merged feature is
r = Σ p_j v_j, and as target of a refit the average of its members with weights w_j ∝ p_j² e_j / σ_j, Σ w_j = 1, so that
what matters is kept as it is, and what does not lends it little. U stays the membership: coefficients are the refit's.

The pruning literature knows this criterion as reconstruction of the next layer's input (ThiNet, arXiv 1707.06342);
correlations with a sign below zero count as none, since a ReLU does not pass a feature and its negative alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxzip.matching.merge import Merge, cluster_merge, in_first_layout, similarity
from fxzip.matching.permute import Permute
from fxzip.matching.problem import Problem, match_spaces
from fxzip.moments import Moments

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Energy:
    """Zipping by lost energy: within and across models, for any number of models of any widths.

    >>> from fxzip.matching.problem import Space
    >>> from fxzip.moments import moments
    >>> x = torch.randn(99, 3)
    >>> [merge] = Energy().match(Problem((Space((3, 3), moments=moments([x, x[:, [2, 0, 1]]])),)))
    >>> merge.assignment(1)
    tensor([2, 0, 1])

    O(N²) time for N features in all (O(N³) in the worst case), O(N²) memory.

    Attributes:
        floor: least energy of a feature, relative to the mean: features that the data does not show, or that no weight
            reads, are not free to be lost.

    Spaces in which only relabellings are legal are matched as by `permute`.
    """

    name: ClassVar[str] = "energy"
    needs: ClassVar[frozenset[str]] = frozenset({"moments", "readers"})

    floor: float = 0.01

    def match(self, problem: Problem) -> list[Merge]:
        """A merge for every space of the problem.

        Raises:
            DataError: the moments are not finite.
        """
        merges: dict[int, Merge] = {}
        for together in problem.ties():
            space = problem.spaces[together[0]]
            if space.tie is None and space.legality == "free" and space.moments is not None:
                share = energies(space.moments, space.readers)
                merges[together[0]] = energy_merge(space.moments, share, space.size, self.floor)
            else:
                others = Problem(tuple(problem.spaces[number] for number in together))
                merges.update(zip(together, match_spaces(others, self.relabelling()), strict=True))
        return [merges[number] for number in range(len(problem.spaces))]

    def relabelling(self) -> Permute:
        """`Permute`: zipping joins features of one model, which no relabelling undoes."""
        return Permute()


def energies(moments: Moments, readers: Sequence[Sequence[Tensor]]) -> Tensor:
    """e_j, float64 [N]: shares in the energy that each model's features pass on, each model's summing to 1.

    >>> from fxzip.moments import moments
    >>> x = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    >>> energies(moments([x]), [[torch.tensor([[1.0, 0.25]])]])
    tensor([0.5000, 0.5000], dtype=torch.float64)

    Args:
        moments: of the space.
        readers: for each model, W_oj² of every parameter that reads the space, [outputs, n_k]. Without any, each
            feature of a model gets the same share.
    """
    parts, tiny = [], torch.finfo(torch.float64).tiny
    for k, variance in enumerate(moments.covariance.diagonal().clamp(min=0).split(list(moments.sizes))):
        total = torch.zeros_like(variance)
        for squares in readers[k] if readers else ():
            passed = variance * squares.to(variance)
            share = (passed / passed.sum(1, keepdim=True).clamp(min=tiny)).sum(0)
            total += share / share.sum().clamp(min=tiny)
        alive = float(total.sum())
        parts.append(total / alive if alive > 0 else torch.full_like(variance, 1 / max(len(variance), 1)))
    return torch.cat(parts)


def energy_merge(moments: Moments, share: Tensor, size: int, floor: float) -> Merge:
    """The merge of N features to `size` that loses little of the energy `share` [N] (see the module)."""
    alike = similarity(moments)
    share = share.clamp(min=floor * float(share.mean()))
    clusters, kept = energy_clusters(alike.cpu().numpy(), share.cpu().numpy(), size)
    labels = in_first_layout(torch.as_tensor(clusters, device=alike.device), moments.sizes)
    merge = cluster_merge(labels, moments.sizes, alike)
    deviation = moments.covariance.diagonal().clamp(min=0).sqrt()
    weight = torch.as_tensor(kept, device=alike.device) / torch.where(moments.alive, deviation, torch.inf)
    total = torch.zeros(size, dtype=torch.float64, device=alike.device).index_add_(0, labels, weight)
    own = torch.where(total[labels] > 0, weight / total[labels].clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    index = torch.arange(len(labels), device=alike.device)
    silent = total[labels] == 0
    matrix = torch.zeros_like(merge.merge)
    matrix[labels, index] = torch.where(silent, merge.merge[labels, index], own)
    return replace(merge, merge=matrix)


def energy_clusters(alike: Floats, share: Floats, size: int) -> tuple[Ints, Floats]:
    """Cluster of every feature, named by one of its members, int64 [N]; and p_j² e_j, float64 [N].

    >>> alike = np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.0], [0.9, 0.0, 1.0]])
    >>> energy_clusters(alike, np.array([0.5, 0.01, 0.5]), 2)[0]  # what nobody reads goes first
    array([0, 0, 2])

    Args:
        alike: symmetric similarity, [N, N], 1 on the diagonal.
        share: energies, [N], positive.
        size: clusters to keep.
    """
    state = _Clusters(alike, share)
    for _ in range(len(share) - size):
        state.step()
    return state.cluster, state.coefficients**2 * share


def energy_losses(moments: Moments, share: Tensor, floor: float) -> Floats:
    """Energy lost with m features kept, for m = 0, ..., N: float64 [N + 1], falling to 0; of K models all is K.

    >>> from fxzip.moments import moments
    >>> x = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    >>> energy_losses(moments([x, x]), torch.full((4,), 0.5), 0.01).round(6).tolist()  # two pairs, uncorrelated
    [2.0, 1.0, 0.0, 0.0, 0.0]
    """
    alike = similarity(moments).cpu().numpy()
    share = share.clamp(min=floor * float(share.mean()))
    state = _Clusters(alike, share.cpu().numpy())
    losses = np.zeros(len(share) + 1)
    for size in range(len(share) - 1, 0, -1):
        losses[size] = losses[size + 1] + state.step()
    losses[0] = float(share.sum())
    return losses


class _Clusters:
    """The greedy loop: S[r, s] = <r, s>; each row remembers the partner with which it loses the least.

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
        """Merge the pair that loses the least. Out: the energy that this loses."""
        while True:
            r = int(self.loss.argmin())
            if not self.stale[r]:
                lost = float(self.loss[r])
                self._merge(r, int(self.partner[r]))
                return max(lost, 0.0)
            self._look(r)

    def _losses(self, r: int) -> Floats:
        """Energy lost by merging r with each cluster, inf with itself and those that are gone."""
        own, other = self.S[r, r], self.S.diagonal()
        product = np.maximum(self.S[r], 0.0)
        loss: Floats = (own + other) / 2 - np.sqrt(((own - other) / 2) ** 2 + product**2)
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

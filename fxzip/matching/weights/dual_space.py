"""Matching by weights and activations together: MuDSC.

Xu et al., "Training-Free Pretrained Model Merging" (CVPR 2024, arXiv 2403.01753): what is alike in its activations may
differ in its weights and the other way round, and a merge needs both. For each space

    S = λ · cos(slices of the weights, other axes merged as matched so far) + (1 - λ) · correlation of activations

and any method that matches by similarities, `Permute` or `Zip`, is applied to S. Since the weights' part depends on
the other spaces, spaces are visited in random order, again and again, as long as the mean similarity of what is merged
grows; the best matching is kept. The first one is by activations alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import InputError, OptionError
from ..activations.permute import Permute
from ..merge import Merge
from ..method import Method, SpaceMethod
from ..moments import Moments
from ..problem import Evidence, Problem, Run, Space, Weight
from ..similarities import similarity
from .descent import slices, transformed

_PATIENCE = 5


@dataclass(frozen=True)
class MuDSC(Method):
    """Merging under dual-space constraints.

    >>> from fxzip.matching import Zip
    >>> MuDSC(balance=0.3, inner=Zip()).relabelling()
    MuDSC(balance=0.3, inner=Permute(), seed=0, sweeps=20)

    Grouped kernels whose groups move as blocks are left out of the weights' part.

    Attributes:
        balance: λ in [0, 1]; 0 is the inner method alone.
        inner: what matches by similarities.
        seed: of the order of visits.
        sweeps: most visits to all spaces; it ends when nothing was gained in five of them.

    Raises:
        OptionError: `balance` is out of range, or `inner` looks at all spaces together.
    """

    name: ClassVar[str] = "mudsc"
    needs: ClassVar[frozenset[Evidence]] = frozenset({"weights", "moments"})

    balance: float = 0.5
    inner: SpaceMethod = field(default_factory=Permute)
    seed: int = 0
    sweeps: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.balance <= 1:
            raise OptionError(f"`MuDSC` needs 0 <= balance <= 1, the weights' share; got balance={self.balance}.")
        if not isinstance(self.inner, SpaceMethod):
            raise InputError(
                f"`inner` must be a method that matches one space by its moments, such as `Zip()`; got {self.inner!r}."
            )

    @property
    def one_to_one(self) -> bool:
        """As the inner method."""
        return self.inner.one_to_one

    def match(self, problem: Problem) -> list[Merge]:
        """A merge for every space.

        Raises:
            DataError: the moments are not finite.
        """
        seen = [None if space.moments is None else similarity(space.moments) for space in problem.spaces]
        merges = self.inner.match(problem)
        best, value, idle = list(merges), -torch.inf, 0
        generator = torch.Generator().manual_seed(self.seed)
        coordinates = problem.ties()

        for _ in range(self.sweeps if self.balance else 0):
            for c in torch.randperm(len(coordinates), generator=generator, device="cpu").tolist():
                for s, merge in self._matched(problem, coordinates[c], seen, merges).items():
                    merges[s] = merge
            now = sum(merge.correlation for merge in merges) / len(merges)
            if now > value:
                best, value, idle = list(merges), now, 0
            else:
                idle += 1
                if idle == _PATIENCE:
                    break

        return best

    def relabelling(self) -> MuDSC:
        """The same with the inner method's relabelling."""
        return replace(self, inner=self.inner.relabelling())

    def _matched(
        self, problem: Problem, spaces: Sequence[int], seen: Sequence[Tensor | None], merges: Sequence[Merge]
    ) -> Mapping[int, Merge]:
        """New merges of one space, or of a tie group."""
        own: list[Space] = []
        for s in spaces:
            alike = weight_cosines(problem, s, merges)
            active = seen[s]
            mixed = alike if active is None else self.balance * alike + (1 - self.balance) * active.to(alike.device)
            own.append(replace(problem.spaces[s], moments=as_moments(mixed, problem.spaces[s].sizes)))
        return dict(zip(spaces, self.inner.match(Problem(tuple(own))), strict=True))


def as_moments(alike: Tensor, sizes: tuple[int, ...]) -> Moments:
    """Moments of features whose correlations are these similarities, [N, N] with 1 on the diagonal.

    >>> as_moments(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), (1, 1)).correlation
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]], dtype=torch.float64)
    """
    alike = alike.double()
    return Moments(1.0, torch.zeros_like(alike[0]), alike, sizes)


def weight_cosines(problem: Problem, space: int, merges: Sequence[Merge]) -> Tensor:
    """Cosines of the slices of a space, of all models side by side, [N, N] in float64, 1 on the diagonal."""
    total = sum(problem.spaces[space].sizes)
    device = problem.weights[0].values[0].device if problem.weights else "cpu"
    inner = torch.zeros(total, total, dtype=torch.float64, device=device)

    for weight in problem.weights:
        for run in weight.runs if weight.groups == 1 else ():
            if space in run.slots:
                parts = [
                    slices(merged(weight, k, merges, run), run.axis, run.slots[space][k]) for k in range(problem.models)
                ]
                joint = torch.cat(parts)
                inner += joint @ joint.T

    size = inner.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return (inner / size[:, None] / size).clamp(-1, 1).fill_diagonal_(1.0)


def merged(weight: Weight, k: int, merges: Sequence[Merge], skip: Run) -> Tensor:
    """Model k's value with all runs but one in the merged basis: means over its own members, sums where summed over."""

    def matrix(space: int, run: Run) -> Tensor:
        unmerge = merges[space].U(k).T
        return unmerge if run.summed else unmerge / unmerge.sum(1, keepdim=True).clamp(min=1)

    return transformed(weight, k, matrix, skip)

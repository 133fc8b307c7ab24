"""Ridge regression towards a prior, in closed form, and its variant for targets behind a ReLU.

    W = argmin Σ ‖x W - t‖² + λ ‖W - W_0‖²  =  W_0 + (Σ xᵀx + λ)⁻¹ Σ xᵀ(t - x W_0),      λ = ridge · mean diagonal

with a constant 1 as last input, so that the last row of W is the bias. The second form is the one to compute: where
W_0 is right already nothing is added to it, however badly the Gram matrix is conditioned. With fewer positions than
inputs it is computed from the smaller matrix x xᵀ: (xᵀx + λ)⁻¹ xᵀ = xᵀ (x xᵀ + λ)⁻¹.

Where there are few positions for each input, λ decides how much of the noise is fitted, and is chosen by trying: half
of the positions are fitted, the other half judges, and the other way round (`best_ridge`).

Positions come by blocks, a batch each (`blocks`): sums over them do not depend on what lies in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import DataError
from ...matching.linalg import ridged_cholesky
from .alternating import FreeTarget, alternate, precise
from .blocks import Blocks
from .inputs import Inputs
from .reduced_rank import Cut, cut_rank


@dataclass(frozen=True, eq=False)
class Regression:
    """Inputs, what should come of them, and where to stay if they do not tell.

    Attributes:
        x: inputs, [positions, d].
        t: targets, [positions, n].
        prior: W_0, [d + 1, n]; without a constant [d, n].
        offset: what is added to the outputs before a ReLU, [positions, n], or None.
        constant: whether 1 is an input too.
    """

    x: Blocks | Tensor
    t: Blocks | Tensor
    prior: Tensor
    offset: Blocks | Tensor | None = None
    constant: bool = True

    @cached_property
    def inputs(self) -> Inputs:
        """With the constant, if there is one; in float32 at least."""
        x = Blocks.of(self.x)
        narrow = x.block(0).dtype in (torch.float16, torch.bfloat16)
        return Inputs(x.map(precise).stored() if narrow else x, self.constant)

    @cached_property
    def targets(self) -> Blocks:
        """In float32 at least."""
        return Blocks.of(self.t).map(precise)

    @cached_property
    def base(self) -> Blocks:
        """The offset, 0 if there is none."""
        if self.offset is None:
            return self.targets.map(lambda own: own.new_zeros(1, 1).expand(len(own), 1))
        return Blocks.of(self.offset).map(precise)

    @cached_property
    def start(self) -> Blocks:
        """What the prior gives, [positions, n]."""
        return self.inputs.outputs(self.prior).stored()

    @cached_property
    def left(self) -> Blocks:
        """What the prior leaves of the targets, [positions, n]."""
        return self.targets.map(torch.sub, self.start)

    def chosen(self, rows: Blocks, every: int = 1) -> Regression:
        """That of some positions; `rows`: bool [positions]; `every`: of the outputs every n-th one."""

        def those(own: Tensor, chosen: Tensor) -> Tensor:
            return own[chosen]

        def some(own: Tensor, chosen: Tensor) -> Tensor:
            return own[:, ::every][chosen]

        x, t, base = self.inputs.x.select(those, rows), self.targets.select(some, rows), self.base.select(some, rows)
        return Regression(x.stored(), t, self.prior[:, ::every], base, self.constant)


class Solution(NamedTuple):
    """See `ridge_solution`."""

    weight: Tensor
    ridge: float
    lost: float | None
    factors: tuple[Tensor, Tensor] | None = None


def ridge_solution(
    regression: Regression, ridge: float, *, rounds: int = 0, free_target: FreeTarget | None = None, turns: int = 0,
    rank: int | None = None,
) -> Solution:  # fmt: skip
    """The regression, and the ridge that it took.

    >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    >>> w, *_ = ridge_solution(Regression(x, x @ torch.ones(2, 1) + 3, torch.zeros(3, 1)), 1e-9)
    >>> [round(float(v), 3) for v in w]
    [1.0, 1.0, 3.0]

    Args:
        regression: what is solved.
        ridge: λ relative to the mean diagonal of the Gram matrix. A Gram matrix that is singular all the same makes
            it grow tenfold until the Cholesky factorisation succeeds.
        rounds: if positive, a ReLU follows, after the offset is added: where the target is ≤ 0 any value ≤ 0 serves.
            Each round replaces such targets by the present value or 0: the sum of squares that forgives values ≤ 0
            there never grows.
        free_target, turns: where the targets are but a means: from the solution on, so many rounds of `alternate`.
        rank: of W without its last row, see `reduced_rank`; None: whatever comes.

    Returns:
        W in float64, [d + 1, n]; the ridge used; with a free target the share that is lost; with a rank what W
        is made of, [d, rank] and [rank, n].
    """
    inputs, base, prior = regression.inputs, regression.base, regression.prior
    system = _Normal(inputs)
    factor, ridge = system.factor(ridge)

    def change(left: Blocks) -> Tensor:
        return system.solve(factor, system.side(left))

    def solve(left: Blocks) -> Tensor:
        return prior.double() + change(left)

    def cut(full: Tensor) -> Cut:
        if rank is None:
            return Cut(full, full, full)
        return cut_rank(full, inputs.x, ridge * system.scale, rank, constant=regression.constant)

    solution, lost = solve(regression.left), None
    if free_target is not None:
        solution, losses = alternate(
            inputs, solution, free_target, lambda r: system.solve(factor, system.side(r)), turns
        )
        lost = losses[-1] if losses else None
        if len(losses) > 1:
            found = cut(solution)
            return Solution(found.weight, ridge, lost, None if rank is None else (found.first, found.second))

    def forgiving(t: Tensor, start: Tensor, present: Tensor, base: Tensor) -> Tensor:
        return torch.where(t + base > 0, t, (present + base).clamp(max=0) - base) - start

    found = cut(solution)
    for _ in range(rounds):
        present = inputs.outputs(found.weight)
        found = cut(solve(regression.targets.map(forgiving, regression.start, present, base)))
    return Solution(found.weight, ridge, lost, None if rank is None else (found.first, found.second))


def best_ridge(
    regression: Regression, ridges: Sequence[float], held: Blocks | Tensor, *, rectified: bool = False
) -> float:
    """The ridge of some with the least error on positions that were not fitted: the first behind which it does not
    fall.

    The error falls, and then rises, with the ridge: those further on are not tried, for each takes a factorisation.
    Some of the outputs tell it as well as all.

    >>> x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    >>> held = torch.arange(40) % 2 == 0
    >>> noise = Regression(x, torch.randn(40, 1), torch.zeros(31, 1))
    >>> best_ridge(noise, (1e-4, 1.0), held)  # nothing to be found in it
    1.0
    >>> best_ridge(Regression(x, x.sum(1, keepdim=True), torch.ones(31, 1) * 0.9), (1e-4, 1.0), torch.arange(40) < 4)
    0.0001

    Args:
        regression: what is to be solved.
        ridges: to choose from, rising.
        held: bool [positions]: one half; the other half is the rest.
        rectified: a ReLU follows: where the target is ≤ 0, values ≤ 0 are no error.
    """
    held, every = Blocks.of(held), -(-regression.prior.shape[1] // _JUDGED)
    halves = regression.chosen(held, every), regression.chosen(held.map(torch.logical_not), every)
    systems = [_Normal(own.inputs) for own in halves]
    sides = [system.side(own.left) for system, own in zip(systems, halves, strict=True)]
    difference = _mistake if rectified else _difference

    def error(ridge: float) -> float:
        total = 0.0
        for system, side, judged in zip(systems, sides, halves[::-1], strict=True):
            weight = judged.prior.double() + system.solve(system.factor(ridge)[0], side)
            wrong = judged.targets.map(difference, judged.inputs.outputs(weight), judged.base)
            total += float(wrong.select(lambda own: own.square().sum()[None, None]).sum())
        return total

    best, least = ridges[0], error(ridges[0])
    for ridge in ridges[1:]:
        found = error(ridge)
        if not found < least:
            break
        best, least = ridge, found
    return best


def _difference(wanted: Tensor, found: Tensor, _base: Tensor) -> Tensor:
    return (found - wanted).double()


def _mistake(wanted: Tensor, found: Tensor, base: Tensor) -> Tensor:
    """In front of a ReLU values ≤ 0 are none where the target is ≤ 0."""
    return torch.where(wanted + base > 0, found - wanted, (found + base).clamp(min=0)).double()


class _Normal:
    """(xᵀx + λ)⁻¹ xᵀ r for inputs x [positions, d] and residuals r [positions, n], by the smaller of xᵀx and x xᵀ.

    x xᵀ is made in float64: its smallest eigenvalues, to which λ is compared, drown in float32's rounding sooner than
    those of xᵀx do. It takes the positions of all processes together, which are fewer than the inputs.

    Raises:
        DataError: the matrix is not finite.
    """

    def __init__(self, x: Inputs) -> None:
        width = x.width
        self.inputs, self.dual = x, x.x.rows < width
        self.x = x.whole() if self.dual else None
        self.matrix = x.gram() if self.x is None else _outer(self.x)
        diagonal = self.matrix.diagonal()
        if not bool(diagonal.isfinite().all()):  # of a positive semidefinite matrix no entry is greater
            raise DataError(
                f"The inputs of a regression must have a finite Gram matrix; that of {width - 1} inputs "
                "overflows. Zip the models in a wider dtype, or look for features that are far too large."
            )
        self.scale = float(diagonal.sum()) / width or 1.0  # mean diagonal of xᵀx in both cases

    def factor(self, ridge: float) -> tuple[Tensor, float]:
        """Cholesky factor with λ = ridge · `scale`, and the ridge that it took."""
        return ridged_cholesky(self.matrix, ridge, self.scale)

    def side(self, residual: Blocks) -> Tensor:
        """The right-hand side that `solve` takes, float64."""
        return residual.whole().double() if self.dual else self.inputs.product(residual)

    def solve(self, factor: Tensor, side: Tensor) -> Tensor:
        """[d, n], float64."""
        found = torch.cholesky_solve(side, factor)
        if self.x is None:
            return found
        return torch.cat([block.double().T @ found for block in self.x.split(_BLOCK, 1)])


_JUDGED = 64  # outputs by which ridges are compared, at most
_BLOCK = 256  # columns of x, and rows of x xᵀ, that are multiplied at a time


def _outer(x: Tensor) -> Tensor:
    """x xᵀ in float64; above the diagonal only, the rest is its mirror image."""
    outer = x.new_zeros(len(x), len(x), dtype=torch.float64)
    for block in x.split(_BLOCK, 1):
        wide = block.double()
        for start in range(0, len(x), _BLOCK):
            outer[start : start + _BLOCK, start:].addmm_(wide[start : start + _BLOCK], wide[start:].T)
    for start in range(0, len(x), _BLOCK):
        stop = start + _BLOCK
        outer[stop:, start:stop] = outer[start:stop, stop:].T
    return outer


def affine_solution(
    y: Blocks | Tensor, t: Blocks | Tensor, ridge: float, *, scaled: bool = True, shifted: bool = True
) -> tuple[Tensor, Tensor]:
    """Scale c and shift d per feature: argmin Σ (c y + d - t)² + λ (c - 1)², λ = ridge · var y. Float64, [n] each.

    Where only one of them is there, the other stays at 1 or 0; without a shift λ = ridge · mean y².

    >>> y = torch.tensor([[0.0], [1.0], [2.0]])
    >>> affine_solution(y, 3 * y + 1, 0.0)
    (tensor([3.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    y, t = (Blocks.of(own).map(Tensor.double) for own in (y, t))
    nothing = y.block(0).new_zeros(y.block(0).shape[1])
    mean, target = (y.mean(), t.mean()) if shifted else (nothing, nothing)
    variance = y.map(lambda own: (own - mean).square()).mean()
    covariance = y.map(lambda own, wanted: (own - mean) * (wanted - target), t).mean()
    square = y.map(Tensor.square).mean()
    alive = variance > 1e-12 * square.clamp(min=torch.finfo(torch.float64).tiny)
    safe = torch.where(alive, variance, torch.ones_like(variance)) * (1 + ridge)
    scale = torch.where(alive, (covariance + ridge * variance) / safe, torch.ones_like(variance))
    scale = scale if scaled else torch.ones_like(scale)
    return scale, target - scale * mean

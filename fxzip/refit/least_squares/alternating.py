"""Alternating least squares: features of which the originals' can best be read, whatever combination they are.

A merged feature has a target, the merge of those that it stands for. Where everything that reads it is fitted later,
the target is but a means: what counts is how well the originals' features f can be read from the merged ones,

    h = φ(x W + s),      lost(W) = min over U, c of  E (f - U h - c)ᵀ G (f - U h - c),

s being the other summand of a residual sum and G how the originals read f (`matching.energy.reading`). Each round is
two regressions: U from h; then W from x, towards the h that would mend what U leaves, as far as φ lets it through:

    δ = (Uᵀ G U + μ)⁻¹ Uᵀ G (f - U h - c),      x ΔW ≈ φ'(x W + s) δ.

The step along ΔW is the best of some; a round that gains too little is the last. For linear φ this is reduced-rank
regression (Izenman 1975) by alternation; for a ReLU, block coordinate descent on a network of one hidden layer, each
block by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...matching.linalg import ridged_cholesky
from .blocks import Blocks
from .inputs import Inputs

_DAMPING = 0.1  # μ relative to the mean diagonal of Uᵀ G U
_RIDGE = 1e-5  # of the reading of f from h
_EXACT = 1e-5  # share lost, below which nothing is done: it is rounding
_STEP = 2.0  # the first step to try: φ' lets about half of a change through
_GAIN = 0.01  # share of what is lost; a round that gains less is the last


@dataclass(frozen=True, eq=False)
class FreeTarget:
    """What the features of a sample should tell.

    Attributes:
        features: f behind φ, float [places, N].
        metric: G, float64 [N, N].
        function: φ, feature by feature.
        offset: s, [places, n], or None.
    """

    features: Blocks | Tensor
    metric: Tensor
    function: Callable[[Tensor], Tensor]
    offset: Blocks | Tensor | None


@dataclass(frozen=True, eq=False)
class _State:
    """Values before φ; h, [places, n], and its mean, float64 [n]; U [n, N]; what is lost."""

    values: Blocks
    told: Blocks
    mean: Tensor
    reading: Tensor
    lost: float


@dataclass(frozen=True, eq=False)
class _Move:
    """A change of the weights, float64 [d, n], and what it does to the values before φ, [places, n]."""

    change: Tensor
    moved: Blocks

    def times(self, step: float) -> _Move:
        return _Move(step * self.change, self.moved.map(lambda own: step * own))


@dataclass(frozen=True, eq=False)
class _Loss:
    """What is lost of the wished features.

    Attributes:
        features: f, centred, [places, N].
        metric: G.
        function: φ.
        centre: near the mean of all h that are tried, so that little is lost to rounding; float64 [n].
        whole: what there is to lose.
    """

    features: Blocks
    metric: Tensor
    function: Callable[[Tensor], Tensor]
    centre: Tensor
    whole: float

    @classmethod
    def of(cls, free_target: FreeTarget, values: Blocks) -> _Loss:
        """`values`: those before φ to begin with."""
        features = Blocks.of(free_target.features).map(precise).centred()
        whole = float((features.gram() * free_target.metric).sum())
        centre = values.map(free_target.function).mean()
        return cls(features, free_target.metric, free_target.function, centre, whole)

    def state(self, values: Blocks) -> _State:
        """The best reading from features of these values."""
        told = values.map(lambda own: self.function(own) - self.centre.to(own))
        total, own, both = told.moments(self.features)
        mean = total / told.rows
        own -= told.rows * torch.outer(mean, mean)
        if not bool(own.isfinite().all() and both.isfinite().all()):  # a function that grows fast, a step too far
            return _State(values, told, mean, both, math.inf)
        reading = torch.cholesky_solve(both, _factor(own, _RIDGE))
        read = (2 * both - own @ reading) @ self.metric  # by these U, whatever the ridge made of them
        return _State(values, told, mean, reading, max(1 - float((read * reading).sum()) / self.whole, 0.0))


def alternate(
    x: Inputs | Tensor, weight: Tensor, free_target: FreeTarget, solve: Callable[[Blocks], Tensor], rounds: int
) -> tuple[Tensor, list[float]]:
    """Weights of which the wished features can be read better, and the share that is lost after every round.

    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> features = x[:, :2] @ torch.tensor([[1.0, 1.0], [0.0, 0.1]])
    >>> free_target = FreeTarget(features, torch.eye(2).double(), lambda v: v, None)
    >>> solve = lambda t: torch.linalg.lstsq(x, t.whole()).solution.double()
    >>> weight, lost = alternate(x, torch.tensor([[0.0], [1.0], [0.0]]).double(), free_target, solve, 9)
    >>> round(lost[0], 2), round(lost[-1], 2)  # one feature for two: the first principal direction
    (0.99, 0.0)

    Args:
        x: inputs, with the constant if there is one, [places, d].
        weight: to start from, float64 [d, n].
        free_target: what should be told.
        solve: the regression on x of [places, n]: float64 [d, n].
        rounds: at most.
    """
    inputs = x if isinstance(x, Inputs) else Inputs(Blocks.of(x).map(precise))
    values = inputs.outputs(weight)
    if free_target.offset is not None:
        values = values.map(torch.add, Blocks.of(free_target.offset).map(precise))
    loss = _Loss.of(free_target, values := values.stored())
    now = loss.state(values) if 0 < loss.whole < math.inf else None
    if now is None or not math.isfinite(now.lost):
        return weight, []

    slope, losses, step = _slope(free_target.function, values), [now.lost], _STEP
    last: _Move | None = None
    while len(losses) <= rounds and now.lost >= _EXACT:
        change = solve(_wanted(now, loss.features, loss.metric).map(torch.mul, now.values.map(slope)))
        if not bool(change.isfinite().all()):
            break
        move = _Move(change, inputs.outputs(change).stored())
        found = _shortened(loss, now, move, step)
        if found is None:
            break
        step, new = found
        move = move.times(step)
        if last is not None:
            move, new = _beyond(loss, move, new, last)
        last = _Move(move.change, move.moved.stored())
        weight, gain = weight + move.change, now.lost - new.lost
        now = replace(new, values=new.values.stored())
        losses.append(now.lost)
        if gain < _GAIN * now.lost:
            break
    return weight, losses


def _shortened(loss: _Loss, now: _State, move: _Move, first: float) -> tuple[float, _State] | None:
    """The longest of some steps by which less is lost, and what it leads to; None: there is none."""
    for step in (first, first / 2, first / 4, first / 8):
        new = loss.state(_further(now.values, move.moved, step))
        if new.lost < now.lost:
            return step, new
    return None


def _beyond(loss: _Loss, move: _Move, new: _State, last: _Move) -> tuple[_Move, _State]:
    """The same move, and the one before once more if that loses less, as momentum has it."""
    for more in (1.0, 0.5):
        further = loss.state(_further(new.values, last.moved, more))
        if further.lost < new.lost:
            return _Move(move.change + more * last.change, _further(move.moved, last.moved, more)), further
    return move, new


def _further(values: Blocks, moved: Blocks, step: float) -> Blocks:
    return values.map(lambda own, change: torch.add(own, change, alpha=step), moved)


def precise(values: Tensor) -> Tensor:
    """In float32 at least: sums of products of half precision overflow, or drown."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _wanted(now: _State, features: Blocks, metric: Tensor) -> Blocks:
    """δ, [places, n]."""
    toward = now.reading @ metric  # [n, N]
    seen = toward @ now.reading.T
    solved = torch.cholesky_solve(torch.cat([toward, seen], 1), _factor(seen, _DAMPING))
    from_features, from_told = solved[:, : toward.shape[1]].T, solved[:, toward.shape[1] :].T
    constant = now.mean @ from_told

    def wanted(f: Tensor, h: Tensor) -> Tensor:
        return torch.addmm(constant.to(f), f, from_features.to(f)).addmm_(h, from_told.to(h), alpha=-1)

    return features.map(wanted, now.told)


def _factor(matrix: Tensor, ridge: float) -> Tensor:
    """With a ridge relative to each feature's own size: what is small is told as well as what is large."""
    scale = matrix.diagonal().clamp(min=torch.finfo(matrix.dtype).tiny ** 0.5)
    return ridged_cholesky(matrix, ridge, scale)[0]


def _slope(function: Callable[[Tensor], Tensor], values: Blocks) -> Callable[[Tensor], Tensor]:
    """φ' by differences that are small beside the spread of such values."""
    mean, rows = values.mean(), values.rows
    variance = values.map(lambda own: (own - mean.to(own)).square()).sum()
    whole = variance.sum() + rows * (mean - mean.mean()).square().sum()
    least = 1e-3 * (whole / max(rows * len(mean) - 1, 1)).sqrt()
    tiny = torch.finfo(values.block(0).dtype).tiny
    width = 1e-3 * (variance / max(rows - 1, 1)).sqrt().clamp(min=float(least) + tiny)

    def slope(own: Tensor) -> Tensor:
        step = width.to(own)
        return (function(own + step) - function(own - step)) / (2 * step)

    return slope

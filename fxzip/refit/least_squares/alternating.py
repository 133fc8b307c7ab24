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
    features = Blocks.of(free_target.features).map(precise).centred()
    metric = free_target.metric
    whole = float((features.gram() * metric).sum())
    if not 0 < whole < math.inf:
        return weight, []

    values = inputs.outputs(weight)
    if free_target.offset is not None:
        values = values.map(torch.add, Blocks.of(free_target.offset).map(precise))
    values = values.stored()
    slope = _slope(free_target.function, values)
    centre = values.map(free_target.function).mean()  # near the mean of all that is tried: little is lost to rounding

    def state(values: Blocks) -> _State:
        told = values.map(lambda own: free_target.function(own) - centre.to(own))
        total, own, both = told.moments(features)
        mean = total / told.rows
        own -= told.rows * torch.outer(mean, mean)
        if not bool(own.isfinite().all() and both.isfinite().all()):  # a function that grows fast, a step too far
            return _State(values, told, mean, both, math.inf)
        reading = torch.cholesky_solve(both, _factor(own, _RIDGE))
        read = (2 * both - own @ reading) @ metric  # what is lost is that of these U, whatever the ridge made of them
        return _State(values, told, mean, reading, max(1 - float((read * reading).sum()) / whole, 0.0))

    now = state(values)
    if not math.isfinite(now.lost):
        return weight, []
    losses, step = [now.lost], _STEP
    last: tuple[Tensor, Blocks] | None = None
    for _ in range(rounds):
        if now.lost < _EXACT:
            break
        change = solve(_wanted(now, features, metric).map(torch.mul, now.values.map(slope)))
        if not bool(change.isfinite().all()):
            break
        moved = inputs.outputs(change).stored()
        for tried in (step, step / 2, step / 4, step / 8):
            new = state(_further(now.values, moved, tried))
            if new.lost < now.lost:
                break
        else:
            break
        change, step = tried * change, tried
        moved = moved.map(lambda own, times=tried: times * own)
        if last is not None:
            for more in (1.0, 0.5):
                further = state(_further(new.values, last[1], more))
                if further.lost < new.lost:
                    new, change, moved = further, change + more * last[0], _further(moved, last[1], more)
                    break
        last = change, moved.stored()
        weight, gain = weight + change, now.lost - new.lost
        now = replace(new, values=new.values.stored())
        losses.append(now.lost)
        if gain < _GAIN * now.lost:
            break
    return weight, losses


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

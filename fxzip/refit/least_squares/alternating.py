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
from dataclasses import dataclass

import torch
from torch import Tensor

from ...matching.linalg import ridged_cholesky

_DAMPING = 0.1  # μ relative to the mean diagonal of Uᵀ G U
_RIDGE = 1e-5  # of the reading of f from h
_EXACT = 1e-5  # share lost, below which nothing is done: it is rounding
_STEP = 2.0  # the first step to try: φ' lets about half of a change through
_GAIN = 0.01  # share of what is lost; a round that gains less is the last


@dataclass(frozen=True, eq=False)
class Wish:
    """What the features of a sample should tell.

    Attributes:
        features: f behind φ, float [places, N].
        metric: G, float64 [N, N].
        function: φ, feature by feature.
        offset: s, [places, n], or None.
    """

    features: Tensor
    metric: Tensor
    function: Callable[[Tensor], Tensor]
    offset: Tensor | None


@dataclass(frozen=True, eq=False)
class _State:
    """Values before φ; h, centred, [places, n]; U [n, N]; what is lost."""

    values: Tensor
    told: Tensor
    reading: Tensor
    lost: float


def alternate(
    x: Tensor, weight: Tensor, wish: Wish, solve: Callable[[Tensor], Tensor], rounds: int
) -> tuple[Tensor, list[float]]:
    """Weights of which the wished features can be read better, and the share that is lost after every round.

    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> wish = Wish(x[:, :2] @ torch.tensor([[1.0, 1.0], [0.0, 0.1]]), torch.eye(2).double(), lambda v: v, None)
    >>> solve = lambda t: torch.linalg.lstsq(x, t).solution.double()
    >>> weight, lost = alternate(x, torch.tensor([[0.0], [1.0], [0.0]]).double(), wish, solve, 9)
    >>> round(lost[0], 2), round(lost[-1], 2)  # one feature for two: the first principal direction
    (0.99, 0.0)

    Args:
        x: inputs, with the constant if there is one, [places, d].
        weight: to start from, float64 [d, n].
        wish: what should be told.
        solve: the regression on x of [places, n]: float64 [d, n].
        rounds: at most.
    """
    x, features = precise(x), precise(wish.features)
    features = features - features.mean(0)
    metric = wish.metric
    whole = float(((features.T @ features).double() * metric).sum())
    if not 0 < whole < math.inf:
        return weight, []

    def state(values: Tensor) -> _State:
        told = wish.function(values)
        told = told - told.mean(0)
        own, both = (told.T @ told).double(), (told.T @ features).double()
        if not bool(own.isfinite().all() and both.isfinite().all()):  # a function that grows fast, a step too far
            return _State(values, told, both, math.inf)
        reading = torch.cholesky_solve(both, _factor(own, _RIDGE))
        read = (2 * both - own @ reading) @ metric  # what is lost is that of these U, whatever the ridge made of them
        return _State(values, told, reading, max(1 - float((read * reading).sum()) / whole, 0.0))

    values = x @ weight.to(x)
    now = state(values if wish.offset is None else values + precise(wish.offset))
    if not math.isfinite(now.lost):
        return weight, []
    losses, step = [now.lost], _STEP
    last: tuple[Tensor, Tensor] | None = None
    for _ in range(rounds):
        if now.lost < _EXACT:
            break
        wanted = _wanted(now, features, metric).mul_(_slope(wish.function, now.values))
        if not bool(wanted.isfinite().all()):
            break
        change = solve(wanted)
        moved = x @ change.to(x)
        for tried in (step, step / 2, step / 4, step / 8):
            new = state(now.values + tried * moved)
            if new.lost < now.lost:
                break
        else:
            break
        change, moved, step = tried * change, tried * moved, tried
        if last is not None:
            for more in (1.0, 0.5):
                further = state(new.values + more * last[1])
                if further.lost < new.lost:
                    new, change, moved = further, change + more * last[0], moved + more * last[1]
                    break
        last = change, moved
        weight, gain, now = weight + change, now.lost - new.lost, new
        losses.append(now.lost)
        if gain < _GAIN * now.lost:
            break
    return weight, losses


def precise(values: Tensor) -> Tensor:
    """In float32 at least: sums of products of half precision overflow, or drown."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _wanted(now: _State, features: Tensor, metric: Tensor) -> Tensor:
    """δ, [places, n]."""
    toward = now.reading @ metric  # [n, N]
    seen = toward @ now.reading.T
    solved = torch.cholesky_solve(torch.cat([toward, seen], 1), _factor(seen, _DAMPING)).to(features)
    count = features.shape[1]
    return features @ solved[:, :count].T - now.told @ solved[:, count:].T


def _factor(matrix: Tensor, ridge: float) -> Tensor:
    """With a ridge relative to each feature's own size: what is small is told as well as what is large."""
    scale = matrix.diagonal().clamp(min=torch.finfo(matrix.dtype).tiny ** 0.5)
    return ridged_cholesky(matrix, ridge, scale)[0]


def _slope(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """φ' by differences."""
    width = 1e-3 * values.std(0).clamp(min=1e-3 * float(values.std()) + torch.finfo(values.dtype).tiny)
    return (function(values + width) - function(values - width)) / (2 * width)

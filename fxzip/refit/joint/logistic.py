"""Shifts between heads, as algebra: a convex problem in what the heads know of inputs whose task is known.

The argmax over the logits of all heads takes the head with the greatest logit. With that for a score, the task is

    p(task k | x) = softmax_k( max z_k(x) + s_k(x) ),    s_k(x) = v_k · (h_k(x) - m_k) + c_k,

a multinomial logistic regression on the heads' features h_k, m_k their means, with an offset. It is fitted to the tasks
of the inputs, every task with the same weight, by maximum likelihood with a ridge λ/2 Σ ‖v_k‖² on features of unit
deviation (L-BFGS). λ is the best of some by cross-validation, and where none is better than no shift, there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3)
FOLDS = 5
_ROUNDING = 100  # a feature that varies by so many units in its last place is constant,
_CONSTANT = 0.02  # and one of half precision that varies by this share of itself


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the heads know of calibration inputs.

    Attributes:
        features: of each head, [inputs, features], float64.
        scores: the greatest of each head's logits, [inputs, heads], float64.
        tasks: which model each input belongs to, [inputs].
        precision: of the features before they were float64: `torch.finfo(dtype).eps`.
    """

    features: tuple[Tensor, ...]
    scores: Tensor
    tasks: Tensor
    precision: float = torch.finfo(torch.float64).eps

    def weights(self, chosen: Tensor | None = None) -> Tensor:
        """Of each input that is chosen, the others have none: every task counts alike, and all sum to one."""
        chosen = torch.ones_like(self.tasks, dtype=torch.bool) if chosen is None else chosen
        counts = torch.bincount(self.tasks[chosen], minlength=self.scores.shape[1]).double()
        return chosen / (counts[self.tasks].clamp(min=1) * len(counts))


@dataclass(frozen=True, eq=False)
class Shifts:
    """What to add to each head's logits.

    Attributes:
        directions: v of each head, [features].
        means: m of each head, [features].
        offsets: c of each head, [heads].
        ridge: the λ that was chosen; None: no shift was better.
        before, after: share of inputs whose task has the greatest logit, without shifts, and with those that were
            fitted on the other folds.
    """

    directions: tuple[Tensor, ...]
    means: tuple[Tensor, ...]
    offsets: Tensor
    ridge: float | None
    before: float
    after: float


def fit_shifts(
    evidence: Evidence, ridges: Sequence[float] = RIDGES, *, smallest: float = 1e-9, folds: int = FOLDS
) -> Shifts:
    """Fit the shifts of all heads together.

    >>> h = torch.tensor([[-1.0], [1.0]]).repeat(20, 1).double()
    >>> found = fit_shifts(Evidence((h, h), torch.zeros(40, 2).double(), torch.tensor([0, 1]).repeat(20)))
    >>> bool(found.directions[0] < 0 < found.directions[1]), found.before, round(found.after, 6)
    (True, 0.5, 1.0)

    Args:
        ridges: to choose from, descending.
        smallest: below them others are tried as long as more inputs are known, down to this one: logits may be large,
            and so the shifts that they need.
    """
    means = tuple(own.mean(0) for own in evidence.features)
    spreads = [_spread(own, evidence.precision) for own in evidence.features]
    scaled = [(own - m) / s for own, m, s in zip(evidence.features, means, spreads, strict=True)]
    rotated = [_few_features(own) for own in scaled]
    problem = replace(evidence, features=tuple(own for own, _ in rotated))
    fold = _folds(evidence.tasks, folds)
    best, before = _judge(evidence.scores, evidence)
    ridge, after = None, before
    for trial in _tried(ridges, smallest):
        found, known = _judge(_cross_validated(problem, trial, fold), evidence)
        if trial < min(ridges) and not (found < best and known > after):
            break
        if found < best:
            best, ridge, after = found, trial, known
    if ridge is None:
        nothing = tuple(torch.zeros_like(m) for m in means)
        return Shifts(nothing, means, torch.zeros(len(means), device="cpu").to(means[0]), None, before, before)
    vectors, offsets = _solve(problem, ridge, evidence.weights())
    directions = tuple(b @ v / s for (_, b), v, s in zip(rotated, vectors, spreads, strict=True))
    return Shifts(directions, means, offsets, ridge, before, after)


def _tried(ridges: Sequence[float], smallest: float) -> Iterator[float]:
    """The ridges, and smaller ones."""
    yield from ridges
    smaller = min(ridges) / 10
    while smaller >= smallest:
        yield smaller
        smaller /= 10


def _spread(features: Tensor, precision: float) -> Tensor:
    """The deviation of each feature, [features]; infinite where it is that of rounding."""
    spread = features.std(0, correction=0)
    constant = spread <= min(_ROUNDING * precision, _CONSTANT) * features.abs().amax(0)
    return torch.where(constant, torch.inf, spread)


def _few_features(features: Tensor) -> tuple[Tensor, Tensor]:
    """The features in a basis of as many as there are inputs, and that basis: a ridge cannot tell the difference."""
    inputs, count = features.shape
    if count <= inputs:
        return features, torch.eye(count, device="cpu").to(features)
    basis = torch.linalg.qr(features.T)[0]
    return features @ basis, basis


def _folds(tasks: Tensor, folds: int) -> Tensor:
    """The fold of each input: inputs of each task in turn."""
    result = torch.zeros_like(tasks)
    for task in tasks.unique():
        own = (tasks == task).nonzero()[:, 0]
        result[own] = torch.arange(len(own), device=own.device) % folds
    return result


def _cross_validated(problem: Evidence, ridge: float, fold: Tensor) -> Tensor:
    """Scores with shifts that were fitted on the other folds."""
    result = problem.scores.clone()
    for number in fold.unique():
        own = fold == number
        result[own] = _scores(problem, *_solve(problem, ridge, problem.weights(~own)))[own]
    return result


def _solve(problem: Evidence, ridge: float, weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """Directions and offsets of least loss."""
    vectors = [own.new_zeros(own.shape[1], requires_grad=True) for own in problem.features]
    offsets = problem.scores.new_zeros(problem.scores.shape[1], requires_grad=True)
    search = torch.optim.LBFGS(
        [*vectors, offsets], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        logs = _scores(problem, vectors, offsets).log_softmax(1)
        fit = -(logs.gather(1, problem.tasks[:, None])[:, 0] * weights).sum()
        total = fit + ridge / 2 * torch.stack([v.square().sum() for v in vectors]).sum()
        total.backward()
        return total

    with torch.enable_grad():
        search.step(loss)
    return [v.detach() for v in vectors], offsets.detach()


def _scores(problem: Evidence, vectors: Sequence[Tensor], offsets: Tensor) -> Tensor:
    moves = torch.stack([own @ v for own, v in zip(problem.features, vectors, strict=True)], 1)
    return problem.scores + moves + offsets


def _judge(scores: Tensor, evidence: Evidence) -> tuple[float, float]:
    """Loss, and the share of inputs whose task has the greatest score."""
    weights = evidence.weights()
    logs = scores.log_softmax(1).gather(1, evidence.tasks[:, None])[:, 0]
    return float(-(logs * weights).sum()), float(((scores.argmax(1) == evidence.tasks) * weights).sum())

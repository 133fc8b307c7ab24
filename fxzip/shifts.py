"""Shifts between heads, as algebra: a convex problem in what the heads know of inputs whose task is known.

With p(class | x) the softmax over the logits of all heads, the probability of a task is that of its classes together,

    p(task k | x) = softmax_k( log Σ exp z_k(x) + s_k(x) ),    s_k(x) = v_k · h_k(x) + c_k,

a multinomial logistic regression on the heads' features h_k, with an offset. It is fitted to the tasks of the inputs,
every task with the same weight, by maximum likelihood with a ridge λ/2 Σ ‖v_k‖² on features of unit deviation (L-BFGS).
λ is the best of some by cross-validation, and where none is better than no shift, there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
FOLDS = 5


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the heads know of calibration inputs.

    Attributes:
        features: of each head, [inputs, features], float64.
        scores: log Σ exp of each head's logits, [inputs, heads], float64.
        tasks: which model each input belongs to, [inputs].
    """

    features: tuple[Tensor, ...]
    scores: Tensor
    tasks: Tensor

    def weights(self) -> Tensor:
        """Of each input, such that every task counts alike and all sum to one."""
        counts = torch.bincount(self.tasks, minlength=self.scores.shape[1]).double()
        return 1 / (counts[self.tasks] * len(counts))


@dataclass(frozen=True, eq=False)
class Shifts:
    """What to add to each head's logits.

    Attributes:
        directions: v of each head, [features].
        offsets: c of each head, [heads].
        ridge: the λ that was chosen; None: no shift was better.
        known: share of inputs whose task the heads name, without the shifts and with those of the other folds.
    """

    directions: tuple[Tensor, ...]
    offsets: Tensor
    ridge: float | None
    known: tuple[float, float]


def fit_shifts(evidence: Evidence, ridges: Sequence[float] = RIDGES, folds: int = FOLDS) -> Shifts:
    """Fit the shifts of all heads together.

    >>> h = torch.tensor([[-1.0], [1.0]]).repeat(20, 1).double()
    >>> found = fit_shifts(Evidence((h, h), torch.zeros(40, 2).double(), torch.tensor([0, 1]).repeat(20)))
    >>> bool(found.directions[0] < 0 < found.directions[1]), found.known
    (True, (0.5, 1.0))
    """
    means = [own.mean(0) for own in evidence.features]
    spreads = [own.std(0, correction=0) for own in evidence.features]
    spreads = [torch.where(s > 1e-6 * s.max(), s, torch.inf) for s in spreads]
    scaled = [(own - m) / s for own, m, s in zip(evidence.features, means, spreads, strict=True)]
    rotated = [_few_features(own) for own in scaled]
    problem = replace(evidence, features=tuple(own for own, _ in rotated))
    fold = _folds(evidence.tasks, folds)
    plain = _judge(evidence.scores, evidence)
    trials = [(ridge, _judge(_cross_validated(problem, ridge, fold), evidence)) for ridge in ridges]
    ridge, (loss, known) = min(trials, key=lambda trial: trial[1][0])
    if not loss < plain[0]:
        nothing = tuple(torch.zeros_like(m) for m in means)
        return Shifts(nothing, torch.zeros(len(means)).to(means[0]), None, (plain[1], plain[1]))
    vectors, offsets = _solve(problem, ridge, evidence.weights())
    directions = tuple(b @ v / s for (_, b), v, s in zip(rotated, vectors, spreads, strict=True))
    moved = [float(m @ v) for m, v in zip(means, directions, strict=True)]
    return Shifts(directions, offsets - offsets.new_tensor(moved), ridge, (plain[1], known))


def _few_features(features: Tensor) -> tuple[Tensor, Tensor]:
    """The features in a basis of as many as there are inputs, and that basis: a ridge cannot tell the difference."""
    inputs, count = features.shape
    if count <= inputs:
        return features, torch.eye(count).to(features)
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
    weights = problem.weights()
    for number in fold.unique():
        own = fold == number
        result[own] = _scores(problem, *_solve(problem, ridge, weights * ~own))[own]
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
        fit = -(logs.gather(1, problem.tasks[:, None])[:, 0] * weights).sum() / weights.sum()
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

"""How alike features are: what most methods match by, and what a merge is judged by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError
from .moments import Moments


def similarity(moments: Moments) -> Tensor:
    """How alike features are, float64 [N, N], symmetric but for rounding, 1 on the diagonal: what methods match by.

    >>> from fxzip.matching.moments import moments
    >>> x = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    >>> similarity(moments([x, x.flip(1)])).round()[:2, 2:]
    tensor([[0., 1.],
            [1., 0.]], dtype=torch.float64)

    It is Pearson's correlation (ZipIt!, section 4.1), 0 with a feature that never varies, except for two such features
    of different models: constants a and b count 1 - |a - b| / (|a| + |b|), at least 0, and 1 if both are zero. So equal
    constants find each other, one to one, since within a model constants still count 0. Where there are `samples`,
    their
    correlation counts with the tiny weight `TIE`, so that it decides between features that are equally alike else.

    Raises:
        DataError: no position was observed, or the moments are not finite.
    """
    if moments.count == 0:
        raise DataError(
            "Matching needs observed features; these moments hold 0 positions. Pass `data` that reaches them."
        )

    broken = int((~(moments.total + moments.outer.diagonal()).isfinite()).sum())
    if broken:
        raise DataError(
            f"Matching needs finite moments; those of {broken} of {len(moments.total)} features are not. "
            "Look for overflow or NaN in the features, or in `data`."
        )

    correlation = moments.correlation
    unclear = moments.unclear(correlation).nonzero().flatten()
    still = (~moments.alive).nonzero().flatten()
    if len(still):
        value = moments.mean[still]
        total = value.abs()[:, None] + value.abs()[None, :]
        gap = (value[:, None] - value[None, :]).abs()
        alike = torch.where(total > 0, 1 - gap / total.clamp(min=torch.finfo(torch.float64).tiny), 1.0).clamp(min=0)
        model = model_index(moments.sizes, still.device)[still]
        pair = (still[:, None], still[None, :])
        correlation[pair] = torch.where(model[:, None] == model[None, :], correlation[pair], alike)

    if moments.samples is not None:
        correlation = _tie_broken(correlation, moments.samples)

    return _told_apart(correlation, moments, unclear) if len(unclear) else correlation


TIE = 1e-4
FINER = 1e-5


def _told_apart(alike: Tensor, moments: Moments, unclear: Tensor) -> Tensor:
    """(1 - c) · alike + FINER · (nearness of features + nearness of marks), c the sum of the weights, in place."""
    pairs = (unclear[:, None], unclear[None, :])
    tables = [_near(moments.outer[pairs])]
    if moments.marks is not None:
        own = moments.marks[unclear.cpu()]
        tables.append(_near(own @ own.T).to(alike.device))
    alike[pairs] = (alike[pairs] * (1 - FINER * len(tables)) + FINER * sum(tables)).clamp(-1, 1)
    return alike.fill_diagonal_(1.0)


def _near(products: Tensor) -> Tensor:
    """1 - |x - y|² / (|x|² + |y|²) of all pairs, from their inner products; 1 for two zeros."""
    square = products.diagonal()
    total = square[:, None] + square[None, :]
    return torch.where(total > 0, 2 * products / total.clamp(min=torch.finfo(torch.float64).tiny), 1.0)


def _tie_broken(alike: Tensor, samples: Tensor) -> Tensor:
    """(1 - TIE) · alike + TIE · correlation of the samples, in place; alike itself where two never vary."""
    drawn = samples.double()
    drawn = drawn - drawn.mean(0)
    norm = drawn.norm(dim=0)
    drawn = torch.where(norm > 0, drawn / norm.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    still = (norm == 0).nonzero().flatten()
    pair = (still[:, None], still[None, :])
    kept = alike[pair]
    alike.mul_(1 - TIE).addmm_(drawn.T, drawn, alpha=TIE)
    alike[pair] = kept
    return alike.clamp_(-1, 1).fill_diagonal_(1.0)


def model_index(sizes: Sequence[int], device: torch.device | None = None) -> Tensor:
    """The model of every feature, int64 [N].

    >>> model_index((2, 1))
    tensor([0, 0, 1])
    """
    return torch.cat([torch.full((n,), k, device=device or "cpu") for k, n in enumerate(sizes)])


def mean_similarity(labels: Tensor, alike: Tensor) -> float:
    """Mean, over clusters with at least two members, of the mean similarity [N, N] of their pairs; 1.0 without any.

    >>> mean_similarity(torch.tensor([0, 0, 1]), torch.full((3, 3), 0.5))
    0.5
    """
    counts = torch.bincount(labels)
    order = labels.argsort(stable=True)
    total = torch.zeros(len(counts), dtype=torch.float64, device=labels.device)

    for gap in range(1, int(counts.max())):
        first, second = order[:-gap], order[gap:]
        same = labels[first] == labels[second]
        first, second = first[same], second[same]
        total.index_add_(0, labels[first], alike[first, second].double())

    pairs = counts * (counts - 1) / 2
    shared = pairs > 0
    return float((total[shared] / pairs[shared]).mean()) if shared.any() else 1.0

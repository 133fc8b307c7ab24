"""Moments of features: what matching gets to see.

For the features of one space, all K models side by side, x = (x_1, ..., x_K) with n_1 + ... + n_K = N entries,
the moments are the sums  count = Σ 1,  total = Σ x,  outer = Σ x xᵀ  over all observed positions.
Sums only: moments of two batches, or of two ranks, add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SAMPLES = 512
"""Positions at which features are kept as they are."""


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of the features of K models, side by side.

    Attributes:
        count: number of observed positions.
        total: Σ x, float64, shape [N].
        outer: Σ x xᵀ, float64, shape [N, N].
        sizes: (n_1, ..., n_K), features per model; N = Σ n_k.
        samples: the same features at a few positions, as they are before the nonlinearity, shape [at most 512, N], or
            None. They decide between features that the moments cannot tell apart, such as those that a ReLU silences.
        marks: what the weights around a feature are like, whatever the order of all other features, shape [N, d], or
            None. They decide between features that the data cannot tell apart (see `unclear`).
    """

    count: float
    total: Tensor
    outer: Tensor
    sizes: tuple[int, ...]
    samples: Tensor | None = None
    marks: Tensor | None = None

    def __add__(self, other: Moments) -> Moments:
        drawn = [own for own in (self.samples, other.samples) if own is not None]
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.outer + other.outer,
            self.sizes,
            torch.cat(drawn)[:SAMPLES] if drawn else None,
            self.marks,
        )

    @property
    def mean(self) -> Tensor:
        """E[x], shape [N]."""
        return self.total / max(self.count, 1.0)

    @property
    def covariance(self) -> Tensor:
        """E[xxᵀ] - E[x] E[x]ᵀ, shape [N, N]."""
        mean = self.mean
        return (self.outer / max(self.count, 1.0)).addr_(mean, mean, alpha=-1)

    @property
    def alive(self) -> Tensor:
        """Which features vary beyond rounding, bool, shape [N]."""
        second = (self.outer.diagonal() / max(self.count, 1.0)).clamp(min=0)
        return second - self.mean.square() > 1e-12 * second.clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def correlation(self) -> Tensor:
        """Pearson correlation, shape [N, N]; a feature that never varies correlates 0 with others, 1 with itself."""
        covariance = self.covariance
        variance = covariance.diagonal()
        scale = torch.where(self.alive, variance.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
        return covariance.mul_(scale[:, None]).mul_(scale).clamp_(-1, 1).fill_diagonal_(1.0)

    def unclear(self, correlation: Tensor | None = None) -> Tensor:
        """Which features the data cannot tell from others of their model, bool, shape [N]: those that never vary, and
        affine copies of others. `correlation` saves computing it again.

        >>> x = torch.tensor([[1.0, 3.0, 0.0, 2.0], [2.0, 5.0, 1.0, 2.0], [3.0, 7.0, 0.0, 2.0]])
        >>> moments([x]).unclear()
        tensor([ True,  True, False,  True])
        """
        correlation = self.correlation if correlation is None else correlation
        result = ~self.alive
        for a, b in pairwise(self.offsets()):
            own = correlation[a:b, a:b].abs().fill_diagonal_(0)
            result[a:b] |= (own > 1 - 1e-4).any(1)
        return result

    def offsets(self) -> tuple[int, ...]:
        """Start of every model's features in x, and N at the end."""
        ends = torch.tensor([0, *self.sizes], device="cpu").cumsum(0)
        return tuple(int(end) for end in ends)

    def select(self, parts: Sequence[Tensor]) -> Moments:
        """Moments of a selection of features: `parts[k]` indexes the features of model k."""
        offsets = self.offsets()
        index = torch.cat([part + offset for part, offset in zip(parts, offsets, strict=False)])
        sizes = tuple(len(part) for part in parts)
        samples = None if self.samples is None else self.samples[:, index]
        marks = None if self.marks is None else self.marks[index.cpu()]
        return Moments(self.count, self.total[index], self.outer[index][:, index], sizes, samples, marks)


def moments(features: Sequence[Tensor]) -> Moments:
    """Moments of K matrices [positions, n_k] whose rows belong together.

    >>> x = torch.randn(100, 3)
    >>> moments([x, x]).sizes
    (3, 3)
    """
    joint = torch.cat([f.double() for f in features], dim=1)
    return Moments(float(len(joint)), joint.sum(0), joint.T @ joint, tuple(f.shape[1] for f in features))

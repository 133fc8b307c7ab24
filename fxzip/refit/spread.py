"""Mean and standard deviation of features over batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration import processes


@dataclass
class Sums:
    """Sums over batches, per feature.

    >>> sums = Sums()
    >>> _ = sums.add(torch.tensor([[0.0], [2.0]]), 1), sums.add(torch.tensor([[4.0]]), 1)
    >>> [round(float(value), 3) for value in sums.result()]
    [2.0, 1.633]
    """

    count: float = 0.0
    total: Tensor | None = None
    square: Tensor | None = None

    def add(self, value: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Take in a batch, features along `axis`; returns its mean and standard deviation per feature."""
        exact = value.detach() if value.dtype in (torch.float32, torch.float64) else value.detach().float()
        # A value without a batch, as one computed from parameters alone, is one place; torch takes no axes for all.
        exact, axis = (exact, axis % exact.ndim) if exact.ndim > 1 else (exact[None], 1)
        variance, mean = _variance_and_mean(exact, axis)
        count = exact.numel() / exact.shape[axis]
        total, square = mean * count, (variance + mean.square()) * count
        self.count += count
        self.total = total if self.total is None else self.total + total
        self.square = square if self.square is None else self.square + square
        return mean, variance.sqrt()

    def of_all(self) -> Sums:
        """The sums of all processes."""
        shapes = processes.everyone(None if self.total is None else self.total.shape)
        shape = next((own for own in shapes if own is not None), None)
        if shape is None or processes.count() == 1:
            return self
        nothing = torch.zeros(shape, dtype=torch.float64, device="cpu") if self.total is None else self.total
        count = processes.total(torch.tensor(self.count, dtype=torch.float64, device="cpu"))
        square = torch.zeros_like(nothing) if self.square is None else self.square
        return Sums(float(count), processes.total(nothing), processes.total(square))

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per feature over all of it, float64."""
        assert self.total is not None
        assert self.square is not None
        mean = self.total / self.count
        return mean, (self.square / self.count - mean.square()).clamp(min=0).sqrt()


def _variance_and_mean(value: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Per feature, float64 [n]. Sums along memory come first: that is many times faster than all axes at once."""
    if axis == value.ndim - 1:
        variance, mean = torch.var_mean(value, list(range(axis)), correction=0)
        return variance.double(), mean.double()
    runs = value.flatten(axis + 1).flatten(0, axis - 1) if axis else value.flatten(1)[None]  # [others, n, places]
    others, _, places = runs.shape
    mean = runs.sum(2).double().sum(0) / (others * places)
    centred = runs - mean.to(runs)[:, None]
    return torch.linalg.vector_norm(centred, dim=2).double().square().sum(0) / (others * places), mean

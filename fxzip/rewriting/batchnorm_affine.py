"""The algebra of BatchNorm in evaluation, in one place: y = (x - μ) · s + β with s = γ / √(σ² + ε).

Folding it into a linear call, setting it so that it only shifts, rescaling what it gives, and storing other statistics
while it stays the same map are all that the rest of the package does to a BatchNorm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


@dataclass(frozen=True, eq=False)
class Affine:
    """y = (x - mean) · scale + shift, feature by feature; [features] each, float64."""

    mean: Tensor
    scale: Tensor
    shift: Tensor

    def behind(self, bias: Tensor) -> Tensor:
        """The bias of a linear call with this behind it; its weight is scaled row by row."""
        return (bias - self.mean) * self.scale + self.shift


def affine_of(norm: _NormBase) -> Affine:
    """What a normalisation with statistics computes in evaluation.

    >>> norm = nn.BatchNorm1d(2, eps=0.0).eval()
    >>> affine_of(norm).scale
    tensor([1., 1.], dtype=torch.float64)
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    weight = torch.ones_like(deviation) if norm.weight is None else norm.weight.detach().double()
    bias = torch.zeros_like(deviation) if norm.bias is None else norm.bias.detach().double()
    return Affine(norm.running_mean.double(), weight / deviation, bias)


def set_to_shift(norm: _NormBase, shift: Tensor) -> None:
    """Let it do nothing but add a shift. In place."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0)
    norm.weight.fill_(math.sqrt(1 + norm.eps))
    norm.bias.copy_(shift.to(norm.bias))


def rescale(norm: _NormBase, scale: Tensor, shift: Tensor) -> None:
    """Let it give scale · y + shift where it gave y. In place; it must have a weight and a bias."""
    norm.weight.mul_(scale.to(norm.weight))
    norm.bias.copy_(scale.to(norm.bias) * norm.bias + shift.to(norm.bias))


def restate(norm: _NormBase, mean: Tensor, variance: Tensor, *, near: float = 0.0) -> None:
    """Store other statistics, with scale and shift under which it stays the same map:

        γ' = γ √((σ'² + ε) / (σ² + ε)),      β' = β + γ (μ' - μ) / √(σ² + ε).

    New tensors in the place of the old. Without a weight it is left as it is where the statistics are within `near`
    standard deviations of those stored: scale and shift would have to be made.
    """
    old_mean, old_variance, kept = norm.running_mean, norm.running_var, norm.weight
    assert old_mean is not None
    assert old_variance is not None
    before, spread = old_mean.double(), old_variance.double()
    scale = ((variance + norm.eps) / (spread + norm.eps)).sqrt()
    away = (mean - before) / (spread + norm.eps).sqrt()
    if kept is None and bool(((scale - 1).abs() < near).all() and (away.abs() < near).all()):
        return

    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    bias = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    grad = any(p.requires_grad for p in norm.parameters()) or kept is None
    norm.weight = nn.Parameter((weight * scale).to(old_mean if kept is None else kept), requires_grad=grad)
    norm.bias = nn.Parameter((bias + weight * away).to(norm.weight), requires_grad=grad)
    norm.running_mean, norm.running_var = mean.to(old_mean), variance.to(old_variance)
    norm.affine = True

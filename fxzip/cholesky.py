"""Cholesky factors of matrices that are positive semidefinite up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def ridged_cholesky(matrix: Tensor, ridge: float, scale: Tensor | float = 1.0) -> tuple[Tensor, float]:
    """The factor of matrix + ridge · scale · 1, and the ridge that it took: it grows tenfold until there is a factor,
    for rounding may leave an eigenvalue below -ridge.

    >>> factor, ridge = ridged_cholesky(torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-3]]), 1e-6)
    >>> round(ridge, 6)
    0.001

    Args:
        matrix: finite and symmetric, [..., n, n]; all of a batch get the same ridge.
        ridge: the first to try, at least 0.
        scale: positive, broadcast to [..., n].
    """
    if not bool(matrix.isfinite().all()):
        raise ValueError("the matrix must be finite")
    while True:
        regular = matrix.clone()
        regular.diagonal(dim1=-2, dim2=-1).add_(ridge * scale)
        factor, info = torch.linalg.cholesky_ex(regular)
        if not bool(info.any()):
            return factor, ridge
        ridge = max(ridge, 1e-12) * 10

"""Cholesky factors of matrices that are positive semidefinite up to rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import DataError

MOST = 1e6
"""A ridge above this number of times the scale leaves nothing of the matrix."""


def ridged_cholesky(matrix: Tensor, ridge: float, scale: Tensor | float = 1.0) -> tuple[Tensor, float]:
    """The factor of matrix + ridge · scale · 1, and the ridge that it took: it grows tenfold until there is a factor,
    for rounding may leave an eigenvalue below -ridge.

    >>> factor, ridge = ridged_cholesky(torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-3]]), 1e-6)
    >>> round(ridge, 6)
    0.001

    Args:
        matrix: finite and symmetric, [..., n, n]; all of a batch get the same ridge.
        ridge: the first to try, at least 0.
        scale: positive and finite, broadcast to [..., n].

    Raises:
        DataError: the matrix is not finite, or so far from semidefinite that no ridge up to `MOST` helps.
    """
    first = ridge
    if not bool(matrix.isfinite().all()):
        bad = int((~matrix.isfinite()).sum())
        raise DataError(
            f"A Cholesky factor needs a finite matrix; {bad} of {matrix.numel()} entries are not. Look for overflow or "
            "NaN in the features, or in `data`."
        )

    while math.isfinite(ridge) and ridge <= max(MOST, first):
        regular = matrix.clone()
        regular.diagonal(dim1=-2, dim2=-1).add_(ridge * scale)
        factor, info = torch.linalg.cholesky_ex(regular)
        if not bool(info.any()) and bool(factor.isfinite().all()):
            return factor, ridge
        ridge = max(ridge, 1e-12) * 10

    raise DataError(
        f"A Cholesky factor needs a matrix that is positive semidefinite up to rounding; none was found for one of "
        f"{matrix.shape[-1]} rows with a ridge of {first:.1e} to {ridge / 10:.1e} times its scale. Look for features "
        "of very different magnitudes, or pass more data."
    )

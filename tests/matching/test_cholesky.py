"""Factors of matrices that are not quite definite: found with a ridge, or refused; never looked for without end."""

import math

import pytest
import torch

import fxzip
from fxzip.matching.linalg import MOST, ridged_cholesky


def test_the_factor_is_of_the_matrix_and_its_ridge():
    x = torch.randn(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = x @ x.mT  # of rank 2
    factor, ridge = ridged_cholesky(matrix, 0.0)
    torch.testing.assert_close(factor @ factor.mT, matrix + ridge * torch.eye(3).double(), atol=1e-12, rtol=0)
    assert ridge < 1e-9


def test_a_ridge_that_works_is_taken_however_large():
    assert ridged_cholesky(torch.eye(2), 10 * MOST)[1] == 10 * MOST


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_matrix_must_be_finite(value):
    with pytest.raises(fxzip.DataError, match=r"^A Cholesky factor needs a finite matrix; 1 of 4 entries are not\."):
        ridged_cholesky(torch.tensor([[1.0, 0.0], [0.0, value]]), 1e-6)


@pytest.mark.parametrize(
    ("matrix", "ridge", "scale"),
    [
        (torch.tensor([[-1e9, 0.0], [0.0, 1.0]]), 1e-6, 1.0),  # indefinite, beyond rounding
        (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), 1e-6, 0.0),  # no ridge at all
        (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), 1e-6, math.nan),
        (torch.eye(2), math.inf, 1.0),
        (torch.eye(2), math.nan, 1.0),
    ],
)
def test_looking_for_a_ridge_ends(matrix, ridge, scale):
    with pytest.raises(fxzip.DataError, match="needs a matrix that is positive semidefinite up to rounding"):
        ridged_cholesky(matrix, ridge, scale)

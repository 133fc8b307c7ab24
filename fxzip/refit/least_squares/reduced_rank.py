"""Ridge regression of a given rank, in closed form.

With W_f the ridge regression without a bound on its rank, H = Σ xᵀx + λ and any W,

    Σ ‖x W - t‖² + λ ‖W - W_0‖²  =  const + tr (W - W_f)ᵀ H (W - W_f),

so the best W of rank r is W_f projected on what H makes large of it (Izenman, Reduced-rank regression for the
multivariate linear model, 1975): with V the r leading eigenvectors of W_fᵀ H W_f, the principal components of what is
predicted, it is W_f V Vᵀ. The constant costs no rank: H is then what is left of it once the constant is eliminated,
the covariance of the inputs. A = W_f V is the first call, B = Vᵀ the second, and the bias is the second's.

In front of a ReLU each round of majorisation (`ridge_solution`) is such a problem with other targets, so the error
never grows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Blocks


class Cut(NamedTuple):
    """A solution of bounded rank, float64.

    Attributes:
        weight: A B with the bias as its last row, if there is one, [d + 1, n].
        first: A, [d, r].
        second: B, [r, n].
    """

    weight: Tensor
    first: Tensor
    second: Tensor


def cut_rank(solution: Tensor, inputs: Blocks, ridge: float, rank: int, *, constant: bool) -> Cut:
    """The solution of a ridge regression, cut to a rank where that costs the least.

    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> w = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0], [5.0, 6.0]]).double()  # of rank 1, but for the bias
    >>> ones = torch.cat([x, torch.ones(50, 1)], 1)
    >>> cut = cut_rank(w, Blocks.of(ones), 0.0, 1, constant=True)
    >>> bool(torch.allclose(cut.weight, w)), tuple(cut.first.shape), tuple(cut.second.shape)
    (True, (3, 1), (1, 2))

    Args:
        solution: W_f, float64, [d + 1, n]; without a constant [d, n].
        inputs: x, with the constant, [positions, d + 1].
        ridge: λ.
        rank: at most min(d, n).
        constant: whether 1 is the last input.
    """
    weight = solution[:-1] if constant else solution
    values = inputs.map(lambda own: (own[:, : len(weight)] @ weight.to(own)).double()).stored()
    energy = values.gram() + ridge * (weight.T @ weight)
    total = values.sum()
    held = values.rows + ridge
    if constant:
        energy -= torch.outer(total, total) / held

    vectors = torch.linalg.eigh(energy).eigenvectors[:, -rank:]
    first, second = weight @ vectors, vectors.T
    product = first @ second
    if not constant:
        return Cut(product, first, second)
    lost = total - (total @ vectors) @ second
    return Cut(torch.cat([product, (solution[-1] + lost / held)[None]]), first, second)

"""Linear assignment: the best one-to-one pairs of a table of scores."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def best_pairs(score: Tensor) -> tuple[Tensor, Tensor]:
    """One-to-one pairs (rows, columns) of a score matrix [a, b] with the greatest sum; min(a, b) of them, rows sorted.

    >>> best_pairs(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
    (tensor([0, 1]), tensor([1, 0]))
    """
    rows, columns = linear_sum_assignment(score.cpu().numpy(), maximize=True)
    return torch.as_tensor(rows, device=score.device), torch.as_tensor(columns, device=score.device)

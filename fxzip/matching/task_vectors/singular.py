"""Task vectors as matrices: TSV-Merge and Iso-C, layer by layer by singular value decompositions.

A kernel is the matrix of its first axis against all others, as a convolution multiplies patches. What is no matrix, a
bias or a scale, takes the mean of the task vectors, as in the papers' code. θ* = θ_0 + α τ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..weights_of_models import Weights, check_weights, relative
from .method import Parameter, TaskVectorMethod


def matrix_shape(shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of a parameter as a matrix; None if it is a vector.

    >>> matrix_shape((8, 3, 3, 3)), matrix_shape((1, 64, 32)), matrix_shape((8, 1, 1))
    ((8, 27), (64, 32), None)
    """
    sizes = [n for n in shape if n > 1]
    return None if len(sizes) < 2 else (sizes[0], int(torch.Size(sizes[1:]).numel()))


@dataclass(frozen=True)
class _ByMatrix(TaskVectorMethod):
    """Merges the task vectors of each matrix by itself.

    Attributes:
        scale: α.
        weights: of the task vectors; only their ratios count. None: all alike.
    """

    scale: float = 1.0
    weights: Weights = None

    def __post_init__(self) -> None:
        check_weights(self.weights)

    def combine(self, parameters: Sequence[Parameter]) -> list[Tensor]:
        """θ_0 + α τ."""
        return [one.base + self.scale * self._merged(one) for one in parameters]

    def _merged(self, one: Parameter) -> Tensor:
        vectors = one.vectors()
        weights = relative(self.weights, len(vectors))
        vectors *= vectors.new_tensor(weights).reshape(-1, *[1] * one.base.ndim)
        shape = matrix_shape(one.base.shape)
        return vectors.mean(0) if shape is None else self._matrix(vectors.reshape(-1, *shape)).reshape_as(one.base)

    def _matrix(self, vectors: Tensor) -> Tensor:
        """One matrix of those of all models, [models, rows, columns]."""
        raise NotImplementedError


@dataclass(frozen=True)
class TSV(_ByMatrix):
    """TSV-Merge (Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv 2412.00081).

    Of each task's matrix the first of its singular vectors are kept, a K-th of them. The kept ones of all tasks
    together, U = [U_1 ... U_K] and V alike, are replaced by the nearest matrices with orthonormal columns, so that
    tasks do not interfere: with U = P D Qᵀ that is P Qᵀ. The singular values stay.

    >>> one, two = torch.zeros(4, 4), torch.zeros(4, 4)
    >>> one[0, 1], two[2, 3] = 5.0, 7.0
    >>> torch.allclose(TSV().combine([Parameter("weight", torch.zeros(4, 4), (one, two))])[0], one + two)
    True

    `scale` is the paper's 1.
    """

    name: ClassVar[str] = "tsv"

    def _matrix(self, vectors: Tensor) -> Tensor:
        left, sizes, right = torch.linalg.svd(vectors, full_matrices=False)
        kept = max(sizes.shape[1] // len(vectors), 1)
        # A singular value that is rounding has any vectors, which must not push those of other tasks aside.
        real = sizes > torch.finfo(sizes.dtype).eps * max(vectors.shape[1:]) * sizes[:, :1]
        left, right = left * real[:, None], right * real[:, :, None]
        sizes = sizes[:, :kept].reshape(-1)
        left = left[:, :, :kept].movedim(0, 1).flatten(1)
        right = right[:, :kept].flatten(0, 1)
        merged: Tensor = (_orthonormal(left) * sizes) @ _orthonormal(right)
        return merged


def _orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, or rows."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


@dataclass(frozen=True)
class IsoC(_ByMatrix):
    """Iso-C (Marczak et al., No Task Left Behind, ICML 2025, arXiv 2502.04959).

    The task vectors of a matrix are added up, and each singular value of the sum becomes the mean of all.

    >>> merged, = IsoC().combine([Parameter("weight", torch.zeros(3, 3), (torch.randn(3, 3), torch.randn(3, 3)))])
    >>> sizes = torch.linalg.svdvals(merged)
    >>> bool((sizes - sizes[0]).abs().max() < 1e-5)
    True

    The paper tunes `scale` on labelled images; it is 1 where there are none.
    """

    name: ClassVar[str] = "iso-c"

    def _matrix(self, vectors: Tensor) -> Tensor:
        left, sizes, right = torch.linalg.svd(vectors.sum(0), full_matrices=False)
        merged: Tensor = sizes.mean() * (left @ right)
        return merged

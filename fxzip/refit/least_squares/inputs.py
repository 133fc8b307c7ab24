"""The inputs of a regression, with a constant that takes no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .blocks import Blocks


@dataclass(frozen=True, eq=False)
class Inputs:
    """x, [positions, d], and 1 as one more input behind them if there is a constant.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> inputs = Inputs(Blocks.of(x), constant=True)
    >>> inputs.outputs(torch.ones(3, 1)).whole().tolist()
    [[4.0], [8.0]]
    >>> inputs.gram().tolist()
    [[10.0, 14.0, 4.0], [14.0, 20.0, 6.0], [4.0, 6.0, 2.0]]

    Attributes:
        x: in float32 at least.
        constant: whether 1 is an input too.
    """

    x: Blocks
    constant: bool = False

    @property
    def width(self) -> int:
        """d, and one more with the constant."""
        return self.x.block(0).shape[1] + self.constant

    def outputs(self, weight: Tensor) -> Blocks:
        """x weight, [positions, n]; the last row of the weight is that of the constant."""

        def product(own: Tensor) -> Tensor:
            mine = weight.to(own)
            return torch.addmm(mine[-1], own, mine[:-1]) if self.constant else own @ mine

        return self.x.map(product)

    def gram(self) -> Tensor:
        """xᵀ x, float64."""
        return self.x.gram(constant=self.constant)

    def product(self, other: Blocks) -> Tensor:
        """xᵀ other, float64."""
        return self.x.product(other, constant=self.constant)

    def whole(self) -> Tensor:
        """The matrix, of all processes."""
        return F.pad(self.x.whole(), (0, int(self.constant)), value=1.0)

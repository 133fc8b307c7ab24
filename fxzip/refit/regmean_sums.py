"""What RegMean sums up of the inputs of a linear call, and the call that it makes of that."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration import processes
from ..matching.linalg import ridged_cholesky
from ..rewriting.module import ZippedModule
from .linear_calls.kernels import install
from .linear_calls.units import Unit, called


@dataclass
class InputSums:
    """Sums over the inputs that a call was seen to read.

    Attributes:
        gram: Σ xᵀx, [groups, inputs, inputs].
        total: Σ x, [groups, inputs].
        count: of the inputs.
    """

    gram: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu").double())
    total: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu").double())
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Inputs [groups, places, inputs]."""
        self.gram = self.gram.to(x.device) + (x.transpose(1, 2) @ x).double()
        self.total = self.total.to(x.device) + x.double().sum(1)
        self.count += x.shape[1]

    def of_all(self) -> InputSums:
        """The sums of all processes."""
        shapes = [shape for shape in processes.everyone((self.gram.shape, self.total.shape)) if shape[0]]
        if processes.count() == 1 or not shapes:
            return self
        gram, total = (
            own.expand(size).contiguous() for own, size in zip((self.gram, self.total), shapes[0], strict=True)
        )
        count = processes.before([self.count])[1][0]
        return InputSums(processes.total(gram), processes.total(total), count)

    def shrunk(self, alpha: float) -> InputSums:
        """With off-diagonal entries of the Gram matrix times α."""
        diagonal = torch.diag_embed(self.gram.diagonal(dim1=-2, dim2=-1))
        return InputSums(alpha * self.gram + (1 - alpha) * diagonal, self.total, self.count)


@dataclass
class CallMean:
    """What the models' calls are, and what they were seen to read."""

    seen: list[InputSums] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)

    def add(self, seen: InputSums, weight: Tensor, bias: Tensor) -> None:
        """A model's inputs, and its call as `effective` gives it."""
        self.seen.append(seen)
        self.weights.append(weight)
        self.biases.append(bias)

    def put(self, net: ZippedModule, unit: Unit) -> None:
        """Write the solution; a call in which all models agree to the bit is left as the zip has it."""
        assert unit.kernel is not None
        if all(torch.equal(own, held[0]) for held in (self.weights, self.biases) for own in held):
            return

        weight = self.solution()
        norm = None if unit.norm is None else called(net, unit.norm)
        if norm is None:
            unit.kernel.put(weight)
        else:
            install(unit.kernel, norm, weight, self.bias(weight))

    def solution(self) -> Tensor:
        """[groups, outputs, inputs]. Inputs that are always zero keep the mean of the weights."""
        gram = torch.stack([seen.gram for seen in self.seen]).sum(0)
        flat = torch.stack(self.weights).transpose(2, 3)
        product = torch.stack([seen.gram @ own for seen, own in zip(self.seen, flat, strict=True)]).sum(0)
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=torch.finfo(torch.float64).tiny)
        factor, ridge = ridged_cholesky(gram, 1e-12, scale[:, :, 0])
        return torch.cholesky_solve(product + ridge * scale * flat.mean(0), factor).transpose(1, 2)

    def bias(self, weight: Tensor) -> Tensor:
        """The best bias for these weights, [outputs]."""
        total, count = torch.zeros_like(self.biases[0]), 0
        for seen, own, bias in zip(self.seen, self.weights, self.biases, strict=True):
            moved = torch.einsum("goi,gi->go", own - weight, seen.total).flatten()
            total += seen.count * bias + moved
            count += seen.count
        return total / count

"""How far the outputs of one head agree with those of its original, added up over batches.

With outputs z of the head and y of the original on the same inputs, over all output tensors:

    same class       share of inputs with the same argmax, where the output is one tensor [batch, classes ≥ 2]
    relative error   ‖z - y‖ / ‖y‖, over all entries of all inputs
    R²               1 - ‖z - y‖² / ‖y - ȳ‖², ȳ the mean of all entries

and one score in [0, 1] for searches and tables, the mean over the output tensors of

    [batch, classes ≥ 2], floating point:   the share of inputs with the same argmax
    other floating point:                   1 - ‖z - y‖ / ‖y‖, at least 0
    integers and booleans:                  the share of equal entries

Which of two networks is nearer to the original shows sooner in all values than in which of them is the largest: of
some hundred inputs, few change their class. So searches rank networks by closeness, the mean over the output tensors of

    floating point:           R² of the tensor, at least 0
    integers and booleans:    the share of equal entries
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..tracing.precision import place_of_float64


@dataclass(frozen=True)
class HeadAgreement:
    """How far one head agrees with its original.

    Attributes:
        same_class: share of inputs with the same class, in [0, 1]; None where the output is no [batch, classes].
        relative_error: 0 for equal outputs.
        r_squared: 1 for equal outputs, 0 for a constant.
        score: in [0, 1], the mean over the output tensors (see `calibration/agreement.py`).
        closeness: in [0, 1], to rank networks by; likewise.
    """

    same_class: float | None
    relative_error: float
    r_squared: float
    score: float = 1.0
    closeness: float = 1.0

    def __str__(self) -> str:
        same = "" if self.same_class is None else f"same class {100 * self.same_class:.1f} %, "
        return f"{same}relative error {self.relative_error:.3g}, R² {self.r_squared:.3f}"


def mean_closeness(heads: Sequence[HeadAgreement]) -> float:
    """Of all heads of a network."""
    return sum(head.closeness for head in heads) / len(heads)


def same_class(found: Tensor, original: Tensor) -> Tensor | None:
    """For each input whether two outputs [batch, classes ≥ 2] name the same class; None for other outputs.

    >>> same_class(torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), torch.tensor([[0.0, 2.0], [0.0, 2.0]]))
    tensor([ True, False])
    """
    if original.ndim != 2 or original.shape[1] < 2 or not original.is_floating_point():
        return None
    return (found.argmax(1) == original.argmax(1)) & found.isfinite().all(1)


@dataclass
class _TensorSums:
    """Of one output tensor, under way."""

    hits: int = 0
    count: int = 0
    classes: bool = False
    error: float = 0.0
    square: float = 0.0
    total: complex = 0.0
    entries: int = 0

    def add(self, found: Tensor, original: Tensor) -> None:
        same = same_class(found, original)
        self.classes = same is not None
        if same is None and not (original.is_floating_point() or original.is_complex()):
            same = found == original
        if same is not None:
            self.hits += int(same.sum())
            self.count += same.numel()

        exact = torch.complex128 if original.is_complex() else torch.float64
        place = place_of_float64(original.device)
        z, y = found.detach().to(place).to(exact), original.detach().to(place).to(exact)
        self.error += float((z - y).abs().square().sum())
        self.square += float(y.abs().square().sum())
        self.total += y.sum().item()
        self.entries += y.numel()

    def join(self, other: _TensorSums) -> None:
        """Add what another has summed up."""
        self.classes = other.classes if other.entries else self.classes
        self.hits, self.count = self.hits + other.hits, self.count + other.count
        self.error, self.square = self.error + other.error, self.square + other.square
        self.total, self.entries = self.total + other.total, self.entries + other.entries

    def score(self) -> float:
        if self.count:
            return self.hits / self.count
        if self.square == 0.0:
            return float(self.error == 0.0)
        return max(0.0, 1.0 - (self.error / self.square) ** 0.5) if self.error < float("inf") else 0.0

    def closeness(self) -> float:
        if self.count and not self.classes:
            return self.hits / self.count
        variation = self.square - abs(self.total) ** 2 / max(self.entries, 1)
        return max(0.0, 1.0 - _ratio(self.error, variation)) if self.error < float("inf") else 0.0


@dataclass
class Comparison:
    """The agreement of one head with its original, under way; `result` once all batches are added."""

    tensors: list[_TensorSums] = field(default_factory=list)
    inputs: int = 0

    def add(self, found: Sequence[Tensor], original: Sequence[Tensor], inputs: int) -> None:
        """Add the output tensors of one batch of so many inputs."""
        self.inputs += inputs
        self.tensors.extend(_TensorSums() for _ in original[len(self.tensors) :])
        for own, z, y in zip(self.tensors, found, original, strict=True):
            own.add(z, y)

    @classmethod
    def joined(cls, parts: Sequence[Comparison]) -> Comparison:
        """Of the inputs of several."""
        result = cls()
        for part in parts:
            result.inputs += part.inputs
            result.tensors.extend(_TensorSums() for _ in part.tensors[len(result.tensors) :])
            for own, other in zip(result.tensors, part.tensors, strict=False):
                own.join(other)
        return result

    def result(self) -> HeadAgreement:
        """Of all batches so far; of none, that of equal outputs."""
        error = sum(own.error for own in self.tensors)
        square = sum(own.square for own in self.tensors)
        entries = sum(own.entries for own in self.tensors)
        variation = square - abs(sum(own.total for own in self.tensors)) ** 2 / max(entries, 1)

        only = self.tensors[0] if len(self.tensors) == 1 else None
        share = only.hits / only.count if only is not None and only.classes and only.count else None
        scores = [(own.score(), own.closeness()) for own in self.tensors] or [(1.0, 1.0)]
        score, closeness = (sum(each) / len(scores) for each in zip(*scores, strict=True))
        return HeadAgreement(share, _ratio(error, square) ** 0.5, 1.0 - _ratio(error, variation), score, closeness)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else (0.0 if part == 0 else float("inf"))

"""What a method that merges parameters is: features are matched by position, and `combine` does the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ..merge import Merge
from ..method import Method
from ..problem import Evidence, Problem
from ..weights_of_models import Weights


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter of the trunk, in the base and in all models, with its features where the first model has them.

    >>> one = Parameter("0.weight", torch.ones(2), (torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])))
    >>> one.vectors().tolist()
    [[0.0, 2.0], [-1.0, 0.0]]

    Attributes:
        name: in the first model.
        base: θ_0, float32 or wider.
        values: θ_k of each model, of that shape and dtype.
    """

    name: str
    base: Tensor
    values: tuple[Tensor, ...]

    def vectors(self) -> Tensor:
        """The task vectors, [models, *shape]."""
        return torch.stack(self.values) - self.base


class TaskVectorMethod(Method):
    """A method that merges the parameters of fine-tunes of one base.

    Attributes:
        weights: of the models; what they do is up to the method.
    """

    by_position: ClassVar[bool] = True
    weights: Weights

    @property
    def needs(self) -> frozenset[Evidence]:
        """No evidence: features are taken as they stand."""
        return frozenset()

    @property
    def one_to_one(self) -> bool:
        """Feature i of one model is feature i of all others."""
        return True

    @abstractmethod
    def combine(self, parameters: Sequence[Parameter]) -> list[Tensor]:
        """θ* for all parameters of the trunk together, each of the shape of its base."""

    def match(self, problem: Problem) -> list[Merge]:
        """The identity in every space.

        Raises:
            InputError: the models differ in the number of features, or another number than theirs is to be kept.
        """
        return [self._by_position(space.sizes, space.size) for space in problem.spaces]

    def _by_position(self, sizes: tuple[int, ...], size: int) -> Merge:
        if len(set(sizes)) > 1 or size != sizes[0]:
            wanted = "" if size == sizes[0] else f", of which {size} are to be kept"
            raise InputError(
                f"`{self.name}` needs fine-tunes of one base, which have as many features everywhere, and keeps all of "
                f'them; this space has {list(sizes)} features{wanted}. Use `method="energy"` or `"zip"`.'
            )
        ratios = self.weights if self.weights is not None and min(self.weights) > 0 else None
        return Merge.identity(sizes[0], len(sizes), weights=ratios)

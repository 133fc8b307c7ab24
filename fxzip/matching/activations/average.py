"""No matching at all: feature i of every model is taken for the same feature. Weight averaging, and the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import InputError, OptionError
from ..merge import Merge
from ..method import SpaceMethod
from ..moments import Moments
from ..weights_of_models import Weights, check_weights


@dataclass(frozen=True)
class Average(SpaceMethod):
    """Average the models as they are: M_k = w_k I / Σ w, U_k = I.

    >>> import torch
    >>> from fxzip.matching.moments import moments
    >>> Average()(moments([torch.randn(9, 2), torch.randn(9, 2)])).M(1)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)

    Right for networks fine-tuned from one initialisation (Model Soups, arXiv 2203.05482, uniform soup).

    Attributes:
        weights: of the models, positive; only their ratios count. None: all alike.
    """

    weights: Weights = None

    name: ClassVar[str] = "average"
    one_to_one: ClassVar[bool] = True
    by_position: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_weights(self.weights)

    def __call__(self, moments: Moments, size: int | None = None) -> Merge:
        """The identity merge of K models with n features each.

        Args:
            moments: of the space; only `Merge.correlation` depends on them, and they may be empty.
            size: features to keep: n.

        Raises:
            OptionError: the models differ in the number of features, or `size` is not n.
        """
        sizes = moments.sizes
        if any(n != sizes[0] for n in sizes):
            raise InputError(
                f"`average` needs models of equal width; this space has {list(sizes)} features. "
                'Use `method="permute"` or `method="zip"`, which match features of different widths.'
            )

        if size not in (None, sizes[0]):
            raise OptionError(f"`average` keeps every feature: `size` must be {sizes[0]}; got {size}.")

        return Merge.identity(sizes[0], len(sizes), moments, self.weights)

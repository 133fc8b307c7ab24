"""How much each model counts, for methods that can weigh them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from ..errors import OptionError
from .method import Method

Weights = tuple[float, ...] | None
"""One for each model; None: all alike."""

Own = TypeVar("Own", bound=Method)


def relative(weights: Weights, models: int) -> list[float]:
    """Weights of mean 1.

    >>> relative((3, 1), 2), relative(None, 2)
    ([1.5, 0.5], [1.0, 1.0])
    """
    if weights is None:
        return [1.0] * models
    return [len(weights) * weight / sum(weights) for weight in weights]


def check_weights(weights: Weights, *, positive: bool = True) -> None:
    """Weights must be finite numbers, and those whose ratios count must be positive.

    Raises:
        OptionError: they are not.
    """
    if weights is None:
        return
    wrong = [w for w in weights if not math.isfinite(w) or (positive and w <= 0)]
    if wrong:
        what = "positive, for only their ratios count" if positive else "finite"
        raise OptionError(f"`weights` must be {what}; found {wrong[0]!r}. Leave a model out that is not to count.")


def takes_weights(method: Method) -> bool:
    """Whether a method can weigh models: whether it has a field `weights` for them.

    >>> from fxzip.matching import Average, Permute
    >>> takes_weights(Average()), takes_weights(Permute())
    (True, False)
    """
    return "weights" in getattr(method, "__dataclass_fields__", {})


def weighted(method: Own, weights: Sequence[float]) -> Own:
    """The method with a weight for each model.

    >>> from fxzip.matching import Average
    >>> weighted(Average(), [0.75, 0.25])
    Average(weights=(0.75, 0.25))

    Raises:
        OptionError: the method has no weights.
    """
    if not takes_weights(method):
        raise OptionError(
            f"`weights` must go with a method that weighs models, such as `average` or `task-arithmetic`; found "
            f"`{method!r}`, which does not. Leave `weights` out, or take another method."
        )
    return replace(method, weights=tuple(float(w) for w in weights))  # type: ignore[type-var]

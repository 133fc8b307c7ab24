"""A line of a table of zips: a method with a refit, under the names that the table shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..compiler.options import Recipe
from ..matching.weights_of_models import takes_weights
from ..refit import Refit
from ..widths.requests import WHOLE, Currency, RankRequest, WidthRequest, width_request

ALONE = "alone"
"""The row of the networks narrowed each by itself, side by side."""


@dataclass(frozen=True, eq=False)
class Line:
    """A method with a refit, under the names that the table shows."""

    method: str
    refit: str | None
    recipe: Recipe

    def weighing(self, weights: tuple[float, ...] | None) -> Line:
        """The same with weights of the models, where its method takes some."""
        if not takes_weights(self.recipe.method):
            return self
        return replace(self, recipe=self.recipe.weighing(weights))

    @classmethod
    def alone(cls, width: WidthRequest, rank: RankRequest = WHOLE) -> Line:
        """Each network narrowed by itself, all of them together within a budget."""
        return cls(ALONE, "lstsq", Recipe.of("energy", "lstsq", calibrated=True, width=width, rank=rank))

    @classmethod
    def of(cls, entry: Any, refit: str | Refit | None, *, calibrated: bool, budget: Currency | None) -> Line:
        method, own = entry if isinstance(entry, tuple) else (entry, refit)
        if isinstance(method, str) and method == ALONE:
            return cls.alone(width_request("auto", None, 1, budget))
        recipe = Recipe.of(method, own, calibrated=calibrated)
        return cls(shown(method) or "", shown(recipe.refit_name), recipe)


def shown(value: Any) -> str | None:
    """A method or refit as the table shows it."""
    return value if value is None or isinstance(value, str) else repr(value)

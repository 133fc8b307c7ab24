"""What a user may ask of a compile, checked and with the defaults filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from ..analysis.rules import Rule
from ..errors import OptionError
from ..matching import Method, resolve
from ..refit import LeastSquares, Refit, fit_least_squares, refits
from ..widths.choose import Width

MethodName = Literal[
    "auto", "energy", "zip", "permute", "weights", "average", "agglomerative", "c2m3", "cca", "kmeans", "mudsc",
    "optimal", "recover", "transport",
]  # fmt: skip
RefitName = Literal["auto", "lstsq", "repair", "batchnorm", "stored", "regmean"]


class CompileOptions(TypedDict, total=False):
    """The keyword arguments of `compile_zip`, which says what they mean."""

    data: Any
    method: MethodName | Method
    start: str | Sequence[str] | None
    until: Literal["auto"] | str | float | None
    width: Literal["auto"] | float | Mapping[str, float]
    min_agreement: float | None
    max_cost: float | None
    refit: RefitName | Refit | None
    joint: bool
    verify: bool
    strict: bool
    progress: bool | None
    max_batches: int
    rules: Mapping[str, Rule] | None


@dataclass(frozen=True)
class Recipe:
    """How to merge and to correct. `refit_name` is what the report calls the refit; `sizing` is width and cost, as
    `choose_widths` takes them."""

    method: Method
    refit: Refit
    refit_name: Any
    sizing: tuple[Width, float | None] = (1.0, None)

    @property
    def observes(self) -> bool:
        """Whether anything that is to be decided depends on what the data show."""
        return "moments" in self.method.needs or self.sizing[0] != 1

    @property
    def narrows(self) -> bool:
        """Whether heads may keep fewer features: by need, and where least squares mends what that does to them."""
        return self.sizing[0] == "auto" and _fits(self.refit)

    @classmethod
    def of(
        cls,
        method: str | Method,
        refit: str | Refit | None,
        *,
        calibrated: bool,
        sizing: tuple[Width, float | None] = (1.0, None),
    ) -> Recipe:
        """The defaults filled in: `refit="auto"` is least squares where there is data, and `method="auto"` is `Energy`
        under least squares, else ZipIt!.

        >>> Recipe.of("auto", "auto", calibrated=True).method, Recipe.of("auto", "repair", calibrated=True).method
        (Energy(floor=0.01, ridge=1e-05), Zip(alpha=1.0, beta=1.0))
        """
        if isinstance(refit, str) and refit == "auto":
            refit = "lstsq" if calibrated else "repair"
        corrected = refits(refit)
        if isinstance(method, str) and method == "auto":
            method = "energy" if _fits(corrected) else "zip"
        return cls(resolve(method), corrected, refit, sizing)


def _fits(refit: Refit) -> bool:
    return refit is fit_least_squares or isinstance(refit, LeastSquares)


@dataclass(frozen=True)
class Goal:
    """What `until="auto"` is to reach: one of the two is set.

    Attributes:
        min_agreement: of every head with its original, in (0, 1].
        max_cost: FLOPs relative to the first model alone.
        by_need: widths are chosen by need, so that every cut takes `max_cost`.
    """

    min_agreement: float | None = None
    max_cost: float | None = None
    by_need: bool = False

    @classmethod
    def of(
        cls, until: object, min_agreement: float | None, max_cost: float | None, *, by_need: bool = False
    ) -> Goal | None:
        """The goal, None for a cut that the user fixed.

        >>> Goal.of("auto", None, None)
        Goal(min_agreement=0.98, max_cost=None, by_need=False)

        Raises:
            OptionError: the arguments contradict each other, or are out of range.
        """
        given = {"min_agreement": min_agreement, "max_cost": max_cost}
        names = [f"`{name}={value!r}`" for name, value in given.items() if value is not None]
        if until != "auto":
            if names:
                raise OptionError(
                    f'{" and ".join(names)} must go with `until="auto"`, which looks for a cut; found '
                    f"`until={until!r}`, a fixed one. Leave one of them out."
                )
            return None
        if len(names) == 2:
            raise OptionError(
                f'`until="auto"` takes one goal: `min_agreement` (the deepest cut that agrees) or `max_cost` (the '
                f"earliest cut that is cheap enough); found {' and '.join(names)}. Leave one of them out."
            )
        if min_agreement is not None and not 0 < min_agreement <= 1:
            raise OptionError(f"`min_agreement` must lie in (0, 1]; found {min_agreement!r}. Try 0.98.")
        if max_cost is not None and not max_cost > 0:
            raise OptionError(
                f"`max_cost` must be positive, FLOPs relative to the first model alone; found {max_cost!r}. Try 1.3."
            )
        if by_need and max_cost is None:
            raise OptionError(
                '`until="auto"` with `width="auto"` needs `max_cost`: what the zip may take wherever the trunk ends; '
                f"found {names[0] if names else 'no goal'}. Try `max_cost=1.3`, or leave `width` out."
            )
        return cls(0.98, None) if not names else cls(min_agreement, max_cost, by_need)

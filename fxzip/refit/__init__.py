"""Refit the zipped network on unlabelled data: BatchNorm statistics, REPAIR, least squares, RegMean."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import OptionError
from ..rewriting.module import ZippedModule
from ..rewriting.zip_plan import ZipPlan
from ..tracing.calls import Call
from .least_squares.least_squares import Fit, LeastSquares, fit_least_squares
from .recording import record_statistics
from .refitted import Refit, Refitted, refit_with_notes
from .regmean import RegMean, RegMeanPlusPlus
from .statistics.batchnorm import reset_batchnorm
from .statistics.repair import repair
from .statistics.stored import stored_statistics

__all__ = [
    "REFITS",
    "Fit",
    "LeastSquares",
    "Refit",
    "Refitted",
    "RegMean",
    "RegMeanPlusPlus",
    "fit_least_squares",
    "record_statistics",
    "refit_with_notes",
    "refits",
    "repair",
    "reset_batchnorm",
    "stored_statistics",
]


def unchanged(zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
    """No refit."""
    return zipped


REFITS: dict[str | None, Refit] = {
    None: unchanged,
    "batchnorm": reset_batchnorm,
    "repair": repair,
    "stored": stored_statistics,
    "lstsq": fit_least_squares,
    "regmean": RegMean(),
    "regmean++": RegMeanPlusPlus(),
}


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function takes so many arguments, as far as it says what it takes."""
    try:
        inspect.signature(function).bind(*range(count))
    except ValueError:  # functions of C do not always say
        return True
    except TypeError:
        return False
    return True


def refits(name: str | Refit | None) -> Refit:
    """The refit of that name; a refit itself, such as `LeastSquares(ridge=1e-3)`, is passed through.

    >>> refits("repair").__name__
    'repair'
    """
    if callable(name):
        if not _takes(name, 3):
            raise OptionError(
                f"`refit` as a function must take three arguments, the zipped network, its plan and the data; found "
                f"`{getattr(name, '__name__', type(name).__name__)}`, which does not."
            )
        return name
    if name not in REFITS:
        known = ", ".join([repr("auto"), *(repr(key) for key in REFITS)])
        raise OptionError(f"`refit` must be one of {known}; found {name!r}.")
    return REFITS[name]

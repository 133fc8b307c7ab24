"""Refit the zipped network on unlabelled data: BatchNorm statistics, REPAIR, least squares, RegMean."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..errors import OptionError
from ..rewriting.module import ZippedModule
from ..rewriting.zip_plan import ZipPlan
from ..tracing.calls import Call
from .least_squares.least_squares import Fit, LeastSquares, fit_least_squares
from .recording import record_statistics
from .regmean import RegMean
from .statistics.batchnorm import reset_batchnorm
from .statistics.repair import repair
from .statistics.stored import stored_statistics

__all__ = [
    "REFITS",
    "Fit",
    "LeastSquares",
    "Refit",
    "RegMean",
    "fit_least_squares",
    "fit_notes",
    "record_statistics",
    "refits",
    "repair",
    "reset_batchnorm",
    "stored_statistics",
]

Refit = Callable[[ZippedModule, ZipPlan, Iterable[Call]], ZippedModule]


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
}


def refits(name: str | Refit | None) -> Refit:
    """The refit of that name; a refit itself, such as `LeastSquares(ridge=1e-3)`, is passed through.

    >>> refits("repair").__name__
    'repair'
    """
    if callable(name):
        return name
    if name not in REFITS:
        known = ", ".join([repr("auto"), *(repr(key) for key in REFITS)])
        raise OptionError(f"`refit` must be one of {known}; found {name!r}.")
    return REFITS[name]


def fit_notes(zipped: ZippedModule) -> list[str]:
    """What a refit, and who has stored the statistics, have to say for the report."""
    fit, stored = zipped.meta.get("fxzip_fit"), list(zipped.meta.get("fxzip_statistics", ()))
    if isinstance(fit, str):
        return [fit, *stored]
    return [*_fit_notes(fit), *stored] if isinstance(fit, Fit) else stored


def _fit_notes(fit: Fit) -> list[str]:
    notes = [f"least squares fitted {len(fit.fitted)} calls"]
    if fit.lost:
        worst = max(fit.lost, key=lambda name: fit.lost[name])
        notes.append(
            f"{len(fit.lost)} of them compute whatever tells most of the originals' features; most is lost in "
            f"`{worst}`, {fit.lost[worst]:.1%} of what their weights read there"
        )
    for why in dict.fromkeys(fit.left.values()):
        names = [f"`{name}`" for name, own in fit.left.items() if own == why]
        notes.append(f"left as zipped, since {why}: " + ", ".join(names))
    notes += [
        f"`{name}` needed a ridge of {ridge:.0e}: its inputs are rank-deficient" for name, ridge in fit.raised.items()
    ]
    used, seen = fit.inputs
    if used < seen:
        notes.append(
            f"least squares used {used} of {seen} inputs: those beyond the memory limit were left out "
            "(`fxzip.LeastSquares(memory=...)` raises it)"
        )
    return notes

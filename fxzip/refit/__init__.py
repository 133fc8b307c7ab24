"""Refit the zipped network on unlabelled data: BatchNorm statistics, REPAIR."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..errors import InputError
from ..inputs import Call
from ..plan import ZipPlan
from ..zipped import ZippedModule
from .statistics import repair, reset_batchnorm

__all__ = ["REFITS", "Refit", "refits", "repair", "reset_batchnorm"]

Refit = Callable[[ZippedModule, ZipPlan, Iterable[Call]], ZippedModule]


def unchanged(zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
    """No refit."""
    return zipped


REFITS: dict[str | None, Refit] = {None: unchanged, "batchnorm": reset_batchnorm, "repair": repair}


def refits(name: str | None) -> Refit:
    """The refit of that name.

    >>> refits("repair").__name__
    'repair'
    """
    if name not in REFITS:
        known = ", ".join(repr(key) for key in REFITS)
        raise InputError(f"`refit` must be one of {known}; found {name!r}.")
    return REFITS[name]

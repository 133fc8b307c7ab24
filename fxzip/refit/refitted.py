"""What a refit gives: the corrected network, and what it has to say for the report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..rewriting.module import ZippedModule
from ..rewriting.zip_plan import ZipPlan
from ..tracing.calls import Call
from .readings import NO_READINGS, Readings

Refit = Callable[[ZippedModule, ZipPlan, Iterable[Call]], ZippedModule]
"""Any function of these three is a refit."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """A network, corrected.

    Attributes:
        module: a new one.
        notes: lines for the report.
        readings: what its normalisations read on the data, as far as the refit has seen that.
    """

    module: ZippedModule
    notes: tuple[str, ...] = ()
    readings: Readings = NO_READINGS


@runtime_checkable
class NotingRefit(Protocol):
    """A refit that has something to say: called it gives the network alone, by `refitted` the notes as well."""

    def __call__(self, zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call], /) -> ZippedModule: ...

    def refitted(self, zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call], /) -> Refitted:
        """The network with notes."""
        ...


def noting(refit: Callable[[ZippedModule, ZipPlan, Iterable[Call]], Refitted]) -> Refit:
    """A function that gives notes too as a refit: see `NotingRefit`."""

    @functools.wraps(refit)
    def plain(zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call], /) -> ZippedModule:
        return refit(zipped, plan, data).module

    vars(plain)["refitted"] = refit
    return plain


def refit_with_notes(refit: Refit, zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> Refitted:
    """Call a refit, of whatever kind; one that is a plain function has no notes."""
    if isinstance(refit, NotingRefit):
        return refit.refitted(zipped, plan, data)
    return Refitted(refit(zipped, plan, data))

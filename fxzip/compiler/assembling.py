"""The stages behind the observation, for one trunk: plan -> rewrite -> refit -> report; in full, or as a sketch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from ..calibration.agreement import mean_closeness
from ..calibration.sources import Calibration
from ..refit import refit_with_notes
from ..refit.recording import recorded_statistics
from ..rewriting.module import ZippedModule, reuse_memory
from ..rewriting.report import Report, make_report
from ..widths.choose import overspent
from ..widths.observed import Observed
from .affording import Affordable, affordable, unnarrowed
from .one_base import about_base
from .options import Recipe
from .pairs import rough
from .session import Candidate, Session

NOTHING: Mapping[int, Observed] = MappingProxyType({})
Keeps = Literal["by need", "all"]
"""Which features a zip keeps."""


@dataclass(frozen=True, eq=False)
class Assembly:
    """A zip.

    Attributes:
        zipped: the network, with its report.
        keeps: "all" where widths are by need and the zip that keeps all features was better.
    """

    zipped: ZippedModule
    keeps: Keeps = "by need"


def assemble(
    session: Session, candidate: Candidate, recipe: Recipe, solo: Mapping[int, Observed] = NOTHING
) -> ZippedModule:
    """The zip of a trunk. `solo`: what `Session.solo` gives."""
    return assembled(session, candidate, recipe, solo).zipped


def assembled(
    session: Session, candidate: Candidate, recipe: Recipe, solo: Mapping[int, Observed], keeps: Keeps | None = None,
    *, sketching: Calibration | None = None,
) -> Assembly:  # fmt: skip
    """The zip of a trunk, and which features it keeps.

    Prices are measured where a budget is of latency or memory, so that a busy machine can mislead the choice of widths.
    If the zip that keeps all features keeps the budget, too, it is returned unless the heads of the other one are
    closer to their originals on the held-out inputs.

    Args:
        session: of the request.
        candidate: the trunk.
        recipe: how to merge it.
        solo: what `Session.solo` gives.
        keeps: which of the two is wanted; None: the better one.
        sketching: a part of the data; the zip is then but good enough to compare trunks by: it is fitted on these, in
            less time, and measured roughly.
    """
    tried = session.survey.sound(candidate.observed.trunk)
    observed, is_rough = candidate.observed, sketching is not None
    if tried.trunk is not observed.trunk:
        observed = session.observed(tried.trunk, recipe)

    fitting, way = session, recipe
    if sketching is not None:
        fitting, way = replace(session, calibration=sketching), replace(recipe, refit=rough(recipe.refit))

    def fitted(made: Affordable, solo: Mapping[int, Observed] = NOTHING) -> ZippedModule:
        return _fitted(fitting, way, made, observed, tried.notes, solo)

    if keeps == "all" and (plain := unnarrowed(session, observed, recipe, rough=is_rough)) is not None:
        return Assembly(fitted(plain), "all")
    zipped = fitted(affordable(session, observed, recipe, solo, rough=is_rough), solo)
    if keeps is not None or session.held is None:  # nothing is to be decided between them, or could
        return Assembly(zipped)
    plain = unnarrowed(session, observed, recipe, rough=is_rough)
    if plain is None:
        return Assembly(zipped)

    whole = fitted(plain)
    best, other = (mean_closeness(session.held.compared(one)) for one in (whole, zipped))
    return Assembly(whole, "all") if best >= other else Assembly(zipped)


def _fitted(
    session: Session, recipe: Recipe, made: Affordable, observed: Observed, notes: Sequence[str],
    solo: Mapping[int, Observed],
) -> ZippedModule:  # fmt: skip
    """The network of a plan, fitted, with its report. `notes`: of the check of the trunk."""
    found, calibration, stage = session.survey, session.calibration, session.display.stage
    with stage("refitting"):
        refitted = refit_with_notes(recipe.refit, made.network, made.plan, calibration("refitting"))
    with stage("recording statistics"):
        recorded = recorded_statistics(refitted.module, calibration("recording statistics"), refitted.readings)
    zipped = recorded.module
    reuse_memory(zipped)

    settings = {
        "method": repr(recipe.method),
        "refit": recipe.refit_name,
        "data": calibration.description,
        "self_check": list(found.errors),
        "notes": [
            *about_base(recipe, session.options.base), *observed.trunk.notes, *found.notes, *notes,
            *calibration.notes, *made.widths.notes, *refitted.notes, *recorded.notes,
        ],
    }  # fmt: skip
    moments = {k: one.moments for k, one in solo.items()}
    report = make_report(zipped, made.plan, settings, observed.moments, moments)
    report = Report({**report, "budget": made.spending(recipe.budget, report)})
    zipped.meta["fxzip_report"] = report.noting(*overspent(report, recipe.budget), *_saves_nothing(report))
    return zipped


def _saves_nothing(report: Report) -> list[str]:
    flops = report["flops"]
    ratio = flops["total"] / max(flops["side_by_side"], 1)
    if ratio < 1:
        return []
    return [f"the zip takes {ratio:.2f}x the FLOPs of the models side by side: what they can share saves none"]

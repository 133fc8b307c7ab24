"""`until="auto"` with widths by need: the cut whose heads are closest to the originals at a cost.

With widths by need every cut may cost the same: an early one keeps few features in the heads, or in the trunk where
heads stay as they are, a late one keeps many. Closeness then has one broad maximum along the row: four cuts evenly
along it, then those halfway between the best and its neighbours. The row begins with no trunk at all, each model
narrowed by itself: where sharing does not pay, that is found.

Which cut is better shows on less than all of the data. So cuts are compared by sketches, fitted on a part, and only the
best of them are made in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..calibration.sources import Calibration
from ..errors import CostError, CutError
from ..rewriting.module import ZippedModule
from ..widths.observed import Observed
from .assembling import Assembly, assembled
from .options import Recipe
from .search import Trials
from .session import Candidate, Session

COARSE, FINALISTS = 4, 2
"""Cuts to begin with; sketches that are made in full."""


def best_agreeing(
    session: Session, candidates: Sequence[Candidate], recipe: Recipe, solo: Mapping[int, Observed], limit: float
) -> ZippedModule:
    """The zip of the cut whose heads are closest to the originals, of some; each takes at most `limit` by its widths.

    `zipped.report["auto"]` holds the cut, the agreement of the heads, and every cut that was tried with what it costs.

    Args:
        session: of the request.
        candidates: from the least shared to the most.
        recipe: how to merge, by need.
        solo: what `Session.solo` gives.
        limit: what the zip may cost, for errors and notes.

    Raises:
        CutError: at none of the cuts tried a zip can be had at that cost. Interrupted: Ctrl-C, once there is one.
    """

    def build(place: int) -> Assembly:
        return assembled(session, candidates[place], recipe, solo)

    part = session.sketching
    if part is None:
        trials = Trials(session, candidates, build)
        session.display.expect(COARSE + 3)
        with trials.interruptible():
            _along_the_row(trials, limit)
        return _chosen(trials, limit)

    session.display.expect(COARSE + 3 + FINALISTS)
    return _by_sketches(session, candidates, recipe, solo, part, limit)


def _by_sketches(
    session: Session, candidates: Sequence[Candidate], recipe: Recipe, solo: Mapping[int, Observed], part: Calibration,
    limit: float,
) -> ZippedModule:  # fmt: skip
    """The better one of those whose sketches are best."""

    def sketch(place: int) -> Assembly:
        return assembled(session, candidates[place], recipe, solo, sketching=part)

    def build(place: int) -> Assembly:
        return assembled(session, candidates[place], recipe, solo, sketches.keeps[place])

    sketches = Trials(session, candidates, sketch, name="sketch")
    whole = Trials(session, candidates, build)
    with sketches.interruptible(), whole.interruptible():
        _along_the_row(sketches, limit)
        found = [place for place, heads in sketches.agreement.items() if heads]
        for place in sorted(found, key=lambda own: (sketches.closeness[own], own), reverse=True)[:FINALISTS]:
            _attempt(whole, place)
    if whole.best is None:
        raise _out_of_reach(limit, len(candidates))

    whole.agreement, whole.costs = {**sketches.agreement, **whole.agreement}, {**sketches.costs, **whole.costs}
    finalists = min(FINALISTS, len(found))
    return _chosen(whole, limit, f" on a part of the data, the best {finalists} of them made with all of it")


def _along_the_row(trials: Trials, limit: float) -> None:
    """Try some cuts.

    Raises:
        CutError: at none a zip can be had.
    """
    candidates = trials.candidates
    last = len(candidates) - 1
    first = min(last, int(candidates[0].cut.until == 0))  # behind the one that shares nothing
    coarse = sorted({0, *(first + round((last - first) * i / (COARSE - 1)) for i in range(COARSE))})
    for place in coarse:
        _attempt(trials, place)
    if trials.best is None:
        raise _out_of_reach(limit, len(candidates))
    middle = trials.best
    here = coarse.index(middle)
    for place in coarse[max(here - 1, 0) : here] + coarse[here + 1 : here + 2]:
        _attempt(trials, (place + middle) // 2)


def _attempt(trials: Trials, place: int) -> None:
    """Try a cut that was not tried."""
    if place in trials.agreement:
        return
    try:
        trials.attempt(place)
    except CostError:
        trials.agreement[place] = ()
        return
    best = trials.best
    if best is None or (trials.closeness[place], place) > (trials.closeness[best], best):
        trials.best = place


def _chosen(trials: Trials, limit: float, how: str = "") -> ZippedModule:
    assert trials.best is not None
    cut, cost = trials.cuts[trials.best], trials.costs[trials.best]
    note = (
        f'`until="auto"` chose {cut} of {len(trials.cuts)} cuts by {len(trials.costs)} evaluations{how}: cost '
        f"{cost:.3f} of at most {limit}, the heads agree on {trials.agreeing}"
    )
    return trials.noted({"until": cut.until, "cost": cost}, note)


def _out_of_reach(limit: float, cuts: int) -> CutError:
    return CutError(
        f"`max_cost={limit}` must be in reach; what has to keep its size takes more at each of {cuts} cuts. Raise it."
    )

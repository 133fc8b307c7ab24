"""`until="auto"`: the deepest cut that is good enough, the earliest that is cheap enough, or the best at a cost.

Sharing more costs less and agrees less. Agreement falls nearly monotonically from cut to cut, so bisection finds where
it crosses the bound: one evaluation of the full trunk, and if that does not do, log₂ of the number of cuts more.

With widths by need every cut may cost the same: an early one keeps few features in the heads, or in the trunk where
heads stay as they are, a late one keeps many. Agreement then has one broad maximum along the row: six cuts evenly along
it, then those halfway between the best and its neighbours. The row begins with no trunk at all, each model narrowed by
itself: where sharing does not pay, that is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, log2
from typing import Any

from ..calibration.holdout import HeldOut
from ..errors import CostError, CutError, Interrupted
from ..partition.cut_points import Cut
from ..rewriting.module import ZippedModule
from ..rewriting.report import Report
from ..widths.requests import Budget
from .affording import MEASURED, SLACK, spent_by
from .options import EarliestAffordable
from .session import Candidate, Session
from .survey import cuts_and_trunks

Build = Callable[[Candidate], ZippedModule]
"""Zips at a cut."""

_COARSE = 6


def deepest(count: int, passes: Callable[[int], bool]) -> int:
    """The last of `count` cuts that passes, -1 for none, if all before one that passes do.

    >>> asked = []
    >>> deepest(10, lambda place: asked.append(place) or place <= 6), asked
    (6, [9, 4, 6, 7])
    """
    if count == 0 or passes(count - 1):
        return count - 1
    low, high = -1, count - 1
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            low = middle
        else:
            high = middle
    return low


@dataclass(eq=False)
class _Trials:
    """The zips of one search, each cut tried once at most.

    Attributes:
        session: has the inputs that are held out.
        candidates: in a row, from the least shared to the most.
        build: makes a zip.
        agreement: of every head, by the number of the cut; empty where no zip can be had.
        costs: by the number of the cut, relative to the first model.
        best: the number of the cut of the best zip so far.
        kept: the best zip, or the last one, by the number of its cut.
    """

    session: Session
    candidates: Sequence[Candidate]
    build: Build
    agreement: dict[int, tuple[float, ...]] = field(default_factory=dict)
    costs: dict[int, float] = field(default_factory=dict)
    best: int | None = None
    kept: dict[int, ZippedModule] = field(default_factory=dict)

    @property
    def cuts(self) -> list[Cut]:
        """Where the trunk may end."""
        return [candidate.cut for candidate in self.candidates]

    @property
    def held(self) -> HeldOut:
        """Inputs that nothing was fitted on."""
        assert self.session.held is not None  # the session was opened for a search
        return self.session.held

    def attempt(self, place: int) -> None:
        """Make the zip at a cut and judge it, unless it is known what came of that before the compile was resumed."""
        self.session.display.about(f"cut {self.cuts[place]}, {len(self.agreement) + 1}. try")
        self.kept = {number: zipped for number, zipped in self.kept.items() if number == self.best}

        def judged() -> tuple[tuple[float, ...], float]:
            zipped = self.kept[place] = self._made(place)
            return self.held.agreement(zipped), _cost(zipped)

        found = self.session.store.value(f"agreement at cut {place}", judged, once=True)
        self.agreement[place], self.costs[place] = found

    def _made(self, place: int) -> ZippedModule:
        with self.session.store.part(f"cut {place}"):
            return self.build(self.candidates[place])

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C gives the best zip so far back, if there is one."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if self.best is None:
                raise
            place = self.best
            done, cut = len(self.costs), str(self.cuts[place])
            text = f"the search was interrupted after {done} zips; {cut} is the best of them"
            noted = self.noted({"until": self.cuts[place].until, "interrupted": True}, text)
            raise Interrupted(f"{text}: `error.zipped` holds it.", zipped=noted) from stop

    def noted(self, values: dict[str, Any], note: str) -> ZippedModule:
        """The best zip, with what its report says of the search."""
        assert self.best is not None
        place = self.best
        zipped = self.kept[place] if place in self.kept else self._made(place)
        found = {"agreement": self.agreement[place], "held_out": self.held.size, "frontier": self.frontier}
        evaluations = {self.cuts[i].until: min(heads) for i, heads in sorted(self.agreement.items()) if heads}
        return _noted(zipped, {**values, **found, "evaluations": evaluations}, note)

    @property
    def frontier(self) -> list[dict[str, Any]]:
        """Every zip that was tried: its cut, its cost relative to the first model, the agreement of its heads."""
        return [
            {"until": self.cuts[place].until, "cost": self.costs[place], "agreement": list(self.agreement[place])}
            for place in sorted(self.costs)
        ]

    @property
    def agreeing(self) -> str:
        """The agreement of the best zip's heads, in words."""
        assert self.best is not None
        heads = ", ".join(f"{value:.3f}" for value in self.agreement[self.best])
        return f"{heads} of {self.held.size} held-out inputs, on which nothing was fitted"


def deepest_agreeing(session: Session, candidates: Sequence[Candidate], build: Build, minimum: float) -> ZippedModule:
    """The zip of the deepest cut every head of which agrees on `minimum` of the held-out inputs.

    `zipped.report["auto"]` holds the cut, the agreement of the heads, and every cut that was tried with what it costs.

    Raises:
        CutError: none does. Interrupted: Ctrl-C, once one does.
    """
    trials = _Trials(session, candidates, build)
    session.display.expect(1 + ceil(log2(max(len(candidates), 1))))

    def passes(place: int) -> bool:
        trials.attempt(place)
        agrees = min(trials.agreement[place]) >= minimum
        if agrees:
            trials.best = place
        return agrees

    with trials.interruptible():
        place = deepest(len(candidates), passes)
    cuts, tried = trials.cuts, trials.agreement
    if place < 0:
        first = min(tried)
        raise CutError(
            f'`until="auto"` needs a cut whose heads all agree with the originals on {minimum} of the held-out inputs; '
            f"the earliest of {len(cuts)}, {cuts[first].until!r}, reaches {min(tried[first]):.3f}. Lower "
            '`min_agreement`, pass more `data`, try `refit="lstsq"`, or keep the models apart with '
            "`fxzip.side_by_side`."
        )
    note = (
        f'`until="auto"` chose {cuts[place]} of {len(cuts)} cuts by {len(tried)} evaluations: the heads agree '
        f"on {trials.agreeing}"
    )
    return trials.noted({"until": cuts[place].until}, note)


def earliest_affordable(
    session: Session, zipped_at: Callable[[str | float | None], ZippedModule], asked: EarliestAffordable
) -> ZippedModule:
    """The zip of the earliest cut that costs at most what is asked for: of those, the one that shares least.

    `zipped_at` makes a zip of which nothing but the cut is known.

    Raises:
        CutError: even the full trunk costs more.
    """
    limit, budget = asked.max_cost, Budget(asked.max_cost, asked.currency)
    cuts, _ = cuts_and_trunks(session.survey, prices=session.prices(asked.currency))
    slack = SLACK if asked.currency in MEASURED else 1.0
    first = next((i for i, cut in enumerate(cuts) if cut.cost <= limit), len(cuts) - 1)
    for place in range(first, len(cuts)):  # unmerging may cost a little more than a cut lets expect
        session.display.about(f"cut {cuts[place]}")
        zipped = zipped_at(cuts[place].until)
        cost = spent_by(session, zipped, budget)
        if cost <= limit * slack:
            note = (
                f'`until="auto"` chose {cuts[place]} of {len(cuts)} cuts: {budget.noun} {cost:.3f} of at most {limit}'
            )
            return _noted(zipped, {"until": cuts[place].until, "cost": cost}, note)
    raise CutError(
        f"`max_cost={limit}` must be in reach; the zip that shares most, up to the heads, has {cost:.3f} times the "
        f"{budget.noun} of the first model. Pass at least `max_cost={cost + 0.005:.2f}`."
    )


def best_agreeing(session: Session, candidates: Sequence[Candidate], build: Build, limit: float) -> ZippedModule:
    """The zip of the cut whose heads agree best on average, of some; every zip takes at most `limit` by its widths.

    Raises:
        CutError: at none of the cuts tried a zip can be had at that cost. Interrupted: Ctrl-C, once there is one.
    """
    trials = _Trials(session, candidates, build)
    session.display.expect(_COARSE + 3)

    def attempt(place: int) -> None:
        if place in trials.agreement:
            return
        try:
            trials.attempt(place)
        except CostError:
            trials.agreement[place] = ()
            return
        if trials.best is None or (_mean(trials, place), place) > (_mean(trials, trials.best), trials.best):
            trials.best = place

    last = len(candidates) - 1
    first = min(last, int(candidates[0].cut.until == 0))  # behind the one that shares nothing
    coarse = sorted({0, *(first + round((last - first) * i / (_COARSE - 1)) for i in range(_COARSE))})
    with trials.interruptible():
        for place in coarse:
            attempt(place)
        if trials.best is None:
            raise CutError(
                f"`max_cost={limit}` must be in reach; what has to keep its size takes more at each of "
                f"{len(candidates)} cuts. Raise it."
            )
        middle = trials.best
        here = coarse.index(middle)
        for place in coarse[max(here - 1, 0) : here] + coarse[here + 1 : here + 2]:
            attempt((place + middle) // 2)

    place = trials.best
    cut, cost = trials.cuts[place], trials.costs[place]
    note = (
        f'`until="auto"` chose {cut} of {len(candidates)} cuts by {len(trials.costs)} evaluations: cost '
        f"{cost:.3f} of at most {limit}, the heads agree on {trials.agreeing}"
    )
    return trials.noted({"until": cut.until, "cost": cost}, note)


def _cost(zipped: ZippedModule) -> float:
    """In the currency of its budget, relative to the first model."""
    spent = (zipped.report["budget"] or {}).get("spent")
    return zipped.report.cost if spent is None else float(spent)


def _mean(trials: _Trials, place: int) -> float:
    heads = trials.agreement[place]
    return sum(heads) / len(heads)


def exactly_shared(zipped: ZippedModule, until: str) -> ZippedModule:
    """The zip of the layers that the models have in common, with what the report says of a search."""
    note = (
        f'`until="auto"` chose {until!r}, up to where the models agree to the bit: a later cut could only be less '
        "exact; a fixed `until` or `max_cost` shares more"
    )
    return _noted(zipped, {"until": until, "evaluations": {}}, note)


def _noted(zipped: ZippedModule, values: dict[str, Any], note: str) -> ZippedModule:
    zipped.meta["fxzip_report"] = Report({**zipped.report.as_dict(), "auto": values}).noting(note)
    return zipped

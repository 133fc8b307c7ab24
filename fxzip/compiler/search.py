"""`until="auto"`: the deepest cut that is good enough, or the earliest that is cheap enough.

Sharing more costs less and agrees less. Agreement falls nearly monotonically from cut to cut, so bisection finds where
it crosses the bound: one evaluation of the full trunk, and if that does not do, log₂ of the number of cuts more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, log2
from typing import Any

from ..calibration.agreement import mean_closeness
from ..calibration.holdout import HeldOut
from ..errors import CutError, Interrupted
from ..partition.cut_points import Cut
from ..rewriting.module import ZippedModule
from ..rewriting.report import Report
from ..widths.requests import Budget
from .affording import SLACK, spent_by
from .assembling import Assembly, Keeps
from .options import EarliestAffordable
from .session import Candidate, Session
from .survey import cuts_and_trunks

Build = Callable[[int], Assembly]
"""Zips at a cut, by its number."""


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
class Trials:
    """The zips of one search, each cut tried once at most.

    Attributes:
        session: has the inputs that are held out.
        candidates: in a row, from the least shared to the most.
        build: makes a zip.
        agreement: of every head, by the number of the cut; empty where no zip can be had.
        closeness: by the number of the cut, see `calibration/agreement.py`.
        costs: by the number of the cut, relative to the first model.
        best: the number of the cut of the best zip so far.
        kept: the best zip, or the last one, by the number of its cut.
        keeps: which features each zip keeps, by the number of the cut.
        name: of what is tried, in a store.
    """

    session: Session
    candidates: Sequence[Candidate]
    build: Build
    agreement: dict[int, tuple[float, ...]] = field(default_factory=dict)
    closeness: dict[int, float] = field(default_factory=dict)
    costs: dict[int, float] = field(default_factory=dict)
    best: int | None = None
    kept: dict[int, ZippedModule] = field(default_factory=dict)
    keeps: dict[int, Keeps] = field(default_factory=dict)
    name: str = "cut"

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

        def judged() -> tuple[tuple[float, ...], float, float, Keeps]:
            made = self._made(place)
            self.kept[place] = made.zipped
            heads = self.held.compared(made.zipped)
            return tuple(head.score for head in heads), mean_closeness(heads), cost_of(made.zipped), made.keeps

        found = self.session.store.value(f"trial of {self.name} {place}", judged, once=True)
        self.agreement[place], self.closeness[place], self.costs[place], self.keeps[place] = found

    def _made(self, place: int) -> Assembly:
        with self.session.store.part(f"{self.name} {place}"):
            return self.build(place)

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
        zipped = self.kept[place] if place in self.kept else self._made(place).zipped
        found = {"agreement": self.agreement[place], "held_out": self.held.size, "frontier": self.frontier}
        evaluations = {self.cuts[i].until: min(heads) for i, heads in sorted(self.agreement.items()) if heads}
        return noted(zipped, {**values, **found, "evaluations": evaluations}, note)

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
    trials = Trials(session, candidates, build)
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
    slack = SLACK if budget.is_measured else 1.0
    first = next((i for i, cut in enumerate(cuts) if cut.cost <= limit), len(cuts) - 1)
    for place in range(first, len(cuts)):  # unmerging may cost a little more than a cut lets expect
        session.display.about(f"cut {cuts[place]}")
        zipped = zipped_at(cuts[place].until)
        cost = spent_by(session, zipped, budget)
        if cost <= limit * slack:
            note = (
                f'`until="auto"` chose {cuts[place]} of {len(cuts)} cuts: {budget.noun} {cost:.3f} of at most {limit}'
            )
            return noted(zipped, {"until": cuts[place].until, "cost": cost}, note)
    raise CutError(
        f"`max_cost={limit}` must be in reach; the zip that shares most, up to the heads, has {cost:.3f} times the "
        f"{budget.noun} of the first model. Pass at least `max_cost={cost + 0.005:.2f}`."
    )


def cost_of(zipped: ZippedModule) -> float:
    """In the currency of its budget, relative to the first model."""
    spent = (zipped.report["budget"] or {}).get("spent")
    return zipped.report.cost if spent is None else float(spent)


def exactly_shared(zipped: ZippedModule, until: str) -> ZippedModule:
    """The zip of the layers that the models have in common, with what the report says of a search."""
    note = (
        f'`until="auto"` chose {until!r}, up to where the models agree to the bit: a later cut could only be less '
        "exact; a fixed `until` or `max_cost` shares more"
    )
    return noted(zipped, {"until": until, "evaluations": {}}, note)


def noted(zipped: ZippedModule, values: dict[str, Any], note: str) -> ZippedModule:
    zipped.meta["fxzip_report"] = Report({**zipped.report.as_dict(), "auto": values}).noting(note)
    return zipped

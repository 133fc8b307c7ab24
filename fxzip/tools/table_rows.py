"""The rows of a table of zips: each is made, timed and judged; what comes before that is done once for all."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ..compiler.arguments import Given
from ..compiler.assembling import assemble
from ..compiler.one_base import for_fine_tunes
from ..compiler.options import Options
from ..compiler.placement import device_of
from ..compiler.progress import Display
from ..compiler.session import Candidate, Session
from ..compiler.timing import as_used, fastest
from ..errors import CostError, InputError, Interrupted
from ..rewriting.module import ZippedModule
from ..tracing.precision import has_float64
from ..widths.observed import Observed
from ..widths.requests import WHOLE, Budget
from .lines import ALONE, Line
from .narrowing import narrowed_apart
from .table import Table
from .unmerged import side_by_side

Score = Callable[[nn.Module], float | Mapping[str, float]]
"""Of a network that returns a tuple with each model's output; greater is better, or several numbers with names."""


@dataclass(frozen=True, eq=False)
class TableRows:
    """The rows of one table: all lines, at cuts of one session; `device`: where the models are."""

    session: Session
    lines: Sequence[Line]
    seconds: float
    device: torch.device

    @classmethod
    def of(
        cls, given: Given, data: Any, held_out: Any, options: Options, lines: Sequence[Line], display: Display
    ) -> TableRows:
        """Open the session."""
        start = time.perf_counter()
        session = Session.open(given, data, options, display, held_out=held_out)
        found = [replace(line, recipe=for_fine_tunes(line.recipe, session.survey)) for line in lines]
        if all(line.recipe.by_position for line in found):
            session = session.positional(found[0].recipe)
        return cls(session, found, time.perf_counter() - start, device_of(given))

    def at(self, cuts: Sequence[str | float | None], score: Score | None, *, strict: bool) -> Table:
        """All lines at all cuts. `strict`: an error ends it, else it is a row."""
        start = time.perf_counter()
        session, recipes = self.session, [line.recipe for line in self.lines]
        observing = [recipe for recipe in recipes if recipe.observes]
        # Without least squares features are matched on all inputs: then all lines are.
        most = next((recipe for recipe in observing if not recipe.mends), (observing or recipes)[0])
        candidates = session.candidates_at(cuts, most)
        narrowing = next((recipe for recipe in recipes if recipe.narrows), most)
        solo = session.solo([one.observed.trunk for one in candidates], narrowing)
        seconds = self.seconds + time.perf_counter() - start

        rows = [self._bound(score)]
        places = [
            (candidate, line)
            for candidate in candidates
            for line in self.lines
            if line.method != ALONE or candidate is candidates[0]  # there is no cut to it: once is enough
        ]
        session.display.expect(len(places))
        for number, (candidate, line) in enumerate(places, 1):
            session.display.about(f"{line.method} at {candidate.cut.until or 'the heads'}, {number} of {len(places)}")
            until = None if line.method == ALONE else candidate.cut.until
            row = {"method": line.method, "refit": line.refit, "until": until}
            row["max_cost"] = line.recipe.width.cost if isinstance(line.recipe.width, Budget) else None
            try:
                rows.append(row | self._measured(line, candidate, solo, score))
            except KeyboardInterrupt as stop:
                text = f"interrupted after {number - 1} of {len(places)} zips: `error.table` holds their rows"
                raise Interrupted(text, table=self._table(rows, f"{self._note(seconds)}; {text}")) from stop
            except Exception as error:
                if strict and not isinstance(error, CostError):
                    raise
                rows.append(row | {"error": f"{type(error).__name__}: {error}"})
        return self._table(rows, self._note(seconds))

    def _table(self, rows: Sequence[Mapping[str, Any]], note: str) -> Table:
        return Table(tuple({**dict.fromkeys(("cost", "error")), **row} for row in rows), note)

    def _note(self, seconds: float) -> str:
        held = self.session.held
        measured = (
            "agreement is not measured, since there is neither `data` nor `held_out`"
            if held is None
            else f"agreement with the originals on {held.size} held-out inputs"
        )
        return f"{measured}; tracing, checking and observing, once for all rows, took {seconds:.1f} s"

    def _measured(
        self, line: Line, candidate: Candidate, solo: Mapping[int, Observed], score: Score | None
    ) -> dict[str, Any]:
        start = time.perf_counter()
        if line.method == ALONE:
            budget = line.recipe.width
            assert isinstance(budget, Budget)
            rank: Literal["auto"] | float = 1.0 if line.recipe.rank == WHOLE else "auto"
            zipped = self.session.shifted(narrowed_apart(self.session, budget.cost, budget.currency, rank))
        else:
            zipped = self.session.shifted(assemble(self.session, candidate, line.recipe, solo))
        return self._values(zipped, score, time.perf_counter() - start)

    def _bound(self, score: Score | None) -> dict[str, Any]:
        """The row of the models themselves: nothing merged."""
        given = self.session.given
        whole = self.session.shifted(side_by_side(given.networks, given.sample))
        own = {"method": "side by side", "refit": None, "until": None, "max_cost": None}
        return own | self._values(whole, score, None)

    def _values(self, network: ZippedModule, score: Score | None, seconds: float | None) -> dict[str, Any]:
        costs = {
            name: network.report[key]["total"] / max(network.report[key]["originals"][0], 1)
            for name, key in (("cost", "flops"), ("parameters", "parameters"))
        }
        programs = self.session.survey.alignment.programs
        taken = fastest([network, as_used(programs[0].module)], programs[0].sample)
        costs["latency"] = taken[0] / taken[1]
        held = self.session.held
        agreement: dict[str, float] = {}
        if held is not None:
            heads = held.agreement(network)
            agreement = {"agreement": sum(heads) / len(heads), "worst": min(heads)}
        scores: dict[str, float] = {}
        if score is not None:  # of a copy: a network of a table may hold the session's own parameters
            own = network if has_float64(self.device) else copy.deepcopy(network).to(self.device)
            scores = dict(_scores(score(self.session.named(own))))
        return {**costs, **agreement, **scores, "seconds": seconds}


def _scores(found: Any) -> Iterator[tuple[str, float]]:
    """What a score function returned, by name."""
    named = found if isinstance(found, Mapping) else {"score": found}
    for name, value in named.items():
        try:
            yield str(name), float(value)
        except (TypeError, ValueError):
            raise InputError(
                f"`score` must return a number, or a dict of numbers by name; found `{type(value).__name__}`"
                f"{'' if named is not found else f' under {name!r}'}. Return one number per score."
            ) from None

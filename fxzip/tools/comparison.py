"""Several zips of the same models, side by side in one table: cuts of one method (`sweep`), or methods by cuts.

Tracing, checking and observing are done once for all rows; matching, rewriting and refit for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from ..analysis.rules import Rule
from ..calibration.data_forms import MAX_BATCHES
from ..calibration.processes import together
from ..compiler.arguments import Given
from ..compiler.one_base import base_tensors, check_base, for_fine_tunes, takes_base, weights_by_model
from ..compiler.options import Options, Recipe
from ..compiler.pipeline import assemble
from ..compiler.progress import Display
from ..compiler.session import Candidate, Session
from ..compiler.survey import cuts_and_trunks
from ..compiler.timing import as_used, fastest
from ..errors import CostError, InputError, Interrupted
from ..matching import FIRST_CLASS, Method
from ..refit import Refit
from ..rewriting.module import ZippedModule
from ..tracing import plain_context
from ..widths.observed import Observed
from ..widths.requests import UNCHANGED, WHOLE, Budget, Currency, rank_request, width_request
from .lines import ALONE, Line, shown
from .narrowing import narrowed_apart
from .table import Table
from .unmerged import side_by_side

Score = Callable[[nn.Module], float | Mapping[str, float]]
"""Of a network that returns a tuple with each model's output; greater is better, or several numbers with names."""

SWEPT = 12


@together()
@plain_context()
def sweep(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    sample_input: Any,
    *,
    data: Any = None,
    cuts: Sequence[str | float | None] | None = None,
    max_costs: Sequence[float] | None = None,
    budget: Currency | None = None,
    rank: Literal["auto"] | float | Mapping[str, float] = 1.0,
    method: str | Method = "auto",
    refit: str | Refit | None = "auto",
    score: Score | None = None,
    held_out: Any = None,
    start: str | Sequence[str] | None = None,
    joint: bool = False,
    verify: bool = True,
    strict: bool = False,
    rules: Mapping[str, Rule] | None = None,
    progress: bool | None = None,
    max_batches: int = MAX_BATCHES,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
) -> Table:
    """The frontier of cost against agreement: one zip for each cut (and cost), and all models side by side.

    >>> import torch
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    >>> table = sweep([a, b], torch.randn(2, 4), data=[torch.randn(100, 4)], progress=False)
    >>> [(row["method"], row["until"]) for row in table]
    [('side by side', None), ('auto', '1'), ('auto', None)]
    >>> table[0]["agreement"]
    1.0

    Args:
        models: two or more, or a dict of them by the names of their tasks.
        sample_input, data, method, refit, start, joint, verify, strict, rules, progress, max_batches, base, weights: as
            in `compile_zip`.
        cuts: what `until` takes, each. None: up to twelve, evenly over the FLOPs, such that one tensor alone crosses
            if there are as many.
        max_costs: widths by need at each of these costs, as `compile_zip` with `width="auto"`: a row for each of them
            at each cut, and for each of them a row "alone", every network narrowed by itself to its share of it. A cost
            that cannot be had at a cut is a row with the message.
        budget: what these costs count, as in `compile_zip`.
        rank: as in `compile_zip`, for all rows; "auto", with `max_costs`, shares the budget with the widths.
        score: a function of the multi-head network, say its accuracy on labelled inputs.
        held_out: batches to measure agreement on, as `data`. None: every fifth input of `data`, which then serves for
            nothing else; without `data` agreement is not measured.

    Raises:
        DataError: fewer than ten inputs can be held out. CutError: a cut names nothing that is shared. And what
        `compile_zip` raises.
    """
    given = Given.of((models, sample_input), "sweep")
    own_weights = weights_by_model(weights, given.tasks, len(given.networks))
    recipes = []
    for cost in (None,) if max_costs is None else tuple(map(float, max_costs)):
        width = UNCHANGED if cost is None else width_request("auto", cost, len(given.networks), budget)
        ranks = rank_request(rank, cost, budget)
        found = Recipe.of(method, refit, calibrated=data is not None, width=width, rank=ranks, based=base is not None)
        recipes.append(found.weighing(own_weights))
    recipe = recipes[0]
    check_base(base, recipe, named=method != "auto")
    lines = [Line(shown(method) or "", shown(own.refit_name), own) for own in recipes]
    if data is not None:
        lines += [Line.alone(own.width, own.rank) for own in recipes if isinstance(own.width, Budget)]
    options = Options(
        start=start, joint=joint, verify=verify, strict=strict, by_position=recipe.by_position,
        max_batches=max_batches, rules=rules, data_free=recipe.data_free,
        base=base_tensors(base), compared_by="" if recipe.data_free else "`sweep`",
    )  # fmt: skip
    with Display(show=progress) as display:
        table = _Rows.of(given, data, held_out, options, lines, display)
        if cuts is None:
            cuts = [cut.until for cut in cuts_and_trunks(table.session.survey, limit=SWEPT)[0]]
        return table.at(cuts, score, strict=True)


@together()
@plain_context()
def compare(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    sample_input: Any,
    *,
    data: Any = None,
    score: Score | None = None,
    methods: Sequence[Any] | None = None,
    cuts: Sequence[str | float | None] = (None,),
    budget: Currency | None = None,
    refit: str | Refit | None = "auto",
    held_out: Any = None,
    start: str | Sequence[str] | None = None,
    joint: bool = False,
    verify: bool = True,
    strict: bool = False,
    rules: Mapping[str, Rule] | None = None,
    progress: bool | None = None,
    max_batches: int = MAX_BATCHES,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
) -> Table:
    """Several methods at several cuts, and all models side by side.

    >>> import torch
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    >>> x = torch.randn(100, 4)
    >>> table = compare([a, b], x[:2], data=[x], methods=["average", ("zip", None)], progress=False)
    >>> [(row["method"], row["refit"]) for row in table]
    [('side by side', None), ('average', 'lstsq'), ('zip', None)]

    Args:
        models: two or more, or a dict of them by the names of their tasks.
        sample_input, data, start, joint, verify, strict, rules, progress, max_batches, base, weights: as in
            `compile_zip`; for all rows, of which those whose methods take no base or no weights do without.
        score: a function of the multi-head network, say its accuracy on labelled inputs.
        methods: names, methods with their settings, or pairs (method, refit); "alone" is each network narrowed by
            itself to its share of the first one's cost (`fxzip.narrow`), and nothing shared. None: energy, zip,
            permute, weights, average and alone. One that fails is a row with its message.
        cuts: what `until` takes, each.
        budget: what the cost of "alone" counts, as in `compile_zip`.
        refit: of the methods that come without one.
        held_out: as in `sweep`.

    Raises:
        DataError, CutError: as in `sweep`. OptionError: a method or refit is unknown, or they do not go
            together (`docs/methods.md`).
    """
    entries = (*FIRST_CLASS, *([ALONE] if data is not None else [])) if methods is None else methods
    given = Given.of((models, sample_input), "compare")
    own_weights = weights_by_model(weights, given.tasks, len(given.networks))
    chosen = [
        Line.of(entry, refit, calibrated=data is not None, budget=budget).weighing(own_weights) for entry in entries
    ]
    for line in chosen:
        if takes_base(line.recipe.method):
            check_base(base, line.recipe)
    data_free = all(line.recipe.data_free for line in chosen)
    options = Options(
        start=start, joint=joint, verify=verify, strict=strict, max_batches=max_batches, rules=rules,
        data_free=data_free, base=base_tensors(base), compared_by="" if data_free else "`compare`",
    )  # fmt: skip
    with Display(show=progress) as display:
        table = _Rows.of(given, data, held_out, options, chosen, display)
        return table.at(cuts, score, strict=False)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of one table: all lines, at cuts of one session."""

    session: Session
    lines: Sequence[Line]
    seconds: float

    @classmethod
    def of(
        cls, given: Given, data: Any, held_out: Any, options: Options, lines: Sequence[Line], display: Display
    ) -> _Rows:
        """Open the session."""
        start = time.perf_counter()
        session = Session.open(given, data, options, display, held_out=held_out)
        found = [replace(line, recipe=for_fine_tunes(line.recipe, session.survey)) for line in lines]
        if all(line.recipe.by_position for line in found):
            session = session.positional(found[0].recipe)
        return cls(session, found, time.perf_counter() - start)

    def at(self, cuts: Sequence[str | float | None], score: Score | None, *, strict: bool) -> Table:
        """All lines at all cuts. `strict`: an error ends it, else it is a row."""
        start = time.perf_counter()
        session, recipes = self.session, [line.recipe for line in self.lines]
        most = next((recipe for recipe in recipes if recipe.observes), recipes[0])
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
        taken = fastest([network, as_used(programs[0].module)], programs[0].call)
        costs["latency"] = taken[0] / taken[1]
        held = self.session.held
        agreement: dict[str, float] = {}
        if held is not None:
            heads = held.agreement(network)
            agreement = {"agreement": sum(heads) / len(heads), "worst": min(heads)}
        scores = {} if score is None else dict(_scores(score(self.session.named(network))))
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

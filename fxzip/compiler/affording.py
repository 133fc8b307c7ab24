"""The plan of a zip that keeps its budget: widths by prices, then a look at what the network really takes.

Prices are of each node by itself, and from few sizes. So under a budget of latency or memory the network is emitted and
measured against the first model before anything is fitted, and where it takes more than it may, or much less, the
widths are chosen again under a limit that is corrected by what was seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import CostError
from ..rewriting.emit import rewrite
from ..rewriting.module import ZippedModule
from ..rewriting.zip_plan import ZipPlan, plan
from ..widths.choose import Widths, choose_widths
from ..widths.narrow_heads import narrowed
from ..widths.observed import Observed
from ..widths.ranks import as_emitted, choose_ranks
from ..widths.requests import UNCHANGED, WHOLE, Budget
from .memory import peaks
from .options import Recipe
from .session import Session
from .timing import as_used, fastest

CLOSE, SLACK = 0.97, 1.01
"""The share of the budget that need not be improved on; what counts as keeping it."""

_FLAT = 0.2  # what is measured hardly follows the limit: noise

TRIES, ROUNDS, SECONDS = 5, 100, 6.0
"""Choices of widths at most; timings of the network and the first model in turn: at most, and how long."""

FEW_TRIES, FEW_ROUNDS, FEW_SECONDS = 3, 20, 0.5
"""The same where zips are but compared."""


@dataclass(frozen=True)
class Affordable:
    """A network that is ready to be fitted, and how it came about.

    Attributes:
        widths: how many features are kept.
        plan: what is merged.
        network: the zip, not fitted.
        spent: in the budget's currency relative to the first model, as it was measured; None: not measured.
        promised: what the prices said it would take.
    """

    widths: Widths
    plan: ZipPlan
    network: ZippedModule
    spent: float | None = None
    promised: float | None = None

    def spending(self, budget: Budget | None, report: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was allowed, what prices promised, and what is spent, as measured or counted; None without a budget."""
        if budget is None:
            return None
        allowed = {"currency": budget.currency, "max_cost": budget.cost}
        spent = self.spent if budget.is_measured else budget.counted(report)
        return {**allowed, "promised": self.promised, "spent": spent}

    def note(self, budget: Budget) -> str:
        """What the report says of it."""
        assert self.spent is not None
        assert self.promised is not None
        text = (
            f"{budget.noun}: at most {budget.cost:g} times that of the first model was asked for, prices said "
            f"{self.promised:.3f}, the network without fits takes {self.spent:.3f}"
        )
        return text if self.spent <= budget.cost * SLACK else f"{text}, and nothing cheaper was found"


def affordable(
    session: Session, observed: Observed, recipe: Recipe, solo: Mapping[int, Observed], *, rough: bool = False
) -> Affordable:
    """Widths, plan and network by a recipe. `rough`: its cost need but be comparable with that of others.

    Raises:
        CostError: what has to keep its size takes more than the budget. InputError: see `plan`.
    """
    budget = recipe.budget
    if budget is None or not budget.is_measured:
        return _made(session, observed, recipe, solo)

    request, tried = budget, list[Affordable]()
    for _ in range(FEW_TRIES if rough else TRIES):
        try:
            made = _made(session, observed, recipe.within(request), solo)
        except CostError:
            if not tried:
                raise
            break
        spent = spent_by(session, as_emitted(made.network, made.plan.ranks), budget, rough=rough)
        tried.append(replace(made, spent=spent, promised=request.cost))
        if CLOSE * budget.cost <= spent <= SLACK * budget.cost:
            break
        request = replace(request, cost=_corrected(tried, budget.cost))

    kept = [one for one in tried if one.spent is not None and one.spent <= SLACK * budget.cost]
    best = max(kept, key=_spent) if kept else min(tried, key=_spent)
    notes = (*best.widths.notes, best.note(budget))
    return replace(best, widths=replace(best.widths, notes=notes))


def unnarrowed(session: Session, observed: Observed, recipe: Recipe, *, rough: bool = False) -> Affordable | None:
    """The zip that keeps all features, if that keeps a measured budget, too; else None."""
    budget = recipe.budget
    if budget is None or not budget.is_measured or budget.cost * SLACK < 1:
        return None  # it computes at least what the first model does

    made = _made(session, observed, replace(recipe, width=UNCHANGED, rank=WHOLE), {})
    spent = spent_by(session, made.network, budget, rough=rough)
    if spent > SLACK * budget.cost:
        return None

    note = (
        f"{budget.noun}: the zip that keeps all features takes {spent:.3f} times that of the first model, of at most "
        f"{budget.cost:g}, and agrees no worse than one with widths by need"
    )
    widths = replace(made.widths, notes=(*made.widths.notes, note))
    return replace(made, widths=widths, spent=spent, promised=spent)


def _corrected(tried: Sequence[Affordable], wanted: float) -> float:
    """The limit under which the prices are likely to give a network that takes what is wanted.

    In proportion to the last one at first, then along the line through the last two.
    """
    points = [(one.promised or 0.0, one.spent or 0.0) for one in tried]
    limit, spent = points[-1]
    found = limit * wanted / spent
    if len(points) > 1:
        before, spent_before = points[-2]
        slope = (spent - spent_before) / (limit - before) if limit != before else 0.0
        if slope > _FLAT:
            found = limit + (wanted - spent) / slope
    return min(max(found, limit / 2), limit * 2)


def _spent(one: Affordable) -> float:
    assert one.spent is not None
    return one.spent


def _made(session: Session, observed: Observed, recipe: Recipe, solo: Mapping[int, Observed]) -> Affordable:
    with session.display.stage("matching"):
        prices = session.prices(recipe.budget.currency if recipe.budget else "flops")
        by_need = recipe.rank if isinstance(recipe.rank, Budget) else None
        calls = session.call_outputs.losses(observed.trunk) if by_need else {}
        widths = choose_widths(observed, recipe.width, prices, solo, ranks=by_need, calls=calls)
        whole = plan(observed.trunk, observed.moments, recipe.method, widths.kept, session.options.base)
        zipping = narrowed(whole, solo, widths.heads, recipe.method)
    with session.display.stage("rewriting"):
        merged = rewrite(zipping)
        ranks = choose_ranks(merged, recipe.rank, widths.ranks)
        widths = replace(widths, notes=(*widths.notes, *ranks.notes))
        return Affordable(widths, replace(zipping, ranks=ranks.kept), merged)


def spent_by(session: Session, network: ZippedModule, budget: Budget, *, rough: bool = False) -> float:
    """What a network takes in the currency of a budget, measured, relative to the first model."""
    measure = partial(_spent_by, session, network, budget, rough=rough)
    return session.store.value(f"{budget.currency} of a network", measure)


def _spent_by(session: Session, network: ZippedModule, budget: Budget, *, rough: bool) -> float:
    first = session.survey.alignment.programs[0]
    if not budget.is_measured:
        return budget.counted(network.report)
    both = as_used(network), as_used(first.module)
    if budget.currency == "memory":
        taken, one = peaks(both, first.sample).each
        return taken / max(one, 1)

    rounds, longest = (FEW_ROUNDS, FEW_SECONDS) if rough else (ROUNDS, SECONDS)
    seconds = fastest(both, first.sample, rounds=rounds, seconds=longest)
    return seconds[0] / seconds[1]

"""Several zips of the same models, side by side in one table: cuts of one method (`sweep`), or methods by cuts.

Tracing, checking and observing are done once for all rows; matching, rewriting and refit for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ..analysis.rules import Rule
from ..calibration.data_forms import MAX_BATCHES
from ..calibration.processes import together
from ..compiler.arguments import Given
from ..compiler.one_base import base_tensors, check_base, takes_base, weights_by_model
from ..compiler.options import Options, Recipe
from ..compiler.progress import Display
from ..compiler.survey import cuts_and_trunks
from ..errors import OptionError
from ..matching import FIRST_CLASS, Method
from ..refit import Refit
from ..tracing import plain_context
from ..tracing.option_values import checked
from ..widths.requests import UNCHANGED, Budget, Currency, rank_request, width_request
from .lines import ALONE, Line, shown
from .table import Table
from .table_rows import Score, TableRows

SWEPT = 12


@together()
@plain_context()
@checked
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
        held_out: batches to measure agreement on, as `data`. None: a fifth of `data`, which then serves for
            nothing else; without `data` agreement is not measured.

    Raises:
        DataError: fewer than ten inputs can be held out. CutError: a cut names nothing that is shared. And what
        `compile_zip` raises.
    """
    if budget is not None and max_costs is None and rank != "auto":
        raise OptionError(f"`budget` says what `max_costs` count; found `budget={budget!r}` without them.")
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
        table = TableRows.of(given, data, held_out, options, lines, display)
        if cuts is None:
            cuts = [cut.until for cut in cuts_and_trunks(table.session.survey, limit=SWEPT)[0]]
        return table.at(cuts, score, strict=True)


@together()
@plain_context()
@checked
def compare(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    sample_input: Any,
    *,
    data: Any = None,
    score: Score | None = None,
    methods: Sequence[Any] | None = None,
    cuts: Sequence[str | float | None] | None = (None,),
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
        cuts: what `until` takes, each. None: the heads.
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
        table = TableRows.of(given, data, held_out, options, chosen, display)
        return table.at((None,) if cuts is None else cuts, score, strict=False)

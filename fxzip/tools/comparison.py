"""Several zips of the same models, side by side in one table: cuts of one method (`sweep`), or methods by cuts.

Tracing, checking and observing are done once for all rows; matching, rewriting and refit for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from tqdm import tqdm

from ..analysis.rules import Rule
from ..calibration.data_forms import MAX_BATCHES
from ..calibration.holdout import HeldOut, hold_out
from ..calibration.observer import observe_all
from ..calibration.shapes import other_shapes
from ..calibration.sources import Calibration
from ..compiler.arguments import models_and_sample
from ..compiler.options import Recipe
from ..compiler.pipeline import assemble
from ..compiler.survey import Survey, cuts_and_trunks, each_alone, survey
from ..errors import CostError, InputError
from ..matching import FIRST_CLASS, Method
from ..partition.trunk import Trunk
from ..refit import Refit
from ..refit.joint.logit_shifts import needs_classifiers, needs_tasks, with_shifts
from ..rewriting.module import ZippedModule
from ..tracing import plain_context
from ..widths.choose import check_width
from ..widths.narrow_heads import Alone
from .table import Table
from .unmerged import side_by_side

Score = Callable[[nn.Module], float | Mapping[str, float]]
"""Of a network that returns a tuple with each model's output; greater is better, or several numbers with names."""

SWEPT = 12


@plain_context()
def sweep(
    models: Sequence[nn.Module],
    sample_input: Any,
    *,
    data: Any = None,
    cuts: Sequence[str | float | None] | None = None,
    max_costs: Sequence[float] | None = None,
    method: str | Method = "auto",
    refit: str | Refit | None = "auto",
    score: Score | None = None,
    held_out: Any = None,
    joint: bool = False,
    verify: bool = True,
    rules: Mapping[str, Rule] | None = None,
    progress: bool | None = None,
    max_batches: int = MAX_BATCHES,
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
        models: two or more.
        sample_input, data, method, refit, joint, verify, rules, progress, max_batches: as in `compile_zip`.
        cuts: what `until` takes, each. None: up to twelve, evenly over the FLOPs, such that one tensor alone crosses
            if there are as many.
        max_costs: widths by need at each of these costs, as `compile_zip` with `width="auto"`: a row for each of them
            at each cut. A cost that cannot be had at a cut is a row with the message.
        score: a function of the multi-head network, say its accuracy on labelled inputs.
        held_out: batches to measure agreement on. None: every fifth input of `data`, which then serves for nothing
            else.

    Raises:
        DataError: fewer than ten inputs can be held out. CutError: a cut names nothing that is shared. And what
        `compile_zip` raises.
    """
    name = method if isinstance(method, str) else repr(method)
    recipe = Recipe.of(method, refit, calibrated=data is not None)
    sizings = [recipe.sizing] if max_costs is None else [("auto", float(cost)) for cost in max_costs]
    for sizing in sizings:
        check_width(*sizing, len(models))
    lines = [_Line(name, _shown(recipe.refit_name), replace(recipe, sizing=sizing)) for sizing in sizings]
    setting = _Setting.of(models, sample_input, data, held_out, progress, "`sweep`", joint, verify, rules, max_batches)
    if cuts is None:
        cuts = [cut.until for cut in cuts_and_trunks(setting.found, limit=SWEPT)[0]]
    return setting.table(lines, cuts, score, strict=True)


@plain_context()
def compare(
    models: Sequence[nn.Module],
    sample_input: Any,
    *,
    data: Any = None,
    score: Score | None = None,
    methods: Sequence[Any] | None = None,
    cuts: Sequence[str | float | None] = (None,),
    refit: str | Refit | None = "auto",
    held_out: Any = None,
    joint: bool = False,
    verify: bool = True,
    rules: Mapping[str, Rule] | None = None,
    progress: bool | None = None,
    max_batches: int = MAX_BATCHES,
) -> Table:
    """Several methods at several cuts, and all models side by side.

    >>> import torch
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    >>> x = torch.randn(100, 4)
    >>> table = compare([a, b], x[:2], data=[x], methods=["average", ("zip", None)], progress=False)
    >>> [(row["method"], row["refit"]) for row in table]
    [('side by side', None), ('average', 'lstsq'), ('zip', None)]

    Args:
        models: two or more.
        sample_input, data, joint, verify, rules, progress, max_batches: as in `compile_zip`; `joint` goes for all rows.
        score: a function of the multi-head network, say its accuracy on labelled inputs.
        methods: names, methods with their settings, or pairs (method, refit). None: energy, zip, permute, weights and
            average. One
            that fails is a row with its message.
        cuts: what `until` takes, each.
        refit: of the methods that come without one.
        held_out: as in `sweep`.

    Raises:
        DataError, CutError: as in `sweep`. InputError: a method or refit is unknown.
    """
    entries = FIRST_CLASS if methods is None else methods
    chosen = [_Line.of(entry, refit, calibrated=data is not None) for entry in entries]
    setting = _Setting.of(
        models, sample_input, data, held_out, progress, "`compare`", joint, verify, rules, max_batches
    )
    return setting.table(chosen, cuts, score, strict=False)


@dataclass(frozen=True, eq=False)
class _Line:
    """A method with a refit, under the names that the table shows."""

    method: str
    refit: str | None
    recipe: Recipe

    @classmethod
    def of(cls, entry: Any, refit: str | Refit | None, *, calibrated: bool) -> _Line:
        method, own = entry if isinstance(entry, tuple) else (entry, refit)
        recipe = Recipe.of(method, own, calibrated=calibrated)
        return cls(method if isinstance(method, str) else repr(method), _shown(recipe.refit_name), recipe)


def _shown(refit: Any) -> str | None:
    """A refit as the table shows it."""
    return refit if refit is None or isinstance(refit, str) else repr(refit)


@dataclass(frozen=True, eq=False)
class _Setting:
    """What all rows have in common."""

    models: Sequence[nn.Module]
    sample: Any
    found: Survey
    calibration: Calibration
    held: HeldOut
    joint: bool
    seconds: float

    @classmethod
    def of(
        cls, models: Sequence[nn.Module], sample: Any, data: Any, held_out: Any, progress: bool | None, name: str,
        joint: bool, verify: bool, rules: Mapping[str, Rule] | None, max_batches: int,
    ) -> _Setting:  # fmt: skip
        start = time.perf_counter()
        models = list(models) if isinstance(models, (list, tuple)) else models
        networks, call = models_and_sample((models, sample), name.strip("`"))
        calibration = Calibration.of(data, call, len(networks), progress, max_batches)
        if joint:
            needs_tasks(calibration, len(networks))
        found = survey(networks, call, verify=verify, rules=rules, others=other_shapes(calibration, call))
        programs = found.alignment.programs
        if joint:
            needs_classifiers(programs)
        if held_out is None:
            calibration, held = hold_out(calibration, programs, name=name)
        else:
            given = Calibration.of(held_out, call, len(networks), progress, max_batches)
            held = HeldOut.of(list(given("holding out").labelled()), programs)
        return cls(networks, sample, found, calibration, held, joint, time.perf_counter() - start)

    def table(
        self, lines: Sequence[_Line], cuts: Sequence[str | float | None], score: Score | None, *, strict: bool
    ) -> Table:
        """All lines at all cuts. `strict`: an error ends it, else it is a row."""
        start = time.perf_counter()
        trunks = [self.found.trunk(cut) for cut in cuts]
        statistics = observe_all(trunks, self.calibration("observing"))
        recipe = next((line.recipe for line in lines if line.recipe.narrows), None)
        alone = {} if recipe is None else each_alone(self.found, trunks, self.calibration, recipe)
        seconds = self.seconds + time.perf_counter() - start
        rows = [self._bound(score)]
        places = [(place, line) for place in range(len(cuts)) for line in lines]
        for place, line in tqdm(places, desc="zipping", unit="zip", disable=not self.calibration.show, leave=False):
            row = {"method": line.method, "refit": line.refit, "until": cuts[place]}
            row["max_cost"] = line.recipe.sizing[1]
            try:
                rows.append(row | self._measured(line, trunks[place], statistics[place], alone, score))
            except Exception as error:
                if strict and not isinstance(error, CostError):
                    raise
                rows.append(row | {"error": f"{type(error).__name__}: {error}"})
        note = (
            f"agreement with the originals on {self.held.size} held-out inputs; tracing, checking and observing, once "
            f"for all rows, took {seconds:.1f} s"
        )
        return Table(tuple({**dict.fromkeys(("cost", "error")), **row} for row in rows), note)

    def _measured(
        self, line: _Line, trunk: Trunk, statistics: Any, alone: Mapping[int, Alone], score: Score | None
    ) -> dict[str, Any]:
        start = time.perf_counter()
        zipped = self._shifted(assemble(self.found, trunk, statistics, self.calibration, line.recipe, alone))
        return self._values(zipped, score, time.perf_counter() - start)

    def _bound(self, score: Score | None) -> dict[str, Any]:
        """The row of the models themselves: nothing merged."""
        whole = self._shifted(side_by_side(self.models, self.sample))
        return {
            "method": "side by side",
            "refit": None,
            "until": None,
            "max_cost": None,
            **self._values(whole, score, None),
        }

    def _shifted(self, network: ZippedModule) -> ZippedModule:
        return with_shifts(network, self.calibration) if self.joint else network

    def _values(self, network: Any, score: Score | None, seconds: float | None) -> dict[str, Any]:
        heads = self.held.agreement(network)
        costs = {
            name: network.report[key]["total"] / max(network.report[key]["originals"][0], 1)
            for name, key in (("cost", "flops"), ("parameters", "parameters"))
        }
        scores = {} if score is None else dict(_scores(score(network)))
        return {**costs, "agreement": sum(heads) / len(heads), "worst": min(heads), **scores, "seconds": seconds}


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

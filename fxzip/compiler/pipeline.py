"""The driver: a call per stage. Reading this file is reading the architecture.

trace -> align -> label, self-check -> find_trunk -> observe -> plan -> rewrite -> refit -> report
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

from ..analysis.rules import Rule
from ..calibration.data_forms import MAX_BATCHES
from ..calibration.holdout import hold_out
from ..calibration.observer import observe, observe_all
from ..calibration.shapes import other_shapes
from ..calibration.sources import Calibration
from ..errors import InputError
from ..matching import Method, resolve
from ..matching.moments import Moments
from ..partition.trunk import Trunk
from ..refit import Refit, fit_notes, record_statistics
from ..refit.joint.logit_shifts import needs_classifiers, needs_tasks, with_shifts
from ..rewriting.emit import rewrite
from ..rewriting.module import ZippedModule, reuse_memory
from ..rewriting.report import Report, make_report
from ..rewriting.zip_plan import plan
from ..tracing import plain_context
from ..tracing.calls import JointCall
from ..widths.choose import check_width, choose_widths, overspent
from ..widths.narrow_heads import Alone, narrowed
from .arguments import data_of, models_and_sample, tasks_of
from .options import CompileOptions, Goal, MethodName, Recipe, RefitName
from .search import best_agreeing, deepest_agreeing, earliest_affordable
from .survey import Survey, cuts_and_trunks, each_alone, survey

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def compile_zip(
    a: nn.Module, b: nn.Module, /, sample_input: Any, **options: Unpack[CompileOptions]
) -> ZippedModule: ...
@overload
def compile_zip(
    models: Sequence[nn.Module] | Mapping[str, nn.Module], /, sample_input: Any, **options: Unpack[CompileOptions]
) -> ZippedModule: ...
@plain_context()
def compile_zip(
    *models: Any,
    sample_input: Any = None,
    data: Any = None,
    method: MethodName | Method = "auto",
    start: str | Sequence[str] | None = None,
    until: Literal["auto"] | str | float | None = None,
    width: Literal["auto"] | float | Mapping[str, float] = 1.0,
    min_agreement: float | None = None,
    max_cost: float | None = None,
    refit: RefitName | Refit | None = "auto",
    joint: bool = False,
    verify: bool = True,
    strict: bool = False,
    progress: bool | None = None,
    max_batches: int = MAX_BATCHES,
    rules: Mapping[str, Rule] | None = None,
) -> ZippedModule:
    """Zip trained networks of one architecture into one multi-task network, without training.

    `compile_zip(a, b, sample_input)`, `compile_zip([a, b, c, ...], sample_input)`, or, with names for the tasks,
    `compile_zip({"pets": a, "birds": b}, sample_input)`.

    >>> import torch, fxzip
    >>> from torch import nn
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    >>> zipped = fxzip.compile_zip(a, b, torch.randn(16, 4))
    >>> [tuple(y.shape) for y in zipped(torch.randn(5, 4))]
    [(5, 2), (5, 3)]

    Args:
        models: two models, or a sequence of any number of them, or a dict of them by the names of their tasks; and then
            the sample input, also as `sample_input=`: a tensor, or a tuple or dict of tensors, with a batch on axis 0.
            With `start`, models may take inputs of their own (another size,
            another modality): `fxzip.PerModel(input of a, input of b, ...)`; the zip then takes the inputs of all
            models, one after another, and batches of `data` are tuples of inputs that belong together.
        data: unlabelled calibration data: an iterable of batches (a tensor; a tuple or list whose first item is the
            input; a dict), or `fxzip.PerModel` of one such iterable per model (see
            `calibration/data_forms.py`). None: the sample input serves; a method
            that looks at weights only ("weights") then runs without any data, with the refit "stored" unless another
            is asked for.
        method: "auto" ("energy" under least squares, else "zip"), "energy" (features merged within and across models
            that lose the least if all others may stand in for them), "zip" (ZipIt!, arXiv 2305.03053), "permute" (Git
            Re-Basin, arXiv 2209.04836), "average", "weights" (Git Re-Basin on weights, no data needed), another of
            `fxzip.METHODS`, or an object with its settings such as `fxzip.Zip(alpha=0.1, beta=0.5)`.
        start: where the trunk begins: None (at the input), or a module path or node name of all models, or one name
            for each. What is in front each model computes on its own, a stem for another kind of input say; the
            features that enter the trunk are merged.
        until: where the trunk ends: None (at the heads), a module path or node name of the first model, or a fraction
            in (0, 1] of the FLOPs to share; or "auto", which looks for it (see `compiler/search.py`).
        width: how many features the spaces of the trunk keep, relative to the first model; or a dict of that by the
            name of a space (see `inspect`); or "auto", by need, so that the zip takes `max_cost` FLOPs (default 1.0) of
            the first model (see `widths/choose.py`): under least squares the heads keep fewer features then, too
            (`widths/narrow_heads.py`). Spaces whose size is written into the code, or matters to it, keep it, and the
            report says so.
        min_agreement: with `until="auto"`: the deepest cut at which every head agrees with its original on this share
            of held-out inputs, a fifth of `data` (see `calibration/holdout.py`). The default, 0.98.
        max_cost: with `until="auto"`: the earliest cut at which the zip takes at most so many FLOPs, relative to the
            first model. With `width="auto"`: what the zip may take; with both, the best of some cuts at that cost, by
            the agreement of the heads on held-out inputs.
        refit: "auto" ("lstsq" where `data` is given, else "repair"), None, "batchnorm" (statistics re-estimated),
            "repair" (REPAIR, arXiv 2211.08403), "stored" (without data,
            from the statistics stored in BatchNorms), "lstsq" (least squares, closed form, layer by layer), or an
            object with its settings such as `fxzip.LeastSquares(ridge=1e-3)`.
        joint: for classifiers of different tasks whose logits are compared with one another: move each head's logits,
            all of an input by the same amount, such that together the heads tell the tasks apart. Order and softmax of
            a head's own logits stay. Needs data per model; see `refit/joint/logit_shifts.py`.
        verify: check the analysis by relabelling at random.
        strict: raise `BarrierError` where a call without a rule, or features that cannot be matched, stop the sharing.
        progress: show a bar; None: on a terminal only.
        max_batches: most batches of `data` (of each source) that are read in a pass, since a loader may have no end;
            the report says so if there may have been more.
        rules: rule table for ATen calls, `fxzip.RULES | {...}`; None: `fxzip.RULES`.

    Returns:
        A `torch.fx.GraphModule` in eval mode. It takes what the models take and returns a tuple with each model's
        output, or a dict by the names of the tasks. `.single(i)`, also by name, is the network of one task; `.report`
        says what was shared.

    Raises:
        InputError, OptionError, CostError, TraceError, AlignError, CutError, DataError, BarrierError,
            SelfCheckError: see `fxzip.errors`.
    """
    tasks = tasks_of(models[0] if models else None)
    given = models if sample_input is None else (*models, sample_input)
    networks, call = models_and_sample(given, own_inputs=True)
    data = data_of(data, tasks)
    if isinstance(call, JointCall) and start is None:
        raise InputError(
            "Models with inputs of their own (`sample_input` is a `PerModel`) share nothing at the input; say with "
            "`start` where the trunk begins."
        )
    free = (
        data is None
        and method != "auto"
        and "moments" not in resolve(method).needs
        and refit in ("auto", "stored", None)
    )
    by_need = width == "auto"
    check_width(width, max_cost if by_need else None, len(networks))
    recipe = Recipe.of(
        method,
        "stored" if free and refit == "auto" else refit,
        calibrated=data is not None,
        sizing=(width, max_cost if by_need else None),
    )
    goal = Goal.of(until, min_agreement, None if by_need and until != "auto" else max_cost, by_need=by_need)
    calibration = Calibration.none(call) if free else Calibration.of(data, call, len(networks), progress, max_batches)
    if joint:
        needs_tasks(calibration, len(networks))
    by_position, others = recipe.method.by_position, other_shapes(calibration, call)
    found = survey(
        networks, call, start=start, verify=verify, strict=strict, by_position=by_position, rules=rules, others=others
    )
    if joint:
        needs_classifiers(found.alignment.programs)
    if goal is not None:
        zipped = _automatic(found, calibration, recipe, goal)
    else:
        trunk = found.sound(found.trunk(until)).trunk
        statistics = observe(trunk, calibration("observing") if recipe.observes else ())
        zipped = assemble(
            found, trunk, statistics, calibration, recipe, each_alone(found, [trunk], calibration, recipe)
        )
    zipped = with_shifts(zipped, calibration) if joint else zipped
    if tasks:
        zipped.name_tasks(tasks)
        zipped.meta["fxzip_report"] = Report({**zipped.report, "tasks": list(tasks)})
    return zipped


def assemble(
    found: Survey, trunk: Trunk, statistics: Mapping[int, Moments], calibration: Calibration, recipe: Recipe,
    own: Mapping[int, Alone] = MappingProxyType({}),
) -> ZippedModule:  # fmt: skip
    """The stages behind the observation: plan -> rewrite -> refit -> report. `own`: what `each_alone` gives."""
    tried = found.sound(trunk)
    if tried.trunk is not trunk:
        trunk, statistics = tried.trunk, observe(tried.trunk, calibration("observing") if recipe.observes else ())
    widths = choose_widths(trunk, statistics, *recipe.sizing, found.flops, own)
    zipping = narrowed(plan(trunk, statistics, recipe.method, widths.kept), own, widths.heads, recipe.method)
    zipped = rewrite(zipping)
    zipped = recipe.refit(zipped, zipping, calibration("refitting"))
    zipped = record_statistics(zipped, calibration("recording statistics"))
    reuse_memory(zipped)
    settings = {
        "method": repr(recipe.method),
        "refit": recipe.refit_name,
        "data": calibration.description,
        "self_check": list(found.errors),
        "notes": [*trunk.notes, *found.notes, *tried.notes, *calibration.notes, *widths.notes, *fit_notes(zipped)],
    }
    report = make_report(zipped, zipping, settings, statistics, {k: one.statistics for k, one in own.items()})
    zipped.meta["fxzip_report"] = report.noting(*overspent(report, *recipe.sizing), *_saves_nothing(report))
    return zipped


def _saves_nothing(report: Report) -> list[str]:
    flops = report["flops"]
    ratio = flops["total"] / max(flops["side_by_side"], 1)
    if ratio < 1:
        return []
    return [f"the zip takes {ratio:.2f}x the FLOPs of the models side by side: what they can share saves none"]


def _automatic(found: Survey, calibration: Calibration, recipe: Recipe, goal: Goal) -> ZippedModule:
    """Look for the cut. Observation is done once for all cuts, matching and refit for each that is tried."""
    if goal.max_cost is not None and not goal.by_need:
        cuts, trunks = cuts_and_trunks(found)

        def build(place: int) -> ZippedModule:
            seen = observe(trunks[place], calibration("observing"))
            return assemble(found, trunks[place], seen, calibration, recipe)  # not by need: heads stay as they are

        return earliest_affordable(cuts, build, goal.max_cost)
    fit, held = hold_out(calibration, found.alignment.programs)
    cuts, trunks = cuts_and_trunks(found)
    statistics = observe_all(trunks, fit("observing"))
    own = each_alone(found, trunks, fit, recipe)

    def build_on_the_rest(place: int) -> ZippedModule:
        return assemble(found, trunks[place], statistics[place], fit, recipe, own)

    if goal.max_cost is not None:
        return best_agreeing(cuts, build_on_the_rest, held, goal.max_cost)
    assert goal.min_agreement is not None
    return deepest_agreeing(cuts, build_on_the_rest, held, goal.min_agreement)

"""The driver: a call per stage. Reading this file is reading the architecture.

trace -> align -> label, self-check -> find_trunk -> observe -> plan -> rewrite -> refit -> report
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from torch import nn

from ..analysis import Labelling, check, label
from ..analysis.flops import flops_by_node
from ..analysis.random_trial import Trial
from ..analysis.rules import Rule
from ..calibration.data_forms import MAX_BATCHES
from ..calibration.holdout import hold_out
from ..calibration.observer import observe, observe_all
from ..calibration.shapes import other_shapes
from ..calibration.sources import Calibration
from ..errors import AlignError, BarrierError, CutError, InputError
from ..matching import Average, JointMethod, Method, needs, resolve
from ..matching.moments import Moments
from ..partition.alignment import Alignment, align
from ..partition.cut_points import Cut, find_cuts
from ..partition.lifting import lifted
from ..partition.own import differing
from ..partition.stems import find_stems
from ..partition.trunk import Trunk, trunk_of
from ..refit import LeastSquares, Refit, fit_least_squares, fit_notes, record_statistics, refits
from ..refit.joint.logit_shifts import needs_classifiers, needs_tasks, with_shifts
from ..rewriting.emit import rewrite
from ..rewriting.module import ZippedModule, reuse_memory
from ..rewriting.report import Report, make_report
from ..rewriting.zip_plan import plan
from ..tracing import Program, plain_context
from ..tracing.calls import Call, JointCall
from ..tracing.joint_inputs import trace_all
from ..widths.choose import Width, check_width, choose_widths, overspent
from ..widths.narrow_heads import Alone, behind, narrowed, whole_trunks
from .arguments import data_of, models_and_sample, tasks_of
from .search import Goal, best_agreeing, deepest_agreeing, earliest_affordable
from .soundness import Sound, sound

if TYPE_CHECKING:
    from typing_extensions import Unpack

MethodName = Literal[
    "auto", "energy", "zip", "permute", "weights", "average", "agglomerative", "c2m3", "cca", "kmeans", "mudsc",
    "optimal", "recover", "transport",
]  # fmt: skip
RefitName = Literal["auto", "lstsq", "repair", "batchnorm", "stored", "regmean"]


class CompileOptions(TypedDict, total=False):
    """The keyword arguments of `compile_zip`, which says what they mean."""

    data: Any
    method: MethodName | Method | JointMethod
    start: str | Sequence[str] | None
    until: Literal["auto"] | str | float | None
    width: Literal["auto"] | float | Mapping[str, float]
    min_agreement: float | None
    max_cost: float | None
    refit: RefitName | Refit | None
    joint: bool
    verify: bool
    strict: bool
    progress: bool | None
    max_batches: int
    rules: Mapping[str, Rule] | None


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
    method: MethodName | Method | JointMethod = "auto",
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
        and "moments" not in needs(resolve(method))
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
    by_position, others = isinstance(recipe.method, Average), other_shapes(calibration, call)
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


@dataclass(frozen=True, eq=False)
class Survey:
    """What is known of the models before anything is cut or merged.

    Attributes:
        alignment: which nodes of the models are the same; holds the programs.
        labellings: labels of each model.
        pinned: per model, labels that failed the self-check, with the reason.
        errors: relative error of each model's self-check; None: not run.
        notes: what the self-check could not see.
        trial: model 0 on random parameters, as the self-check ran it; None: that was not run, or is to be run anew.
        strict: a place where features cannot be matched is an error.
        by_position: features that cannot be matched are averaged place by place.
    """

    alignment: Alignment
    labellings: tuple[Labelling, ...]
    pinned: tuple[dict[int, str], ...]
    errors: tuple[float | None, ...]
    notes: tuple[str, ...] = ()
    trial: Trial | None = None
    strict: bool = False
    by_position: bool = False

    @cached_property
    def flops(self) -> tuple[Mapping[str, int], ...]:
        """FLOPs of every node of every model on its sample."""
        return tuple(flops_by_node(program.module, program.call) for program in self.alignment.programs)

    @cached_property
    def whole_trunks(self) -> dict[int, Trunk]:
        """Each model as a trunk by itself, by its number; those without parameters are left out."""
        return whole_trunks(self.alignment, self.labellings, self.pinned)

    @cached_property
    def _tried(self) -> dict[int, tuple[Trunk, Sound]]:
        """Trunks of which a zip was tried, by identity, and what came of it."""
        return {}

    def sound(self, trunk: Trunk) -> Sound:
        """As much of a trunk as can be shared: zips of it with relabelled copies are tried (see `soundness`)."""
        if None in self.errors:
            return Sound(trunk)
        if id(trunk) not in self._tried:
            result = sound(trunk, self.pinned, self.trial, by_position=self.by_position)
            self._tried.update({id(trunk): (trunk, result), id(result.trunk): (result.trunk, result)})
        return self._tried[id(trunk)][1]

    def trunk(self, until: str | float | None = None, *, whole: bool = False) -> Trunk:
        """The trunk that ends at `until`, or (`whole`) at the outputs."""
        flops = self.flops[0] if isinstance(until, float) else None
        result = trunk_of(
            self.alignment, self.labellings, until=until, flops=flops, pinned=self.pinned, whole=whole,
            by_position=self.by_position,
        )  # fmt: skip
        if self.strict and result.unmatched:
            raise BarrierError(
                f"`strict=True` allows no place where features cannot be matched; {len(result.unmatched)} found:\n  "
                + "\n  ".join(f"node `{name}`: {reason}" for name, reason in result.unmatched.items())
                + "\nChoose an earlier cut with `until`, or `strict=False` to stop sharing there."
            )
        return result


@plain_context()
def survey(
    networks: Sequence[nn.Module],
    call: Call,
    *,
    start: str | Sequence[str] | None = None,
    verify: bool = True,
    strict: bool = False,
    by_position: bool = False,
    rules: Mapping[str, Rule] | None = None,
    others: Sequence[Call] = (),
) -> Survey:
    """The stages that depend on neither cut nor method: trace -> label, self-check -> align. `others`: inputs of other
    shapes, on which the traces have to be right, too."""
    programs: Sequence[Program] = trace_all(networks, call, others)
    labellings = tuple(label(program, rules) for program in programs)
    if strict:
        _no_barriers(labellings)
    alignment = align(programs, () if start is None else find_stems(labellings, start))
    found = _with_lifted(alignment, labellings)
    if found is not None:
        programs, labellings = found, tuple(label(program, rules) for program in found)
        alignment = align(programs, () if start is None else find_stems(labellings, start))
    checks = [check(labelling) if verify else None for labelling in labellings]
    return Survey(
        alignment,
        labellings,
        pinned=tuple({} if own is None else own.pinned for own in checks),
        errors=tuple(None if own is None else own.error for own in checks),
        notes=tuple(
            f"model {k}: {note}"
            for k, (program, own) in enumerate(zip(programs, checks, strict=True))
            for note in (*program.notes, *(own.notes if own else ()))
        ),
        trial=None if checks[0] is None else checks[0].trial,
        strict=strict,
        by_position=by_position,
    )


def _with_lifted(alignment: Alignment, labellings: Sequence[Labelling]) -> list[Program] | None:
    """The programs with scalars in which they differ lifted to features; None where there are none, or not in all."""
    differ = differing(alignment)
    if not differ:
        return None
    result = [lifted(own, {alignment.params[name][k] for name in differ}) for k, own in enumerate(labellings)]
    return None if any(program is None for program in result) else [p for p in result if p is not None]


@dataclass(frozen=True)
class Recipe:
    """How to merge and to correct. `refit_name` is what the report calls the refit; `sizing` is width and cost, as
    `choose_widths` takes them."""

    method: Method | JointMethod
    refit: Refit
    refit_name: Any
    sizing: tuple[Width, float | None] = (1.0, None)

    @property
    def observes(self) -> bool:
        """Whether anything that is to be decided depends on what the data show."""
        return "moments" in needs(self.method) or self.sizing[0] != 1

    @property
    def narrows(self) -> bool:
        """Whether heads may keep fewer features: by need, and where least squares mends what that does to them."""
        return self.sizing[0] == "auto" and _fits(self.refit)

    @classmethod
    def of(
        cls,
        method: str | Method | JointMethod,
        refit: str | Refit | None,
        *,
        calibrated: bool,
        sizing: tuple[Width, float | None] = (1.0, None),
    ) -> Recipe:
        """The defaults filled in: `refit="auto"` is least squares where there is data, and `method="auto"` is `Energy`
        under least squares, else ZipIt!.

        >>> Recipe.of("auto", "auto", calibrated=True).method, Recipe.of("auto", "repair", calibrated=True).method
        (Energy(floor=0.01, ridge=1e-05), Zip(alpha=1.0, beta=1.0))
        """
        if isinstance(refit, str) and refit == "auto":
            refit = "lstsq" if calibrated else "repair"
        corrected = refits(refit)
        if isinstance(method, str) and method == "auto":
            method = "energy" if _fits(corrected) else "zip"
        return cls(resolve(method), corrected, refit, sizing)


def _fits(refit: Refit) -> bool:
    return refit is fit_least_squares or isinstance(refit, LeastSquares)


def each_alone(found: Survey, trunks: Iterable[Trunk], calibration: Calibration, recipe: Recipe) -> dict[int, Alone]:
    """The models by themselves and what the data show of them, if heads behind some of the trunks can be narrowed."""
    own = found.whole_trunks if recipe.narrows else {}
    if not any(behind(trunk, k, one) for trunk in trunks for k, one in own.items()):
        return {}
    return {k: Alone(one, observe(one, calibration("observing heads"))) for k, one in own.items()}


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
    report = make_report(zipped, zipping, settings)
    zipped.meta["fxzip_report"] = report.noting(*overspent(report, *recipe.sizing), *_saves_nothing(report))
    return zipped


def _saves_nothing(report: Report) -> list[str]:
    flops = report["flops"]
    ratio = flops["total"] / max(flops["side_by_side"], 1)
    if ratio < 1:
        return []
    return [f"the zip takes {ratio:.2f}x the FLOPs of the models side by side: what they can share saves none"]


def cuts_and_trunks(found: Survey, limit: int = 32) -> tuple[list[Cut], list[Trunk]]:
    """Where the trunk may end, in a row, and the trunks; cuts that cannot be solved for all models alike are left out.

    Raises:
        AlignError: nothing can be shared.
    """
    full = found.trunk()
    pairs = []
    for cut in find_cuts(full, found.flops, limit=limit):
        with suppress(AlignError, CutError):
            trunk = full if cut.until is None else found.trunk(cut.until)
            if not trunk.alike:  # else the heads would read a value that is nobody's own
                pairs.append((cut, trunk))
    return [cut for cut, _ in pairs], [trunk for _, trunk in pairs]


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


def _no_barriers(labellings: Sequence[Labelling]) -> None:
    reasons = dict.fromkeys(f"model {k}: {b.reason}" for k, one in enumerate(labellings) for b in one.barriers)
    if reasons:
        raise BarrierError(
            f"`strict=True` allows no barrier; {len(reasons)} found:\n  " + "\n  ".join(reasons)
            + "\nPass `rules=fxzip.RULES | {...}` with a rule for each, or `strict=False` to stop sharing there."
        )  # fmt: skip

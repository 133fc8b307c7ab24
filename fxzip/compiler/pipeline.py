"""The driver: a call per stage. Reading this file is reading the architecture.

trace -> label, self-check -> align (`Session.open`) -> find_trunk -> observe (`Candidate`) -> plan -> rewrite -> refit
-> report (`assemble`) -> judge
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from ..analysis.rules import Rule
from ..calibration.data_forms import MAX_BATCHES
from ..calibration.processes import together
from ..errors import Interrupted
from ..matching import Method
from ..refit import Refit
from ..rewriting.module import ZippedModule
from ..tracing import plain_context
from ..tracing.option_values import checked
from ..widths.requests import Currency, rank_request, width_request
from .arguments import Given
from .assembling import Assembly, assemble
from .best_cut import best_agreeing
from .judging import SMALL_TRUNK, judged
from .one_base import base_tensors, check_base, for_fine_tunes, weights_by_model
from .options import (
    BestWithin,
    CompileOptions,
    CutRequest,
    DeepestAgreeing,
    EarliestAffordable,
    FixedCut,
    MethodName,
    Options,
    Recipe,
    RefitName,
    cut_request,
)
from .placement import brought_back, device_of
from .progress import Display
from .request import facts_of
from .resuming import opened
from .search import deepest_agreeing, earliest_affordable, exactly_shared
from .session import Session

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
@together()
@plain_context()
@checked
def compile_zip(
    *models: Any,
    sample_input: Any = None,
    data: Any = None,
    method: MethodName | Method = "auto",
    start: str | Sequence[str] | None = None,
    until: Literal["auto"] | str | float | None = None,
    width: Literal["auto"] | float | Mapping[str, float] = 1.0,
    rank: Literal["auto"] | float | Mapping[str, float] = 1.0,
    min_agreement: float | None = None,
    max_cost: float | None = None,
    budget: Currency | None = None,
    refit: RefitName | Refit | None = "auto",
    joint: bool = False,
    hold_out: bool = True,
    verify: bool = True,
    strict: bool = False,
    progress: bool | None = None,
    max_batches: int = MAX_BATCHES,
    rules: Mapping[str, Rule] | None = None,
    base: nn.Module | Mapping[str, Tensor] | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    resume: str | os.PathLike[str] | None = None,
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
        data: inputs without labels, by which features are matched and fitted: an iterable of batches (a tensor; a tuple
            or list whose first item is the input; a dict), or `fxzip.PerModel` of one such iterable per model. How
            many are enough: `docs/faq.md`. None: the sample input serves; a method that looks at weights only
            ("weights") then runs without any data, with the refit "stored" unless another is asked for.
        method: "auto" ("energy" under least squares, "permute" under RegMean, else "zip"; for fine-tunes of one base
            see `base`), "energy" (features merged
            within and across models that lose the least if all others may stand in for them), "zip" (ZipIt!, arXiv
            2305.03053), "permute" (Git Re-Basin, arXiv 2209.04836), "average", "weights" (Git Re-Basin on weights, no
            data needed), another of `fxzip.METHODS`, or an object with its settings such as
            `fxzip.Zip(alpha=0.1, beta=0.5)`. `docs/methods.md` has the table of those that go with each refit.
        start: where the trunk begins: None (at the input), or a module path or node name of all models, or one name
            for each. What is in front each model computes on its own, a stem for another kind of input say; the
            features that enter the trunk are merged.
        until: where the trunk ends: None (at the heads), a module path or node name of the first model, or a fraction
            in [0, 1] of the FLOPs to share (0: nothing is shared, each model runs on its own, narrowed where `width`
            says so); or "auto", which looks for it, by `min_agreement` or `max_cost`.
        width: how many features the spaces of the trunk keep, relative to the first model; or a dict of that by the
            name of a space (see `inspect`); or "auto": each space by its need, so that the zip costs at most
            `max_cost` (default 1.0) of the first model. Under least squares the heads keep fewer features then, too.
            Spaces whose size is written into the code, or matters to it, keep it, and the report says so.
        rank: what convolutions and linear layers of trunk and heads take, relative to what they take as one call: with
            0.5 each is made two, k×k to r features and 1×1 behind it, which take half; or a dict of that by module
            path; or "auto", by need within `max_cost`, together with the widths if those are.
            Needs least squares, which fits both. Grouped and shared layers stay as they are.
        min_agreement: with `until="auto"`: the deepest cut at which every head agrees with its original on this share
            of held-out inputs, a fifth of `data`. The default, 0.98.
        max_cost: with `until="auto"`: the earliest cut at which the zip costs at most so much, relative to the first
            model. With `width="auto"`: what the zip may cost; with both, the best of some cuts at that cost, by how
            close the heads' outputs are to the originals' on held-out inputs (R²).
        budget: what `max_cost` counts: "latency" (the default: seconds on the device of the sample input, with its
            batch and the threads that PyTorch has; calls are timed once and kept in the user's cache folder, and the
            result is timed, see `docs/howto/latency.md`), "flops", "memory" (bytes at the peak: parameters, and the
            tensors that live at once) or "parameters".
        refit: "auto" ("lstsq" where `data` is given, else "repair"), None, "batchnorm" (statistics re-estimated),
            "repair" (REPAIR, arXiv 2211.08403), "stored" (without data,
            from the statistics stored in BatchNorms), "lstsq" (least squares, closed form, layer by layer), or an
            object with its settings such as `fxzip.LeastSquares(ridge=1e-3)`.
        joint: for classifiers of different tasks whose logits are compared with one another: move each head's logits,
            all of an input by the same amount, such that together the heads tell the tasks apart. Order and softmax of
            a head's own logits stay. Needs data per model.
        hold_out: keep a tenth of the inputs out of all fits; the report says how far the heads agree with the
            originals on these. With `until="auto"`, which compares zips on them, it is a fifth.
        verify: check the analysis by relabelling at random.
        strict: raise `BarrierError` where a call without a rule, or features that cannot be matched, stop the sharing.
        progress: show a bar; None: on a terminal or in a notebook only. Without one each stage is a line in the log
            `fxzip`, at the level INFO.
        max_batches: most batches of `data` (of each source) that are read in a pass, since a loader may have no end;
            the report says so if there may have been more.
        rules: rule table for ATen calls, `fxzip.RULES | {...}`; None: `fxzip.RULES`.
        base: the network that the models were fine-tuned from, or its state dict, for methods that merge what
            fine-tuning has changed: "task-arithmetic", "ties", "tsv", "iso-c". It may have another head, or none.
            `method="auto"` is then "energy" under least squares, "average" under RegMean, else "tsv", without data too.
            Without it, fine-tunes of one base are recognised by their weights, and "auto" is "average", not "tsv".
        weights: how much each model counts, for methods that weigh models: those four and "average". By the names of
            the tasks where models have names. Only ratios count, but with "task-arithmetic" they are its coefficients.
        resume: a folder, new or of an earlier call with the same arguments that did not come to its end. What that one
            found out is kept there (moments, fitted layers, cuts that were tried), and is not computed again; the
            result is the same to the bit. `data` must give the same batches in the same order. The folder stays.

    Returns:
        A `torch.fx.GraphModule` in eval mode. It takes what the models take and returns a tuple with each model's
        output, or a dict by the names of the tasks. `.single(i)`, also by name, is the network of one task; `.report`
        says what was shared.

    Raises:
        InputError, OptionError, CostError, TraceError, AlignError, CutError, DataError, BarrierError,
            SelfCheckError: see `fxzip.errors`. Interrupted: Ctrl-C during `until="auto"`, once there is a zip that
            will do: `error.zipped` is the best so far.
    """
    given = Given.of(models if sample_input is None else (*models, sample_input))
    by_need = "auto" in (width, rank)
    request = width_request(width, max_cost if by_need else None, len(given.networks), budget)
    ranks = rank_request(rank, max_cost if by_need else None, budget)
    based = base is not None
    recipe = Recipe.of(method, refit, calibrated=data is not None, width=request, rank=ranks, based=based)
    recipe = recipe.weighing(weights_by_model(weights, given.tasks, len(given.networks)))
    check_base(base, recipe, named=method != "auto")
    cut = cut_request(until, min_agreement, max_cost, by_need=by_need, budget=budget)
    options = Options(
        start=start, joint=joint, hold_out=hold_out, verify=verify, strict=strict, by_position=recipe.by_position,
        max_batches=max_batches, rules=rules, data_free=recipe.data_free, base=base_tensors(base),
        compared_by='`until="auto"`' if isinstance(cut, (DeepestAgreeing, BestWithin)) else "",
    )  # fmt: skip
    store = opened(resume)
    if resume is not None:
        store.bind(facts_of(given, options, recipe, cut))
    with Display(show=progress) as display:
        session = Session.open(given, data, options, display, store=store)
        recipe = for_fine_tunes(recipe, session.survey)
        session = session.positional(recipe)
        try:
            return brought_back(finished(session, _zipped(session, recipe, cut)), device_of(given))
        except Interrupted as stop:
            stop.zipped = None if stop.zipped is None else session.named(session.shifted(stop.zipped))
            raise


def _zipped(session: Session, recipe: Recipe, cut: CutRequest) -> ZippedModule:
    """The zip at the cut that is asked for, or that is found."""
    if isinstance(cut, FixedCut):
        return _at(session, recipe, cut.until)
    if isinstance(cut, EarliestAffordable):
        return earliest_affordable(session, partial(_at, session, recipe), cut)

    exact, small = session.survey.shared_layers, SMALL_TRUNK * sum(session.survey.flops[0].values())
    if isinstance(cut, DeepestAgreeing) and exact is not None and session.survey.shared_flops >= small:
        return exactly_shared(_at(session, recipe, exact.until), exact.until)

    candidates = session.candidates(recipe, apart=isinstance(cut, BestWithin))
    solo = session.solo([one.observed.trunk for one in candidates], recipe)
    if isinstance(cut, BestWithin):
        return best_agreeing(session, candidates, recipe, solo, cut.max_cost)
    build = partial(assemble, session, recipe=recipe, solo=solo)
    return deepest_agreeing(session, candidates, lambda place: Assembly(build(candidates[place])), cut.min_agreement)


def _at(session: Session, recipe: Recipe, until: str | float | None) -> ZippedModule:
    candidate = session.candidate(until, recipe)
    return assemble(session, candidate, recipe, session.solo([candidate.observed.trunk], recipe))


def finished(session: Session, zipped: ZippedModule) -> ZippedModule:
    """The zip with what is asked of its heads together, its names, and how good and how fast it is."""
    with session.display.stage("judging"):
        zipped = session.shifted(zipped)
        zipped.meta["fxzip_report"] = judged(session, zipped)
    return session.named(zipped)

"""What all zips of one request have in common: the models, what is known of them, the data, and what is held out.

`compile_zip`, `sweep`, `compare` and `barrier` each open one session; zips differ in their cut and recipe only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from ..calibration import processes
from ..calibration.holdout import EVERY_FIFTH, EVERY_TENTH, HeldOut, checksum, hold_out, thinned
from ..calibration.observer import observe, observe_all
from ..calibration.shapes import other_shapes
from ..calibration.sources import Calibration
from ..calibration.store import NOTHING, Store
from ..errors import InputError
from ..partition.cut_points import Cut, nothing_shared
from ..partition.region import Trunk
from ..refit.joint.logit_shifts import needs_classifiers, needs_tasks, with_shifts
from ..rewriting.module import ZippedModule
from ..rewriting.report import Report
from ..tracing.calls import Call, JointCall, leaves, map_tensors
from ..widths.cached_seconds import CachedSeconds
from ..widths.latency import latency_prices
from ..widths.narrow_heads import behind
from ..widths.observed import Observed
from ..widths.prices import Prices, byte_prices, flop_prices, parameter_prices
from ..widths.rank_losses import CallOutputs
from ..widths.requests import Currency
from ..widths.resizable import resizable_spaces
from .arguments import Given, data_of
from .options import Options, Recipe
from .placement import at_work
from .progress import Display
from .request import facts_of_data, facts_of_graphs
from .survey import Survey, cuts_and_trunks, survey

SKETCHED, SKETCHED_SHARE = 200, 4
"""Zips are compared by fits on so many inputs at least, and on one of so many."""


@dataclass(frozen=True)
class Candidate:
    """A trunk that may be shared, with what the data show of it.

    Attributes:
        cut: where it ends, and what is known of it without zipping.
        observed: the trunk and the moments of its spaces.
    """

    cut: Cut
    observed: Observed


@dataclass(frozen=True, eq=False)
class Session:
    """Models and data of one request.

    Attributes:
        given: the models, the sample input, and the names of the tasks.
        options: of the request.
        display: shows how far the request is.
        survey: what is known of the models.
        calibration: the inputs that are fitted on.
        held: inputs that nothing is fitted on; None where there are none.
        store: has what was found out before, where a compile is resumed.
        inputs: how many there are, of all processes.
    """

    given: Given
    options: Options
    display: Display
    survey: Survey
    calibration: Calibration
    held: HeldOut | None
    store: Store = NOTHING
    inputs: int | None = None

    @classmethod
    def open(
        cls, given: Given, data: Any, options: Options, display: Display, *, held_out: Any = None,
        store: Store = NOTHING,
    ) -> Session:  # fmt: skip
        """Look at the models, and hold inputs out.

        Args:
            given: the models and the sample input.
            data: as in `compile_zip`.
            options: of the request.
            display: shows how far the request is.
            held_out: batches to hold out instead of inputs of `data`.
            store: of the request, which is bound to the data here.

        Raises:
            InputError, OptionError, TraceError, AlignError, DataError, BarrierError, SelfCheckError: see
                `fxzip.errors`.
        """
        given = at_work(_of_first(given))
        models, call = given.networks, given.call
        _check_start(call, options)
        if options.data_free:
            calibration = Calibration.none(call)
        else:
            calibration = replace(_calibration(given, data, options, display), store=store)
        if store is not NOTHING:
            store.bind(facts_of_data(calibration))
        if options.joint:
            needs_tasks(calibration, len(models))

        found = survey(models, call, options, others=other_shapes(calibration, call), display=display)
        programs = found.alignment.programs
        store.bind(facts_of_graphs(programs))
        if options.joint:
            needs_classifiers(programs)

        held: HeldOut | None = None
        with display.stage("holding out"):
            if held_out is not None:
                batches = _calibration(given, held_out, options, display)("holding out")
                held = HeldOut.of(list(batches.by_source()), programs)
            elif options.compared_by:
                calibration, held = hold_out(calibration, programs, every=EVERY_FIFTH, needed_by=options.compared_by)
            elif options.hold_out and data is not None:
                calibration, held = hold_out(calibration, programs, every=EVERY_TENTH)
        calibration = replace(calibration, several=all(program.batch_axes for program in programs))
        return cls(given, options, display, found, calibration, held, store, calibration.inputs)

    def positional(self, recipe: Recipe) -> Session:
        """The session in which features that cannot be matched are averaged place by place, if the recipe does that."""
        if recipe.by_position == self.survey.by_position:
            return self
        return replace(self, survey=replace(self.survey, by_position=recipe.by_position))

    def candidate(self, until: str | float | None, recipe: Recipe) -> Candidate:
        """The trunk that ends at `until`, or as late as is sound."""
        trunk = self.survey.sound(self.survey.trunk(until)).trunk
        return Candidate(Cut.of(until), self.observed(trunk, recipe))

    def candidates(self, recipe: Recipe, *, apart: bool = False) -> list[Candidate]:
        """Every place where the trunk may end, in a row; all are observed in one pass over the data.

        `apart`: the first of them shares nothing, if heads can be narrowed.
        """
        cuts, trunks = cuts_and_trunks(self.survey)
        if apart and recipe.narrows and not self.survey.alignment.stems:
            cuts, trunks = [nothing_shared(self.survey.flops), *cuts], [self.survey.trunk(0.0), *trunks]
        return self._observed_all(cuts, trunks, recipe)

    def candidates_at(self, cuts: Sequence[str | float | None], recipe: Recipe) -> list[Candidate]:
        """The trunks that end at these places."""
        trunks = [self.survey.trunk(cut) for cut in cuts]
        return self._observed_all([Cut.of(cut) for cut in cuts], trunks, recipe)

    def _observed_all(self, cuts: Sequence[Cut], trunks: Sequence[Trunk], recipe: Recipe) -> list[Candidate]:
        with self.display.stage("observing"):
            batches = self.calibration("observing") if recipe.observes else ()
            inputs = self.inputs if recipe.mends else None
            moments = self.store.value("moments of all cuts", lambda: observe_all(trunks, batches, inputs=inputs))
        return [Candidate(cut, Observed(trunk, own)) for cut, trunk, own in zip(cuts, trunks, moments, strict=True)]

    def observed(self, trunk: Trunk, recipe: Recipe) -> Observed:
        """A trunk with what the data show of it, if the recipe asks for that."""
        with self.display.stage("observing"):
            batches = self.calibration("observing") if recipe.observes else ()
            make = partial(observe, trunk, batches, inputs=self.inputs if recipe.mends else None)
            return Observed(trunk, self.store.value("moments", make))

    def solo(self, trunks: Iterable[Trunk], recipe: Recipe) -> Mapping[int, Observed]:
        """The models by themselves, by number, if heads behind some of the trunks can be narrowed."""
        if not recipe.narrows:
            return {}
        own = self.survey.whole_trunks
        if not any(behind(trunk, k, one) for trunk in trunks for k, one in own.items()):
            return {}
        return self._solo

    @cached_property
    def _solo(self) -> Mapping[int, Observed]:
        own = self.survey.whole_trunks
        found = {}
        for k, one in own.items():
            make = partial(observe, one, self.calibration("observing heads"))
            found[k] = Observed(one, self.store.value(f"moments of model {k}", make, once=True))
        return found

    def prices(self, currency: Currency) -> Prices:
        """Of every node of every model, in a currency."""
        if currency == "flops":
            return flop_prices(self.survey.flops)
        if currency == "parameters":
            return parameter_prices(self.survey.labellings)
        return self._bytes if currency == "memory" else self._seconds

    @cached_property
    def _bytes(self) -> Prices:
        return byte_prices(self.survey.labellings)

    @cached_property
    def _seconds(self) -> Prices:
        programs, solo = self.survey.alignment.programs, self.__dict__.get("_solo", {})
        with self.display.stage("timing"):
            alone = {
                k: (trunk, solo[k].elastic if k in solo else resizable_spaces(trunk))
                for k, trunk in self.survey.whole_trunks.items()
            }
            known = CachedSeconds.of(programs[0].call.device)
            measure = partial(latency_prices, programs, alone, known)
            return self.store.value("seconds of nodes", lambda: processes.of_first(measure), once=True)

    @cached_property
    def call_outputs(self) -> CallOutputs:
        """What the data show of the calls that may be factorised."""
        make = partial(CallOutputs.observe, self.survey.alignment, lambda: self.calibration("observing calls"))
        return self.store.value("outputs of calls", make, once=True)

    @cached_property
    def sketching(self) -> Calibration | None:
        """Some of the inputs that are fitted on, evenly, enough to compare zips by; None: all of them are needed."""
        every = min((self.calibration.inputs or 0) // SKETCHED, SKETCHED_SHARE)
        if every < 2:
            return None
        part = thinned(self.calibration, self.survey.alignment.programs, every=every)
        return part if all(processes.everyone(any(part.sources))) else None  # a fit needs some in every process

    def shifted(self, network: ZippedModule) -> ZippedModule:
        """The network with the logits of its heads moved such that they tell the tasks apart, where that is asked."""
        return with_shifts(network, self.calibration) if self.options.joint else network

    def named(self, network: ZippedModule) -> ZippedModule:
        """The network with the names of its tasks, where they have any."""
        return with_task_names(network, self.given.tasks)


def with_task_names(network: ZippedModule, tasks: Sequence[str]) -> ZippedModule:
    """The network, in place, with names of its tasks in its outputs and its report; none: as it is."""
    if tasks:
        network.name_tasks(tasks)
        network.meta["fxzip_report"] = Report({**network.report, "tasks": list(tasks)})
    return network


def _of_first(given: Given) -> Given:
    """Of several processes all take the sample input of the first; the models must be the same everywhere."""
    if processes.count() == 1:
        return given
    sums = [checksum(Call(tuple(model.state_dict().values()), {})) for model in given.networks]
    processes.same(sums, "models, parameters and buffers to the bit")
    own = leaves(given.call)
    theirs = iter(processes.of_first(lambda: [value.detach().cpu() for value in own]))

    def taken(call: Call) -> Call:
        if isinstance(call, JointCall):
            return JointCall.of(map(taken, call.parts))
        return map_tensors(lambda value: next(theirs).to(value.device), call)

    return replace(given, call=taken(given.call))


def _calibration(given: Given, data: Any, options: Options, display: Display) -> Calibration:
    own = data_of(data, given.tasks)
    found = Calibration.of(own, given.call, len(given.networks), False, options.max_batches)
    return replace(found, watch=display.watch, say=display.say)


def _check_start(call: Call, options: Options) -> None:
    if isinstance(call, JointCall) and options.start is None:
        raise InputError(
            "Models with inputs of their own (`sample_input` is a `PerModel`) share nothing at the input; say with "
            "`start` where the trunk begins."
        )

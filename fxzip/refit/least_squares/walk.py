"""The walk of `LeastSquares`: zipped network and originals node by node, each unit fitted when its inputs are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import fx

from ...calibration import processes
from ...rewriting.module import ZippedModule, part_of, sources_of
from ...rewriting.zip_plan import ZipPlan
from ...tracing import quiet_execution
from ...tracing.calls import Call, batch_size
from ..linear_calls.counterparts import Counterparts
from ..linear_calls.parameter_uses import survey
from ..linear_calls.units import Site, Unit, find_units
from ..readings import readings_by_node
from ..unfit import Unfit
from .alternating import FreeTarget
from .batches import Batches
from .dataflow import follow
from .free_features import Freedom
from .lockstep import Lockstep
from .parts import Part
from .regression_targets import HeadTargets, NarrowHeadTargets, RegressionTarget, TrunkTargets
from .samples import Batch, Sample, Sampler
from .solving import Asked, Fit, Settings, Solved, blocks_of, offset_of, solve, write


class Walk:
    """The walk over the zipped network and the originals in lockstep."""

    def __init__(
        self, net: ZippedModule, plan: ZipPlan, batches: Batches, settings: Settings, unfit: Mapping[str, str],
        *, trial: bool = False,
    ) -> None:  # fmt: skip
        self.net, self.plan, self.settings, self.unfit, self.is_trial = net, plan, settings, unfit, trial
        self.batches = batches
        programs = plan.trunk.alignment.programs
        self.survey = survey(net, programs[0].small_call)
        self.zipped = batches.lockstep(net)
        self.originals = [batches.lockstep(program.module) for program in programs]
        self.names = [plan.trunk.names(k) for k in range(len(self.originals))]
        self.flow = follow(net, programs[0].small_call)
        self.fit = Fit()
        self.counterparts = [Counterparts(self.survey, program) for program in programs]
        self.relied = set[tuple[fx.Node, int]]()
        self.parts = self._find_parts(batches.sources)
        self.units = 0
        self.read = {} if trial else readings_by_node(net)
        if settings.turns and not trial:
            self.relied = self._readers(programs[0].small_call)
            for part in self.parts.values():
                if part.merged is not None:
                    part.freedom = Freedom(part.merged.plan, part.merged, self.flow, self.relied)
        self.sampler = Sampler(
            self.zipped, self.survey, batches.numbers, batches.all, settings.positions, settings.least,
            acts=lambda node: None if (part := self.parts.get(part_of(node))) is None else part.function(node),
            trial=trial,
        )  # fmt: skip

    def _find_parts(self, sources: int) -> dict[str, Part]:
        """Trunk and heads by name."""
        nodes: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.net.graph.nodes:
            if node.op != "output":
                nodes[part_of(node)].append(node)

        def part(
            name: str, originals: Sequence[Lockstep], targets: TrunkTargets | HeadTargets | NarrowHeadTargets,
            merged: TrunkTargets | None,
        ) -> Part:  # fmt: skip
            units, left = find_units(self.net, self.survey, set(nodes[name]))
            self.fit.left |= left | {unit.name: self.unfit[unit.name] for unit in units if unit.name in self.unfit}
            units = [unit for unit in units if unit.name not in self.unfit]
            return Part(name, nodes[name], units, originals, targets, merged)

        targets = TrunkTargets(self.plan, self.originals, self.counterparts, sources)
        ends: TrunkTargets | NarrowHeadTargets = targets
        if len(self.originals) == 1:  # what a network by itself returns is in its trunk, in an order of its own
            ends = NarrowHeadTargets(targets, HeadTargets(self.originals[0], self.counterparts[0], self.plan, 0))
        result = {"trunk": part("trunk", self.originals, ends, targets)}
        for k, original in enumerate(self.originals):
            mine, own = self.counterparts[k], self.plan.heads.get(k)
            whole = HeadTargets(original, mine, self.plan, k)
            merged = None if own is None else TrunkTargets(own, [original], [mine], sources)
            aims = whole if merged is None else NarrowHeadTargets(merged, whole)
            result[f"head {k}"] = part(f"head {k}", [original], aims, merged)
        return result

    def _readers(self, sample: Call) -> set[tuple[fx.Node, int]]:
        """The linear calls that will be fitted and read all features at once."""
        found = set()
        rows = self.batches.inputs / (batch_size(sample) or 1)
        places = {(step.node, step.call): step.shape.numel() * rows for step in self.flow.steps}
        for part in self.parts.values():
            for unit in part.units:
                if unit.kernel is None or unit.kernel.groups > 1 or len(unit.kernel.axes) > 1:
                    continue
                outputs = unit.kernel.flat.shape[1]
                if sum(places.get((s.node, s.call), 0.0) for s in unit.sites) < outputs * unit.inputs:
                    continue  # so few positions keep its weights near those that were merged
                if part.merged is None or _has_targets(part, unit):
                    found |= {(site.node, site.call) for site in unit.sites}
        return found

    def all(self) -> None:
        """Trunk and heads.

        Raises:
            Unfit: with `restart`: a unit is left that others were fitted for.
        """
        self.trunk()
        for k in range(len(self.originals)):
            self.head(k)
        with quiet_execution():
            self.zipped.finish()

    def trunk(self) -> None:
        """Run the trunk of all networks node by node and fit each unit when the inputs of its first call are there."""
        self._stems()
        part = self.parts["trunk"]
        starts = part.starts()
        for node in part.nodes:
            name = sources_of(node)[0]
            twins = [net.nodes[own[name]] for net, own in zip(self.originals, self.names, strict=True) if name in own]
            self._step(part, node, starts, list(zip(self.originals, twins, strict=False)))

    def head(self, k: int) -> None:
        """Run head k and fit its units in turn, towards what its own network gives there."""
        original, own = self.originals[k], set(self.names[k].values())
        part = self.parts[f"head {k}"]
        starts = part.starts()
        for node in part.nodes:
            twin = original.nodes.get(sources_of(node)[0])
            mine = [] if twin is None or twin.name in own else [(original, twin)]
            self._step(part, node, starts, mine)

    def _step(
        self, part: Part, node: fx.Node, starts: dict[fx.Node, list[Unit]], twins: Sequence[tuple[Lockstep, fx.Node]]
    ) -> None:
        """One node of the zipped network, and its twins in the originals."""
        for net, twin in twins:
            net.run(twin)
        for unit in starts.pop(node, ()):
            self._summand(part, unit, starts)
            self._fit(part, unit)
        if node in self.read:
            self.zipped.look(node.all_input_nodes[0], self.read[node].take)
        self.zipped.run(node)
        for net, twin in twins:
            net.release(twin)
        self.zipped.release(node)

    def _summand(self, part: Part, unit: Unit, starts: dict[fx.Node, list[Unit]]) -> None:
        """Where a unit's result is added to something later, compute that first; if it is the result of a unit of at
        most as many inputs, fit that first: what it leaves is for the larger one to mend."""
        total = self.flow.sum_behind(unit.sites[0].output) if unit.inputs and len(unit.sites) == 1 else None
        if total is None or part_of(total) != part.name:
            return
        missing = {node: self.zipped.lacking(node) for node in total.all_input_nodes}
        others = [node for node, needed in missing.items() if needed and unit.sites[0].node not in needed]
        ahead = [(node, own) for other in others for node in missing[other] for own in starts.get(node, ())]
        later = {site.node for units in starts.values() for own in units for site in own.sites[1:]}
        if any(later & set(missing[other]) for other in others):  # it will be fitted at its first call
            return
        if any(len(own.sites) > 1 or not 0 < own.inputs <= unit.inputs for _, own in ahead) or len(ahead) > 1:
            return
        for node, smaller in ahead:
            starts[node].remove(smaller)
            self._fit(part, smaller)
        for other in others:
            self.zipped.ahead(other)

    def _stems(self) -> None:
        """What the models compute on their own in front of the trunk, and where it is merged: nothing is fitted."""
        ahead = [n for n in self.net.graph.nodes if part_of(n).startswith("stem ") or part_of(n) == "merge"]
        for node in ahead:
            self.zipped.run(node)
            self.zipped.release(node)
        for net, stem in zip(self.originals, self.plan.trunk.alignment.stems, strict=False):
            for name, node in net.nodes.items():
                if name in stem.nodes | stem.reads:
                    net.run(node)
                    if name in stem.nodes:
                        net.release(node)

    def _fit(self, part: Part, unit: Unit) -> None:
        """Fit one unit, or note why it is left.

        Raises:
            Unfit: it is left, and others were fitted in the belief that it would not be.
        """
        if self.is_trial:
            solved = self._solved(part, unit)
        else:
            solved = self.batches.store.value(f"{part.name}, {unit.name}", lambda: self._solved(part, unit))
        self.units += 1
        if solved.left:
            if any((site.node, site.call) in self.relied for site in unit.sites):
                found = Unfit(solved.left)
                found.restart = unit.name
                raise found
            self.fit.left[unit.name] = solved.left
            return
        if solved.weight is not None:
            write(self.net, unit, solved, self.fit)
        self.zipped.forget(unit.sites[0].node)

    def _solved(self, part: Part, unit: Unit) -> Solved:
        """The solution of one unit, or why there is none; in a trial whether there is one."""
        try:
            samples = self._drawn(part, unit)
            if self.is_trial:
                return Solved()
            asked = Asked(self._free_target(part, unit, samples), self._rank(part, unit))
            solved = solve(self.net, unit, samples, self.settings, asked)
        except Unfit as found:
            return Solved(str(found))
        return solved

    def _drawn(self, part: Part, unit: Unit) -> list[Sample]:
        """What all processes can draw samples of; where one cannot, none does."""
        samples, why = list[Sample](), ""
        try:
            with quiet_execution():  # networks only: its watch over random numbers costs more than small products
                samples = self._draw(part, unit)
        except Unfit as found:
            why = str(found)
        reasons = [why] if self.is_trial else processes.everyone(why)
        if any(reasons):
            raise Unfit(next(reason for reason in reasons if reason))
        return samples

    def _rank(self, part: Part, unit: Unit) -> int | None:
        """The rank that the call of a unit is to have; None: it stays one call."""
        node = unit.sites[0].node
        sources = sources_of(node)
        return self.plan.ranks.get((part.name, sources[0])) if sources else None

    def _draw(self, part: Part, unit: Unit) -> list[Sample]:
        """Samples of all calls of a unit, batch by batch: each catches up with what was run so far."""
        targets = [self._target(part, unit, site) for site in unit.sites]
        networks = (self.zipped, *part.originals)
        samples: list[Sample] = []
        self.sampler.begin()
        for batch in range(len(self.zipped)):
            self.sampler.seed(self.units, batch)
            opened = [network.open(batch) for network in networks]
            for place, (site, target) in enumerate(zip(unit.sites, targets, strict=True)):
                # A call further on: what lies in between is computed ahead and forgotten.
                envs = [dict(env) for env in opened] if place else opened
                drawn = Batch(batch, self.batches.source[batch], envs[0], envs[1:])
                sample = self.sampler.draw(unit, site, drawn, target, part.targets.at)
                samples.append(sample if self.batches.samples_file is None else sample.on(self.batches.samples_file))
            for network in networks:
                network.close(batch)
        per_feature = next((t for t in (unit.scale, unit.shift) if t is not None), None)
        if unit.kernel is None and per_feature is not None and per_feature.numel() != samples[0].x.shape[1]:
            raise Unfit("several features share one parameter")
        return samples

    def _target(self, part: Part, unit: Unit, site: Site) -> RegressionTarget:
        """What a call of a unit should give."""
        target = part.targets.of(unit, site)
        if target is None:
            raise Unfit("its features are fixed, or lie in several orders")
        if unit.kernel is None and target.axes != (unit.axis,):
            shared = unit.axis in target.axes
            raise Unfit("several features share one parameter" if shared else "it has no parameter per feature")
        return target

    def _free_target(self, part: Part, unit: Unit, samples: Sequence[Sample]) -> FreeTarget | None:
        """What the features of a unit should tell, where they are free."""
        node = samples[0].node
        apart = [sample.apart for sample in samples if sample.apart is not None]
        if part.freedom is None or unit.kernel is None or unit.kernel.groups > 1 or len(apart) < len(samples):
            return None
        function, target = part.function(node), part.targets.at(node)
        assert function is not None
        assert target is not None
        features = blocks_of(apart)
        return FreeTarget(features, part.freedom.metric(target, features), function, offset_of(samples))


def _has_targets(part: Part, unit: Unit) -> bool:
    """Whether it is known what a unit should give."""
    try:
        return all(part.targets.of(unit, site) is not None for site in unit.sites)
    except Unfit:
        return False

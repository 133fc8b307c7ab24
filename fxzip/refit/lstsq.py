"""Refit by least squares: closed form, front to back, on the merged network's own inputs.

For a linear call with inputs x* (as the merged network has them, calls in front refitted already) the target t is what
the originals give there, merged, and the new weights are the ridge regression of `ridge`, pulled towards the zipped
ones. A BatchNorm behind the call takes part: its output is the target, and it becomes the identity. Where a residual
sum follows, the target is the sum's target less what the other path really carries, so each block repairs the errors in
front of it. Where only a ReLU follows, what lies below zero does not matter. Scales and biases of other normalisations
are fitted feature by feature. Then each head in the same way, towards what its own network gives: its first linear
calls read features that are only nearly its own, and the later ones repair what these leave.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, fx, nn

from ..errors import InputError
from ..inputs import Call
from ..plan import ZipPlan
from ..zipped import ZippedModule, part_of
from .alternating import Wish
from .flow import Function, follow
from .freedom import Freedom
from .goals import Goal, HeadGoals, TrunkGoals
from .kernels import effective, install
from .lockstep import Lockstep, within_memory
from .ridge import affine_solution, best_ridge, ridge_solution
from .samples import Sample, Sampler
from .survey import decomposed, survey
from .units import Unit, called, find_units


@dataclass
class Fit:
    """Notes for the report: calls fitted, calls left as zipped with the reason, calls whose ridge had to grow, and
    whether all batches were used."""

    fitted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    raised: dict[str, float] = field(default_factory=dict)
    all_batches: bool = True


@dataclass(frozen=True)
class LeastSquares:
    """The refit with its settings; the defaults are those of every figure in the docs.

    Attributes:
        ridge: λ relative to the mean diagonal of the Gram matrix. Where fewer than `scarce` positions per input were to
            be had, a tenth of the best on held-out positions of this and up to 10⁴ times as much, if that is more.
        scarce: see `ridge`.
        positions: sampled positions per input of a call, and at least `least` in all.
        least: see `positions`.
        rounds: of majorisation in front of a ReLU, see `ridge_solution`.
        turns: of alternating least squares, at most, where merged features may be any that tell of the originals', see
            `alternating`; 0: none.
        memory: bytes that the activations of all networks on all batches may take; batches beyond are left out.
    """

    ridge: float = 1e-4
    scarce: int = 16
    positions: int = 20
    least: int = 12288
    rounds: int = 3
    turns: int = 3
    memory: int = 4 << 30

    def __post_init__(self) -> None:
        least = {"ridge": 0, "scarce": 0, "positions": 1, "least": 1, "rounds": 0, "turns": 0, "memory": 1}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                default = next(own.default for own in fields(self) if own.name == name)
                raise InputError(
                    f"`LeastSquares` needs `{name}` >= {bound}; got {name}={getattr(self, name)}. "
                    f"The default is {default}."
                )

    def __call__(self, zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
        """Refit trunk and heads. A new module; no labels, no gradients. One pass over `data`."""
        result = copy.deepcopy(zipped)
        labelled = getattr(data, "labelled", None)
        numbered = labelled() if labelled is not None else ((0, call) for call in data)
        programs = plan.trunk.alignment.programs
        batches, cut = within_memory(numbered, programs, self.memory, getattr(data, "sources", 1))
        with decomposed():
            walk = _Walk(result, plan, batches, self)
            walk.trunk()
            for k in range(len(programs)):
                walk.head(k)
        walk.fit.all_batches = not cut
        result.meta["fxzip_fit"] = walk.fit
        return result


class _Walk:
    """The walk over the zipped network and the originals in lockstep."""

    def __init__(
        self, net: ZippedModule, plan: ZipPlan, batches: Sequence[tuple[int, int, Call]], settings: LeastSquares
    ) -> None:
        self.net, self.plan, self.settings = net, plan, settings
        self.sources = [source for source, _, _ in batches]
        calls = [call for _, _, call in batches]
        programs = plan.trunk.alignment.programs
        self.survey = survey(net, programs[0].call)
        self.zipped = Lockstep(net, calls)
        self.originals = [Lockstep(program.module, calls) for program in programs]
        self.names = [plan.trunk.names(k) for k in range(len(self.originals))]
        self.goals = TrunkGoals(plan, self.originals, max(self.sources) + 1)
        numbers = [number for _, number, _ in batches]
        self.flow = follow(net, programs[0].call)
        self.freedom = Freedom(plan, self.flow, self._readers()) if settings.turns else None
        self.sampler = Sampler(
            self.zipped, self.survey, numbers, settings.positions, settings.least, lambda node: self._function(node) is not None
        )
        self.fit = Fit()

    def _readers(self) -> set[tuple[fx.Node, int]]:
        """The linear calls that will be fitted and read all features at once."""
        parts: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.net.graph.nodes:
            if node.op != "output":
                parts[part_of(node)].append(node)
        found = set()
        for part, nodes in parts.items():
            if part != "trunk" and not part.startswith("head "):
                continue
            for unit in find_units(self.net, self.survey, set(nodes))[0]:
                if unit.kernel is None or unit.kernel.groups > 1 or len(unit.kernel.axes) > 1:
                    continue
                if part != "trunk" or all(self.goals.of(unit, site) is not None for site in unit.sites):
                    found |= {(site.node, site.call) for site in unit.sites}
        return found

    def _function(self, node: fx.Node) -> Function | None:
        """What acts on each feature of a result whose features are free; None elsewhere."""
        if self.freedom is None or part_of(node) != "trunk":
            return None
        return self.freedom.function(node, self.goals.at(node))

    def trunk(self) -> None:
        """Run the trunk of all networks node by node and fit each unit when the inputs of its first call are there."""
        self._stems()
        nodes = [n for n in self.net.graph.nodes if n.op != "output" and part_of(n) == "trunk"]
        starts = self._units(nodes)
        for node in nodes:
            name = node.meta["fxzip"]["from"][0]
            twins = [net.nodes[own[name]] for net, own in zip(self.originals, self.names, strict=True) if name in own]
            for net, twin in zip(self.originals, twins, strict=False):
                net.run(twin)
            for unit in starts.pop(node, ()):
                self._summand(unit, starts)
                self._fit_trunk(unit)
            self.zipped.run(node)
            for net, twin in zip(self.originals, twins, strict=False):
                net.release(twin)
            self.zipped.release(node)

    def _fit_trunk(self, unit: Unit) -> None:
        self._fit(unit, [self.goals.of(unit, site) for site in unit.sites], self.originals, self.goals.at)

    def _summand(self, unit: Unit, starts: dict[fx.Node, list[Unit]]) -> None:
        """Where a unit's result is added to that of a later, smaller one, fit the smaller one first: what it leaves is
        for the larger one to mend."""
        other = self.flow.other_summand(unit.sites[0].output) if unit.kernel is not None else None
        if other is None or len(unit.sites) > 1 or other in self.zipped.envs[0]:
            return
        missing = self.zipped.missing(self.zipped.envs[0], other)
        ahead = [(node, own) for node in missing for own in starts.get(node, ())]
        if len(ahead) != 1 or ahead[0][1].kernel is None or len(ahead[0][1].sites) > 1:
            return
        node, smaller = ahead[0]
        if smaller.kernel.flat.shape[-1] > unit.kernel.flat.shape[-1]:
            return
        starts[node].remove(smaller)
        self._fit_trunk(smaller)
        for env in self.zipped.envs:
            self.zipped.value(env, other)

    def _units(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, list[Unit]]:
        """Units by the node of their first call."""
        units, left = find_units(self.net, self.survey, set(nodes))
        self.fit.left |= left
        starts: dict[fx.Node, list[Unit]] = defaultdict(list)
        for unit in units:
            starts[unit.sites[0].node].append(unit)
        return starts

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

    def head(self, k: int) -> None:
        """Run head k and fit its units in turn, towards what its own network gives there."""
        original, own = self.originals[k], set(self.names[k].values())
        goals = HeadGoals(original, self.plan.trunk.labellings[k])
        nodes = [n for n in self.net.graph.nodes if part_of(n) == f"head {k}"]
        starts = self._units(nodes)
        for node in nodes:
            twin = original.nodes.get(node.meta["fxzip"]["from"][0])
            mine = twin is not None and twin.name not in own
            if twin is not None and mine:
                original.run(twin)
            for unit in starts.get(node, ()):
                self._fit(unit, [goals.of(unit, site) for site in unit.sites], [original], goals.at)
            self.zipped.run(node)
            self.zipped.release(node)
            if twin is not None and mine:
                original.release(twin)

    def _fit(
        self, unit: Unit, goals: Sequence[Goal | None], originals: Sequence[Lockstep],
        sums: Callable[[fx.Node], Goal | None],
    ) -> None:  # fmt: skip
        """Fit one unit, from samples of all its calls."""
        samples = []
        for place, (site, goal) in enumerate(zip(unit.sites, goals, strict=True)):
            if goal is None:
                self.fit.left[unit.name] = "its features are fixed, or lie in several orders"
                return
            for batch, source in enumerate(self.sources):
                envs = [net.envs[batch] for net in (self.zipped, *originals)]
                if place:  # a call further on: what lies in between is computed ahead and forgotten
                    envs = [dict(env) for env in envs]
                samples.append(self.sampler.draw(unit, site, batch, source, envs, goal, sums))
        per_feature = next((t for t in (unit.scale, unit.shift) if t is not None), None)
        if unit.kernel is None and per_feature is not None and per_feature.numel() != samples[0].x.shape[1]:
            self.fit.left[unit.name] = "several features share one parameter"
            return
        solve(self.net, unit, samples, self.settings, self.fit, self._wish(unit, samples))
        self.zipped.forget(unit.sites[0].node)


    def _wish(self, unit: Unit, samples: Sequence[Sample]) -> Wish | None:
        """What the features of a unit should tell, where they are free."""
        node = samples[0].node
        apart = [sample.apart for sample in samples if sample.apart is not None]
        if self.freedom is None or unit.kernel is None or unit.kernel.groups > 1 or len(apart) < len(samples):
            return None
        function, goal = self._function(node), self.goals.at(node)
        assert function is not None and goal is not None
        features = [function(torch.cat(own)) for own in zip(*apart, strict=True)]
        return Wish(torch.cat(features, 1), self.freedom.metric(goal, features), function, _offset(samples))


def _offset(samples: Sequence[Sample]) -> Tensor | None:
    offsets = [sample.offset for sample in samples if sample.offset is not None]
    return torch.cat(offsets) if len(offsets) == len(samples) else None


def solve(
    net: ZippedModule, unit: Unit, samples: Sequence[Sample], settings: LeastSquares, fit: Fit,
    wish: Wish | None = None,
) -> None:  # fmt: skip
    """Solve the regression of one unit and write the solution into its parameters."""
    x, t = torch.cat([sample.x for sample in samples]), torch.cat([sample.t for sample in samples])
    if unit.kernel is not None:
        _solve_linear(net, unit, x, t, samples, settings, fit, wish)
    else:
        scale, shift = affine_solution(
            x, t, settings.ridge, scaled=unit.scale is not None, shifted=unit.shift is not None
        )
        if unit.scale is not None:
            unit.scale.mul_(scale.reshape(unit.scale.shape).to(unit.scale))
        if unit.shift is not None:
            unit.shift.copy_(
                scale.reshape(unit.shift.shape).to(unit.shift) * unit.shift
                + shift.reshape(unit.shift.shape).to(unit.shift)
            )
    fit.fitted.append(unit.name)


def _solve_linear(
    net: ZippedModule, unit: Unit, x: Tensor, t: Tensor, samples: Sequence[Sample], settings: LeastSquares, fit: Fit,
    wish: Wish | None,
) -> None:  # fmt: skip
    """x [places, groups, inputs], t [places, outputs]: one regression per group."""
    kernel = unit.kernel
    assert kernel is not None
    norm = called(net, unit.norm) if unit.norm is not None else None
    flat, bias = effective(kernel, norm)
    groups, rows, _ = flat.shape
    rounds = settings.rounds if all(sample.rectified for sample in samples) else 0
    offset = _offset(samples)
    constant = kernel.bias is not None or norm is not None or unit.owner is not None
    held = _half(samples)
    for g in range(groups):
        mine = slice(g * rows, (g + 1) * rows)
        prior = torch.cat([flat[g].T, bias[None, mine]]) if constant else flat[g].T
        part = None if offset is None else offset[:, mine]
        given = settings.ridge
        scarce = len(x) < settings.scarce * x.shape[2]
        if scarce:
            ridges = [given * 10**power for power in range(5)]
            best = best_ridge(
                x[:, g], t[:, mine], prior, ridges, held, rectified=rounds > 0, offset=part, constant=constant
            )
            # Halves want more of it than the whole, and what it holds back adds up from call to call.
            given = max(given, best / 10)
        solution, ridge = ridge_solution(
            x[:, g], t[:, mine], prior, given, rounds=rounds, offset=part, constant=constant,
            wish=None if scarce else wish, turns=settings.turns,
        )  # fmt: skip
        flat[g] = (solution[:-1] if constant else solution).T
        if constant:
            bias[mine] = solution[-1]
        if ridge > given:
            fit.raised[unit.name] = ridge
    install(kernel, norm, flat, bias)
    if unit.owner is not None and norm is None:
        weight = kernel.weight
        unit.owner.bias = nn.Parameter(bias.to(weight), requires_grad=weight.requires_grad)


def _half(samples: Sequence[Sample]) -> Tensor:
    """Every second batch; of a single one every second position. Bool [places]."""
    if len({sample.batch for sample in samples}) == 1:
        count = sum(len(sample.x) for sample in samples)
        return torch.arange(count, device=samples[0].x.device) % 2 == 1
    return torch.cat([sample.x.new_full((len(sample.x),), sample.batch % 2).bool() for sample in samples])


def least_squares(zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
    """`LeastSquares` with its default settings."""
    return LeastSquares()(zipped, plan, data)

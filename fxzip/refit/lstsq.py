"""Refit by least squares: closed form, front to back, on the merged network's own inputs.

For a linear call with inputs x* (as the merged network has them, calls in front refitted already) the target t is what
the originals give there, merged, and the new weights are the ridge regression of `ridge`, pulled towards the zipped
ones. A BatchNorm behind the call takes part: its output is the target, and it becomes the identity. Where a residual
sum follows, the target is the sum's target less what the other path really carries, so each block repairs the errors in
front of it. Where only a ReLU follows, what lies below zero does not matter. Scales and biases of other normalisations
are fitted feature by feature. Then the first linear calls of each head are fitted to the original's own output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ..inputs import Call, not_finite
from ..plan import ZipPlan
from ..tracing import quiet_execution
from ..zipped import ZippedModule, part_of
from .lockstep import Lockstep, within_memory
from .ridge import affine_solution, ridge_solution
from .targets import find_targets
from .units import (
    Places,
    Unit,
    called,
    effective,
    feature_axis,
    find_units,
    install,
    only_user,
    patches,
    sampled_places,
    take,
)

Target = Callable[[int, Places], Tensor]


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
        ridge: λ relative to the mean diagonal of the Gram matrix.
        positions: sampled positions per input of a call, and at least `least` in all.
        least: see `positions`.
        rounds: of majorisation in front of a ReLU, see `ridge_solution`.
        memory: bytes that the activations of all networks on all batches may take; batches beyond are left out.
    """

    ridge: float = 1e-4
    positions: int = 24
    least: int = 16384
    rounds: int = 3
    memory: int = 4 << 30

    def __call__(self, zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
        """Refit trunk and heads. A new module; no labels, no gradients. One pass over `data`."""
        result = copy.deepcopy(zipped)
        labelled = getattr(data, "labelled", None)
        numbered = labelled() if labelled is not None else ((0, call) for call in data)
        programs = plan.trunk.alignment.programs
        batches, cut = within_memory(numbered, programs, self.memory, getattr(data, "sources", 1))
        with quiet_execution():
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
        self.numbers = [number for _, number, _ in batches]
        calls = [call for _, _, call in batches]
        self.zipped = Lockstep(net, calls)
        self.originals = [Lockstep(program.module, calls) for program in plan.trunk.alignment.programs]
        self.names = [plan.trunk.names(k) for k in range(len(self.originals))]
        self.generator = torch.Generator().manual_seed(0)
        self.fit = Fit()

    @staticmethod
    def _waits(node: fx.Node, units: dict[fx.Node, Unit]) -> bool:
        """Whether this is a linear call that is fitted together with the BatchNorm behind it."""
        behind = only_user(node)
        return behind is not None and behind in units and units[behind].call is node

    def _release(self, node: fx.Node, units: dict[fx.Node, Unit]) -> None:
        """Free what is not needed any more; inputs of a call wait until the BatchNorm behind it has been fitted."""
        if self._waits(node, units):
            return
        if node in units and units[node].norm is not None:
            self.zipped.release(units[node].call)
        self.zipped.release(node)

    def trunk(self) -> None:
        """Run the trunk of all networks node by node and fit each unit when its inputs are there."""
        self._stems()
        nodes = [n for n in self.net.graph.nodes if n.op != "output" and part_of(n) == "trunk"]
        units = find_units(self.net, nodes)
        for node in nodes:
            name = node.meta["fxzip"]["from"][0]
            twins = [net.nodes[own[name]] for net, own in zip(self.originals, self.names, strict=True) if name in own]
            for net, twin in zip(self.originals, twins, strict=False):
                net.run(twin)
            if node in units and units[node].linear:
                shapes = [value.shape for value in self.originals[0].values(twins[0])]
                self._fit_trunk(units[node], shapes)
            elif not self._waits(node, units):
                self.zipped.run(node)
                if node in units:
                    self._fit_trunk(units[node], [value.shape for value in self.zipped.values(node)])
            for net, twin in zip(self.originals, twins, strict=False):
                net.release(twin)
            self._release(node, units)

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

    def _fit_trunk(self, unit: Unit, shapes: Sequence[torch.Size]) -> None:
        """Fit one unit, whose output has these shapes, if that can be done, and run it."""
        name = unit.target.meta["fxzip"]["from"][0]
        found = find_targets(self.plan, name, max(self.sources) + 1)
        if found is None:
            self.fit.left[unit.call.name] = "its features do not lie along one axis"
            self._run(unit)
            return
        twins = self.plan.trunk.alignment.pairs[name]
        wanted = [net.values(net.nodes[twin]) for net, twin in zip(self.originals, twins, strict=True)]
        other = None
        if unit.total is not None:
            other = self.zipped.values(next(n for n in unit.total.all_input_nodes if n is not unit.output))

        def target(batch: int, places: Places) -> Tensor:
            return found.at(self.sources[batch], [values[batch] for values in wanted], places)

        merged = [torch.Size([found.size if a == found.axis else n for a, n in enumerate(s)]) for s in shapes]
        self._solve(unit, merged, found.axis, target, other)

    def head(self, k: int) -> None:
        """Run head k and fit the linear calls that no other linear call of it comes before."""
        original, own = self.originals[k], set(self.names[k].values())
        nodes = [n for n in self.net.graph.nodes if part_of(n) == f"head {k}"]
        units = find_units(self.net, nodes)
        behind: set[fx.Node] = set()
        for node in nodes:
            name = node.meta["fxzip"]["from"][0]
            self.zipped.run(node)
            twin = original.nodes.get(name)
            if twin is not None and name not in own:
                original.run(twin)
            first = node in units and units[node].linear and units[node].call not in behind
            if first:
                self._fit_head(units[node], original)
            if first or any(source in behind for source in node.all_input_nodes):
                behind.add(node)
            self._release(node, units)

    def _fit_head(self, unit: Unit, original: Lockstep) -> None:
        wanted = original.values(original.nodes[unit.output.meta["fxzip"]["from"][0]])
        module = called(self.net, unit.call)
        assert module is not None
        axis = feature_axis(module, wanted[0].ndim)
        alone = Unit(unit.call, unit.norm, None, unit.rectified and unit.total is None, unit.linear)
        shapes = [value.shape for value in wanted]
        self._solve(alone, shapes, axis, lambda batch, places: take(wanted[batch], axis, places), None)

    def _run(self, unit: Unit) -> None:
        for node in (unit.call, unit.norm):
            if node is not None:
                self.zipped.run(node)

    def _solve(
        self, unit: Unit, shapes: Sequence[torch.Size], axis: int, target: Target, other: list[Tensor] | None
    ) -> None:
        """Fit one unit from sampled places of all batches, and run it."""
        module, norm = called(self.net, unit.call), called(self.net, unit.norm) if unit.norm is not None else None
        assert module is not None
        inputs = effective(module, norm)[0].shape[-1] if unit.linear else 1
        count = math.ceil(max(self.settings.least, self.settings.positions * inputs) / len(self.zipped))
        xs, ts, skips = [], [], []
        for batch, env in enumerate(self.zipped.envs):
            places = sampled_places(shapes[batch], axis, count, self.generator)
            source = env[unit.call.all_input_nodes[0]]
            xs.append(patches(module, source, places) if unit.linear else take(env[unit.output], axis, places))
            skip = None if other is None else take(other[batch].expand(shapes[batch]), axis, places)
            wanted = target(batch, places)
            ts.append(wanted if skip is None else wanted - skip)
            skips += [] if skip is None else [skip]
            for value, network in ((wanted, "the originals"), (xs[-1], "the zipped network"), (ts[-1], "both")):
                if not bool(value.sum().isfinite()) and (bad := int((~value.flatten(1).isfinite().all(0)).sum())):
                    raise not_finite(bad, unit.call.name, network, self.numbers[batch])
        x, t, offset = torch.cat(xs), torch.cat(ts), torch.cat(skips) if skips else None
        if unit.linear:
            self._solve_linear(unit, x, t, offset)
        else:
            scale, shift = affine_solution(x, t, self.settings.ridge)
            weight, bias = module.weight, module.bias
            assert isinstance(weight, Tensor)
            assert isinstance(bias, Tensor)
            weight.mul_(scale.to(weight))
            bias.copy_(scale.to(bias) * bias + shift.to(bias))
        self.fit.fitted.append(unit.call.name)
        self._run(unit)

    def _solve_linear(self, unit: Unit, x: Tensor, t: Tensor, offset: Tensor | None) -> None:
        """x [places, groups, inputs], t [places, outputs]: one regression per group."""
        module, norm = called(self.net, unit.call), called(self.net, unit.norm) if unit.norm is not None else None
        assert module is not None
        flat, bias = effective(module, norm)
        groups, rows, _ = flat.shape
        rounds = self.settings.rounds if unit.rectified else 0
        for g in range(groups):
            mine = slice(g * rows, (g + 1) * rows)
            prior = torch.cat([flat[g].T, bias[None, mine]])
            part = None if offset is None else offset[:, mine]
            solution, ridge = ridge_solution(
                x[:, g], t[:, mine], prior, self.settings.ridge, rounds=rounds, offset=part
            )
            flat[g], bias[mine] = solution[:-1].T, solution[-1]
            if ridge > self.settings.ridge:
                self.fit.raised[unit.call.name] = ridge
        install(module, norm, flat, bias)


def least_squares(zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
    """`LeastSquares` with its default settings."""
    return LeastSquares()(zipped, plan, data)

"""RegMean (Jin et al., ICLR 2023, arXiv 2212.09849): the linear call nearest to those of all models.

For inputs X_k that model k sees in its own run, with Gram matrix G_k = X_kᵀ X_k, the weights that minimise
Σ_k ‖X_k W - X_k W_k‖² are

    W* = (Σ_k G̃_k)⁻¹ Σ_k G̃_k W_k,        G̃_k = α G_k + (1 - α) diag(G_k)

with the off-diagonal entries shrunk by α < 1. Linear calls and convolutions (through their patches), wherever they are
made, inside leaf modules too; everything else, biases too, is the mean, as the zip has it. It asks for networks whose
features correspond one to one: fine-tunes of one initialisation (method "average"), or networks aligned by
permutations.

A BatchNorm right behind a call is affine in evaluation, and belongs to the call: W_k and b_k are those of both
together, and b* = mean over all inputs of b_k + x (W_k - W*), the best one for that W*. A mean of running statistics
would be that of no network.

RegMean++ (Nguyen et al., arXiv 2508.03121) takes for X_k what the merged network gives on the data of model
k, the calls in front merged already: front to back, one call after another.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..calibration import processes
from ..calibration.sources import with_sources
from ..errors import OptionError
from ..rewriting.module import ZippedModule, part_of, set_tensor
from ..rewriting.paired_parameters import aligned_tensors, check_paired
from ..rewriting.zip_plan import ZipPlan
from ..tracing import quiet_execution
from ..tracing.aten_calls import AtenCall, run
from ..tracing.calls import Call
from .least_squares.batches import Batches
from .least_squares.footprint import bytes_per_row
from .least_squares.lockstep import Lockstep, laid_out
from .least_squares.memory import Bound, limit_of
from .least_squares.spill_file import SpillFile
from .linear_calls.kernels import effective, sampled_places
from .linear_calls.parameter_uses import survey
from .linear_calls.units import Site, Unit, called, find_units
from .regmean_sums import CallMean, InputSums

_Place = tuple[str, int]
"""The first call of a unit: name of the node, and the call's number inside it."""


@dataclass(frozen=True)
class RegMean:
    """The refit with its settings.

    >>> import fxzip
    >>> from torch import nn
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    >>> x = torch.randn(64, 4)
    >>> fxzip.compile_zip(a, b, x, data=[x], method="average", refit=RegMean(alpha=0.5), progress=False).report["refit"]
    RegMean(alpha=0.5, positions=4096)

    Attributes:
        alpha: how much of the off-diagonal entries of a Gram matrix counts, in [0, 1]; the paper's 0.9.
        positions: sampled outputs per batch and call.
    """

    alpha: float = 0.9
    positions: int = 4096

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"`RegMean` needs 0 <= alpha <= 1; found alpha={self.alpha}. The paper's is 0.9.")

    def __call__(self, zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
        """Refit the trunk. A new module; one pass over `data` per model.

        With data per model, G_k is taken on the data of model k, as in the paper.
        """
        check_paired(plan, "`RegMean`")
        result = copy.deepcopy(zipped)
        sample = plan.trunk.alignment.programs[0].call
        models = len(plan.trunk.alignment.programs)
        sums: dict[_Place, CallMean] = defaultdict(CallMean)
        with quiet_execution():
            for k in range(models):
                own = _original(zipped, plan, k)
                numbered, sources = with_sources(data)
                several = sources == models
                units = _units(own, sample)
                grams = _Grams(own, units.values(), self.positions)
                for source, call in numbered:
                    if not several or source == k:
                        grams.take(call)
                for place in sorted({place for theirs in processes.everyone(list(grams.found)) for place in theirs}):
                    seen = grams.found[place].of_all()
                    sums[place].add(seen.shrunk(self.alpha), *_calls(own, units[place]))
            for place, unit in _units(result, sample).items():
                if place in sums:
                    sums[place].put(result, unit)
        return result


@dataclass(frozen=True)
class RegMeanPlusPlus(RegMean):
    """RegMean on the merged network's own inputs, front to back.

    >>> import fxzip
    >>> from torch import nn
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    >>> x = torch.randn(64, 4)
    >>> fxzip.compile_zip(a, b, x, data=[x], method="average", refit="regmean++", progress=False).report["refit"]
    'regmean++'

    Attributes:
        alpha, positions: as in `RegMean`.
        memory: bytes for the values of nodes at a time, as in `LeastSquares`.
    """

    memory: float | None = None

    def __call__(self, zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
        """Refit the trunk. A new module; one pass over `data`.

        With data per model, X_k is taken on the data of model k, as in the paper.
        """
        check_paired(plan, "`RegMeanPlusPlus`")
        programs = plan.trunk.alignment.programs
        sample, models = programs[0].call, len(programs)
        numbered, sources = with_sources(data)
        laid = ((source, laid_out(call, sample)) for source, call in numbered)
        bound = Bound(limit_of(self.memory, sample), bytes_per_row(zipped, programs))
        with SpillFile() as file, quiet_execution():
            result = copy.deepcopy(zipped)
            batches = Batches.read(laid, sources, bound, file)
            originals = [_original(zipped, plan, k) for k in range(models)]
            calls = [_units(own, sample) for own in originals]
            starts: dict[fx.Node, list[_Place]] = defaultdict(list)
            units = _units(result, sample)
            for place, unit in units.items():
                starts[unit.sites[0].node].append(place)

            walk = batches.lockstep(result)
            for node in result.graph.nodes:
                if node.op == "output" or part_of(node).startswith("head "):
                    continue
                for place in starts.get(node, ()):
                    seen = self._seen(walk, units[place], batches, models)
                    total = CallMean()
                    for k, own in enumerate(originals):
                        total.add(seen[k].shrunk(self.alpha), *_calls(own, calls[k][place]))
                    total.put(result, units[place])
                    walk.forget(node)
                walk.run(node)
                walk.release(node)
        return result

    def _seen(self, walk: Lockstep, unit: Unit, batches: Batches, models: int) -> list[InputSums]:
        """What all calls of a unit read, for each model on its own data, or all of it where nobody's is known."""
        found = [InputSums() for _ in range(models)]
        generator = torch.Generator()
        for batch, source in enumerate(batches.source):
            generator.manual_seed(batches.numbers[batch])  # the same places whichever process has the batch
            env = walk.open(batch)
            for number, site in enumerate(unit.sites):
                there = dict(env) if number else env  # a call further on: what lies in between is forgotten
                walk.inputs(there, site.node)
                x = self._inputs(walk, there, unit, site, generator)
                for own in [found[source]] if batches.sources == models else found:
                    own.add(x)
            walk.close(batch)
        return [own.of_all() for own in found]

    def _inputs(self, walk: Lockstep, env: dict[fx.Node, Any], unit: Unit, site: Site, generator: Any) -> Tensor:
        """Inputs of one call, [groups, places, inputs]."""
        caught: list[Tensor] = []

        def see(call: AtenCall) -> Any:
            out = call.make()
            if call.number == site.call and call.name == site.name:
                assert unit.kernel is not None
                places = sampled_places(out.shape, unit.kernel.axes, self.positions, generator, out.device)
                caught.append(unit.kernel.patches(call.args[site.at], places).transpose(0, 1))
            return out

        walk.call(env, site.node, see)
        return caught[0]


def _original(zipped: ZippedModule, plan: ZipPlan, k: int) -> ZippedModule:
    """The zipped network with the trunk of model k, its features where the plan has them."""
    own = copy.deepcopy(zipped)
    for name, value in aligned_tensors(plan, k).items():
        set_tensor(own, f"trunk.{name}", value)
    return own


def _units(net: ZippedModule, sample: Call) -> dict[_Place, Unit]:
    """The linear calls of the trunk, inside leaf modules too."""
    nodes = {node for node in net.graph.nodes if part_of(node) == "trunk"}
    units, _ = find_units(net, survey(net, sample), nodes, still=True)
    return {(unit.sites[0].node.name, unit.sites[0].call): unit for unit in units if unit.kernel is not None}


def _calls(net: ZippedModule, unit: Unit) -> tuple[Tensor, Tensor]:
    """Weight [groups, outputs, inputs] and bias [outputs] of a call with the BatchNorm behind it, float64."""
    assert unit.kernel is not None
    return effective(unit.kernel, None if unit.norm is None else called(net, unit.norm))


class _Grams:
    """Runs the trunk and sums up the Gram matrix of the inputs of every linear call."""

    def __init__(self, module: ZippedModule, units: Iterable[Unit], positions: int) -> None:
        self.module, self.positions = module, positions
        self.generator = torch.Generator()
        self.sites = {(site.node.name, site.call): (unit, site) for unit in units for site in unit.sites}
        self.found: dict[_Place, InputSums] = defaultdict(InputSums)

    def take(self, call: Call) -> None:
        """A batch."""
        trunk = {node for node in self.module.graph.nodes if part_of(node) == "trunk"}
        self.generator.manual_seed(0)  # the same places whichever batches came before, in this process or another
        run(self.module, call, on_call=self._see, only=trunk.__contains__)

    def _see(self, call: AtenCall) -> Any:
        out = call.make()
        unit, site = self.sites.get((call.node.name, call.number), (None, None))
        if unit is None or unit.kernel is None or site is None or call.name != site.name:
            return out

        first = unit.sites[0]
        places = sampled_places(out.shape, unit.kernel.axes, self.positions, self.generator, out.device)
        self.found[first.node.name, first.call].add(unit.kernel.patches(call.args[site.at], places).transpose(0, 1))
        return out

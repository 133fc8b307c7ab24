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
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...calibration.sources import store_of, tell, with_sources
from ...rewriting.factorised import factorise
from ...rewriting.module import ZippedModule, part_of, sources_of
from ...rewriting.zip_plan import ZipPlan
from ...tracing import quiet_execution
from ...tracing.calls import Call
from ...tracing.precision import full_precision
from ..readings import Readings
from ..refitted import Refitted, noting
from ..unfit import Unfit
from .batches import Batches
from .footprint import RegressionSize, bytes_per_row, parameter_bytes, size_of
from .lockstep import laid_out
from .memory import Bound, Meter, limit_of
from .solving import Fit, Settings
from .spill_file import SpillFile
from .walk import Walk

__all__ = ["Fit", "LeastSquares", "fit_least_squares"]


@dataclass(frozen=True)
class LeastSquares(Settings):
    """The refit with its settings, see `Settings`."""

    def __call__(self, zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
        """Refit trunk and heads. A new module; no labels, no gradients. One pass over `data`."""
        return self.refitted(zipped, plan, data).module

    def refitted(self, zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> Refitted:
        """The same, with what it has to say for the report. What was fitted is in `module.meta["fxzip_fit"]`."""
        numbered, sources = with_sources(data)
        programs = plan.trunk.alignment.programs
        sample = programs[0].call
        laid = ((source, laid_out(call, sample)) for source, call in numbered)
        with SpillFile() as file, Meter(sample.device) as meter, full_precision(), torch.no_grad():
            unfit, regressions = _tried(zipped, plan, self)
            bound = Bound(
                limit_of(self.memory, sample), bytes_per_row(zipped, programs), parameter_bytes(zipped), regressions,
                (self.positions, self.least), self.scarce,
            )  # fmt: skip
            batches = Batches.read(laid, sources, bound, file)
            batches.store = store_of(data)
            tell(data, f"least squares on {batches.inputs} inputs: {batches.usage}")
            while True:
                result = copy.deepcopy(zipped)
                walk = _walk(result, plan, batches, self, unfit)
                try:
                    walk.all()
                    break
                except Unfit as found:  # the sample did not show it
                    if not found.restart:
                        raise
                    unfit[found.restart] = str(found)
            assert batches.usage is not None
            usage = replace(batches.usage, measured=meter.grown)
        walk.fit.inputs, walk.fit.memory = batches.inputs, usage
        fitted = {(part_of(node), sources_of(node)[0]) for node in walk.fit.factors}
        walk.fit.whole = [f"{part}: {name}" for part, name in plan.ranks if (part, name) not in fitted]
        factorise(result, walk.fit.take_factors())
        tell(data, f"least squares is done: {walk.fit.memory}")
        result.meta["fxzip_fit"] = walk.fit
        readings = Readings({own.name: own for own in walk.read.values()}, len(batches.calls))
        return Refitted(result, tuple(walk.fit.notes()), readings)


def _tried(
    zipped: ZippedModule, plan: ZipPlan, settings: Settings
) -> tuple[dict[str, str], tuple[RegressionSize, ...]]:
    """What cannot be fitted as it turns out on the sample, with the reason, and how large the regressions of what can
    be are. Nothing is changed."""
    batches = Batches.of(plan.trunk.alignment.programs[0].small_call)
    walk = _walk(zipped, plan, batches, settings, {}, trial=True)
    walk.all()
    left, sizes = walk.fit.left, list[RegressionSize]()
    for part in walk.parts.values():
        told = len(part.originals) if settings.turns and part.merged is not None else 0
        sizes += [size_of(unit, batches.inputs, told) for unit in part.units if unit.name not in left]
    return left, tuple(sizes)


def _walk(*arguments: Any, trial: bool = False) -> Walk:
    with quiet_execution():
        return Walk(*arguments, trial=trial)


@noting
def fit_least_squares(zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> Refitted:
    """`LeastSquares` with its default settings."""
    return LeastSquares().refitted(zipped, plan, data)

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
from dataclasses import dataclass

from ..inputs import Call
from ..plan import ZipPlan
from ..zipped import ZippedModule
from .lockstep import bytes_per_row, within_memory
from .samples import sample_bytes
from .solving import Fit, Settings
from .survey import decomposed
from .walk import Walk

__all__ = ["Fit", "LeastSquares", "least_squares"]

_SHARE = 0.75  # of the memory for values of nodes; the rest is for what calls inside a node make


@dataclass(frozen=True)
class LeastSquares(Settings):
    """The refit with its settings, see `Settings`."""

    def __call__(self, zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
        """Refit trunk and heads. A new module; no labels, no gradients. One pass over `data`."""
        result = copy.deepcopy(zipped)
        labelled = getattr(data, "labelled", None)
        numbered = labelled() if labelled is not None else ((0, call) for call in data)
        programs = plan.trunk.alignment.programs
        samples = min(sample_bytes(result, self.positions, self.least), self.memory / 2)
        batches, inputs = within_memory(
            numbered, bytes_per_row(result, programs), _SHARE * (self.memory - samples), getattr(data, "sources", 1),
            whole=any(not program.batch_axes for program in programs),
        )  # fmt: skip
        with decomposed():
            walk = Walk(result, plan, batches, self)
            walk.trunk()
            for k in range(len(programs)):
                walk.head(k)
        walk.fit.inputs = inputs
        result.meta["fxzip_fit"] = walk.fit
        return result


def least_squares(zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
    """`LeastSquares` with its default settings."""
    return LeastSquares()(zipped, plan, data)

"""What is lost if a feature space keeps fewer features, for the choice of widths.

Space s with m features kept has the loss L_s(m), the geometric mean of the unexplained variance if downstream weights
make the best of all features that are left (`fxzip.matching.energy`: what a refit could get in a linear network) and of
the reconstruction error of each feature from its own cluster (`clusterwise.py` there: what they have at least). It
counts r_s times, once for each weight downstream that sees the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..matching import Energy
from ..matching.energy.clusterwise import reconstruction_errors, variance_shares
from ..matching.energy.energy import downstream_metric, unexplained_variance
from ..matching.moments import Moments
from ..matching.problem import Problem
from ..partition.region import Trunk
from ..rewriting.zip_plan import problem_of


class Losses:
    """Of the spaces of a trunk; each is computed once.

    Args:
        trunk: what is shared.
        statistics: moments of its spaces.
    """

    def __init__(self, trunk: Trunk, statistics: Mapping[int, Moments]) -> None:
        self.trunk, self.statistics = trunk, statistics
        self._known: dict[int, npt.NDArray[np.float64]] = {}

    @cached_property
    def _problem(self) -> Problem:
        return problem_of(self.trunk, self.statistics, Energy(), self.trunk.reach)

    def of(self, space: int) -> npt.NDArray[np.float64]:
        """r_s L_s(m) for m = 0, ..., N, falling to 0."""
        if space not in self._known:
            own, floor = self._problem.spaces[space], Energy().floor
            assert own.moments is not None
            count = max((len(weights) for weights in own.downstream), default=1)
            unexplained = unexplained_variance(own.moments, downstream_metric(own.moments, own.downstream), floor)
            lost = reconstruction_errors(own.moments, variance_shares(own.moments, own.downstream), floor)
            self._known[space] = max(count, 1) * np.sqrt(unexplained * lost)
        return self._known[space]

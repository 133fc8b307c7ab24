"""What is lost if a feature space keeps fewer features, for the choice of widths.

Space s with m features kept loses the energy L_s(m), the geometric mean of what is lost if readers make the best of all
features that are left (`fxzip.matching.energy`: what a refit could get in a linear network) and if they read each
feature back from its own cluster (`clusterwise.py` there: what they have at least). It counts r_s times, once for each
of the weights that read the space and see the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..matching import Energy
from ..matching.energy.clusterwise import cluster_losses, energies
from ..matching.energy.energy import energy_losses, reading
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
            readers = max((len(read) for read in own.readers), default=1)
            told = energy_losses(own.moments, reading(own.moments, own.readers), floor)
            kept = cluster_losses(own.moments, energies(own.moments, own.readers), floor)
            self._known[space] = max(readers, 1) * np.sqrt(told * kept)
        return self._known[space]

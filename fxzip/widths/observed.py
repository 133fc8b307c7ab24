"""A part of the models together with what the data show of its feature spaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..matching.moments import Moments
from ..partition.region import Trunk
from .losses import Losses
from .resizable import Elastic, elastic_spaces


@dataclass(frozen=True, eq=False)
class Observed:
    """A trunk, or one model by itself as a trunk of one, and the moments of its spaces.

    Attributes:
        trunk: what is shared; of one model by itself, all of it.
        moments: of the spaces that were observed, by their numbers in model 0.
    """

    trunk: Trunk
    moments: Mapping[int, Moments]

    @cached_property
    def losses(self) -> Losses:
        """What each space loses with fewer features."""
        return Losses(self.trunk, self.moments)

    @cached_property
    def elastic(self) -> Elastic:
        """Spaces that may have another size; of the others, why they may not."""
        return elastic_spaces(self.trunk, self.moments)

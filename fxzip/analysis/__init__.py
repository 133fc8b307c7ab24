"""Which features of a program may change places: `analyse` is `label` → `solve` → self-check.

`labelling` pushes labels through one run by the `rules`, `solver` and `spaces` solve what these said, `relabelling`
makes legal relabellings, `random_trial` runs the program before and after one, `sightings` says what its nodes show,
`checking` proves the analysis by that.
"""

from .checking import Check, analyse, check, relative_difference, self_check
from .grouping import FeatureSpace
from .labelling import Barrier, Labelling, ParamLabels, Site, label
from .relabelling import random_relabelling, relabelled
from .spaces import FeatureSpaces, Layout, solve

__all__ = [
    "Barrier",
    "Check",
    "FeatureSpace",
    "FeatureSpaces",
    "Labelling",
    "Layout",
    "ParamLabels",
    "Site",
    "analyse",
    "check",
    "label",
    "random_relabelling",
    "relabelled",
    "relative_difference",
    "self_check",
    "solve",
]

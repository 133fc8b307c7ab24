"""Which features of a program may change places: `label` → `solve`, and the self-check of the result.

`labelling` pushes labels through one run, `solver` and `spaces` solve what the rules said, `relabel` makes legal
relabellings, `trial` runs the program before and after one, `sightings` says what its nodes show, `checking` proves the
analysis by that.
"""

from .checking import Check, check, relative_difference, self_check
from .graph import dependencies, relations
from .labelling import Barrier, Labelling, ParamLabels, Site, label
from .relabel import group_run, random_relabelling, relabelled
from .spaces import FeatureSpace, FeatureSpaces, Layout, solve

__all__ = [
    "Barrier",
    "Check",
    "FeatureSpace",
    "FeatureSpaces",
    "Labelling",
    "Layout",
    "ParamLabels",
    "Site",
    "check",
    "dependencies",
    "group_run",
    "label",
    "random_relabelling",
    "relabelled",
    "relations",
    "relative_difference",
    "self_check",
    "solve",
]

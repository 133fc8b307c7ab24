"""Which features of a program may change places: `label` → `solve`, and the self-check of the result.

`labelling` pushes labels through one run, `solver` and `spaces` solve what the rules said, `relabel` makes legal
relabellings, `trial` runs the program before and after one, `checking` proves the analysis by that.
"""

from .checking import relative_difference, self_check
from .graph import dependencies, relations
from .labelling import Barrier, Labelling, ParamLabels, Site, label
from .relabel import group_run, random_relabelling, relabelled
from .spaces import FeatureSpace, FeatureSpaces, Layout, solve

__all__ = [
    "Barrier",
    "FeatureSpace",
    "FeatureSpaces",
    "Labelling",
    "Layout",
    "ParamLabels",
    "Site",
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

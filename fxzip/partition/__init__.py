"""Which part of several programs is shared: `align` pairs their nodes, `find_trunk` cuts.

`dependencies` makes a program a graph; stems, cut points and what must stay each model's own are found here too.
"""

from .alignment import align
from .region import Trunk
from .trunk import find_trunk

__all__ = ["Trunk", "align", "find_trunk"]

"""fxzip: zip trained networks into one multi-task network, without training. A graph compiler on torch.fx.

>>> import fxzip
>>> fxzip.resolve("zip").name
'zip'
"""

from .calibration import PerModel
from .compiler import compile_zip, inspect
from .errors import (
    AlignError,
    BarrierError,
    CutError,
    DataError,
    FxzipError,
    FxzipWarning,
    InputError,
    PinnedSpaceWarning,
    SelfCheckError,
    TraceError,
)
from .matching import METHODS, Average, Merge, Permute, Zip, resolve
from .moments import Moments
from .report import Report
from .zipped import ZippedModule
from .rules import RULES

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "RULES",
    "AlignError",
    "Average",
    "BarrierError",
    "CutError",
    "DataError",
    "FxzipError",
    "FxzipWarning",
    "InputError",
    "Merge",
    "Moments",
    "PerModel",
    "Permute",
    "PinnedSpaceWarning",
    "Report",
    "SelfCheckError",
    "TraceError",
    "ZippedModule",
    "Zip",
    "compile_zip",
    "inspect",
    "resolve",
]

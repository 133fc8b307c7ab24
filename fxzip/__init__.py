"""fxzip: zip trained networks into one multi-task network, without training. A graph compiler on torch.fx.

>>> import fxzip
>>> fxzip.resolve("zip").name
'zip'
"""

from .align import align
from .allowed import trust
from .analysis import label, self_check, solve
from .analysis.twin import relabel
from .calibration import Calibration, PerModel
from .compare import compare, sweep
from .compiler import Recipe, assemble, compile_zip, survey
from .errors import (
    AlignError,
    BarrierError,
    ContainerError,
    CostError,
    CutError,
    DataError,
    FxzipError,
    FxzipWarning,
    InputError,
    LoadError,
    PinnedSpaceWarning,
    SelfCheckError,
    SpecializationError,
    TraceError,
)
from .inspection import inspect
from .interpolation import Barrier, barrier
from .joint import calibrate_joint
from .matching import (
    CCA,
    METHODS,
    Agglomerative,
    Average,
    CycleConsistent,
    Energy,
    KMeans,
    Merge,
    MuDSC,
    Optimal,
    Permute,
    Recover,
    Transport,
    WeightMatching,
    Zip,
    resolve,
)
from .moments import Moments
from .observe import observe
from .plan import plan
from .refit import REFITS, LeastSquares, RegMean, refits
from .report import Report
from .rewrite import rewrite
from .rules import RULES
from .side_by_side import side_by_side
from .soup import soup
from .table import Table
from .tracing import trace
from .trunk import find_trunk
from .zipped import ZippedModule

__version__ = "0.1.0"

__all__ = [
    "CCA",
    "METHODS",
    "REFITS",
    "RULES",
    "Agglomerative",
    "AlignError",
    "Average",
    "Barrier",
    "BarrierError",
    "Calibration",
    "ContainerError",
    "CostError",
    "CutError",
    "CycleConsistent",
    "DataError",
    "Energy",
    "FxzipError",
    "FxzipWarning",
    "InputError",
    "KMeans",
    "LeastSquares",
    "LoadError",
    "Merge",
    "Moments",
    "MuDSC",
    "Optimal",
    "PerModel",
    "Permute",
    "PinnedSpaceWarning",
    "Recipe",
    "Recover",
    "RegMean",
    "Report",
    "SelfCheckError",
    "SpecializationError",
    "Table",
    "TraceError",
    "Transport",
    "WeightMatching",
    "Zip",
    "ZippedModule",
    "align",
    "assemble",
    "barrier",
    "calibrate_joint",
    "compare",
    "compile_zip",
    "find_trunk",
    "inspect",
    "label",
    "observe",
    "plan",
    "refits",
    "relabel",
    "resolve",
    "rewrite",
    "self_check",
    "side_by_side",
    "solve",
    "soup",
    "survey",
    "sweep",
    "trace",
    "trust",
]

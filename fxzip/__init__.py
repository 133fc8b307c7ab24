"""fxzip: zip trained networks into one multi-task network, without training. A graph compiler on torch.fx.

>>> import fxzip
>>> fxzip.resolve("zip").name
'zip'
"""

from .analysis import label, self_check, solve
from .analysis.rules import RULES
from .calibration.observer import observe
from .calibration.sources import Calibration, PerModel
from .compiler.options import Recipe
from .compiler.pipeline import assemble, compile_zip
from .compiler.survey import survey
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
    OptionError,
    PinnedSpaceWarning,
    SaveError,
    SelfCheckError,
    SpecializationError,
    TraceError,
)
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
from .matching.moments import Moments
from .ops import answer_to_former_names
from .partition.alignment import align
from .partition.trunk import find_trunk
from .refit import REFITS, LeastSquares, RegMean, refits
from .refit.joint.logit_shifts import calibrate_joint
from .rewriting.emit import rewrite
from .rewriting.module import ZippedModule
from .rewriting.report import Report
from .rewriting.serialization import load, save
from .rewriting.zip_plan import plan
from .tools.agreement import Agreement, Evaluation, agreement, evaluate
from .tools.comparison import compare, sweep
from .tools.exporting import export
from .tools.inspection import inspect
from .tools.interpolation import Barrier, barrier
from .tools.relabelled import relabel
from .tools.soups import soup
from .tools.table import Table
from .tools.unmerged import side_by_side
from .tracing import trace
from .tracing.allowed import trust

__version__ = "0.1.0"

answer_to_former_names()

__all__ = [
    "CCA",
    "METHODS",
    "REFITS",
    "RULES",
    "Agglomerative",
    "Agreement",
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
    "Evaluation",
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
    "OptionError",
    "PerModel",
    "Permute",
    "PinnedSpaceWarning",
    "Recipe",
    "Recover",
    "RegMean",
    "Report",
    "SaveError",
    "SelfCheckError",
    "SpecializationError",
    "Table",
    "TraceError",
    "Transport",
    "WeightMatching",
    "Zip",
    "ZippedModule",
    "agreement",
    "align",
    "assemble",
    "barrier",
    "calibrate_joint",
    "compare",
    "compile_zip",
    "evaluate",
    "export",
    "find_trunk",
    "inspect",
    "label",
    "load",
    "observe",
    "plan",
    "refits",
    "relabel",
    "resolve",
    "rewrite",
    "save",
    "self_check",
    "side_by_side",
    "solve",
    "soup",
    "survey",
    "sweep",
    "trace",
    "trust",
]

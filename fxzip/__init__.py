"""fxzip: zip trained networks into one multi-task network, without training. A graph compiler on torch.fx.

>>> import fxzip
>>> list(fxzip.METHODS)[:5]
['energy', 'zip', 'permute', 'weights', 'average']

Here is what users call. The stages of the compiler are in their packages, for pipelines of one's own:
`docs/own_pipeline.md`.
"""

import importlib
import sys
import warnings
from typing import Any

from .analysis.rules import RULES
from .calibration.sources import PerModel
from .compiler.pipeline import compile_zip
from .errors import (
    AlignError,
    BarrierError,
    CalibrationWarning,
    ContainerError,
    CostError,
    CutError,
    DataError,
    FxzipError,
    FxzipWarning,
    InputError,
    Interrupted,
    LoadError,
    OptionError,
    PinnedSpaceWarning,
    ProcessError,
    RecipeError,
    RuleError,
    SaveError,
    SelfCheckError,
    SpecializationError,
    TraceError,
    TrunkWarning,
)
from .matching import METHODS, Average, Energy, Permute, WeightMatching, Zip
from .matching.registry import LEFT
from .ops import answer_to_former_names
from .refit import REFITS, LeastSquares
from .refit.joint.logit_shifts import calibrate_joint
from .rewriting.module import ZippedModule
from .rewriting.report import Report
from .rewriting.serialization import load, save
from .tools import baselines
from .tools.agreement import Agreement, Evaluation, agreement, evaluate
from .tools.batched_heads import batch_heads
from .tools.comparison import compare, sweep
from .tools.exporting import export
from .tools.inspection import inspect
from .tools.interpolation import Barrier, barrier
from .tools.narrowing import narrow
from .tools.relabelled import relabel
from .tools.soups import soup
from .tools.table import Table
from .tools.unmerged import side_by_side
from .tracing.allowed import trust

__version__ = "0.1.0"

answer_to_former_names()
sys.modules[f"{__name__}.baselines"] = baselines  # so that `from fxzip.baselines import KMeans` finds it

__all__ = [
    "METHODS",
    "REFITS",
    "RULES",
    "Agreement",
    "AlignError",
    "Average",
    "Barrier",
    "BarrierError",
    "CalibrationWarning",
    "ContainerError",
    "CostError",
    "CutError",
    "DataError",
    "Energy",
    "Evaluation",
    "FxzipError",
    "FxzipWarning",
    "InputError",
    "Interrupted",
    "LeastSquares",
    "LoadError",
    "OptionError",
    "PerModel",
    "Permute",
    "PinnedSpaceWarning",
    "ProcessError",
    "RecipeError",
    "Report",
    "RuleError",
    "SaveError",
    "SelfCheckError",
    "SpecializationError",
    "Table",
    "TraceError",
    "TrunkWarning",
    "WeightMatching",
    "Zip",
    "ZippedModule",
    "agreement",
    "barrier",
    "baselines",
    "batch_heads",
    "calibrate_joint",
    "compare",
    "compile_zip",
    "evaluate",
    "export",
    "inspect",
    "load",
    "narrow",
    "relabel",
    "save",
    "side_by_side",
    "soup",
    "sweep",
    "trust",
]

_MOVED = {
    "fxzip.analysis": ("label", "self_check", "solve"),
    "fxzip.baselines": (
        "Agglomerative", "CycleConsistent", "KMeans", "MuDSC", "Optimal", "Recover", "RegMean", "Transport",
    ),
    "fxzip.calibration": ("Calibration", "observe"),
    "fxzip.compiler": ("Recipe", "assemble"),
    "fxzip.compiler.survey": ("survey",),
    "fxzip.matching": ("Merge", "Moments", "resolve"),
    "fxzip.partition": ("align", "find_trunk"),
    "fxzip.refit": ("refits",),
    "fxzip.rewriting": ("plan", "rewrite"),
    "fxzip.tracing": ("trace",),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """What used to be found here is found where it is now."""
    for module, names in _MOVED.items():
        if name in names:
            warnings.warn(f"`fxzip.{name}` has moved: use `{module}.{name}`.", DeprecationWarning, stacklevel=2)
            return getattr(importlib.import_module(module), name)

    if name in LEFT:
        raise AttributeError(LEFT[name])

    raise AttributeError(f"module 'fxzip' has no attribute {name!r}")

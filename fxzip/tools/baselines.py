"""Methods and refits to compare with, `fxzip.baselines`: published ones beside those that a user decides between.

>>> import fxzip
>>> fxzip.baselines.KMeans(rounds=10)
KMeans(rounds=10)

They go in by name, too (`method="kmeans"`, `refit="regmean"`). `fxzip.matching.ENTRIES` says of each where it is from,
what it needs, and what its figures are (`docs/methods.md` shows the table).
"""

from ..matching.activations.clustering import Agglomerative, KMeans
from ..matching.activations.optimal import Optimal
from ..matching.activations.recover import Recover
from ..matching.activations.transport import Transport
from ..matching.task_vectors.arithmetic import TaskArithmetic
from ..matching.task_vectors.singular import TSV, IsoC
from ..matching.task_vectors.ties import Ties
from ..matching.weights.cycle_consistent import CycleConsistent
from ..matching.weights.dual_space import MuDSC
from ..refit.regmean import RegMean, RegMeanPlusPlus
from ..refit.statistics.batchnorm import reset_batchnorm

__all__ = [
    "TSV",
    "Agglomerative",
    "CycleConsistent",
    "IsoC",
    "KMeans",
    "MuDSC",
    "Optimal",
    "Recover",
    "RegMean",
    "RegMeanPlusPlus",
    "TaskArithmetic",
    "Ties",
    "Transport",
    "reset_batchnorm",
]

"""Matching: from what was observed of a feature space to its change of basis, `Merge(M, U)`. Knows nothing of graphs.

>>> METHODS["zip"]().relabelling(), ENTRIES["zip"].source
(Permute(), 'arXiv 2305.03053')

A method is a small frozen dataclass, a subclass of `SpaceMethod` that is called with the moments of one space and the
number of features to keep, or of `Method` itself, whose `match(problem)` sees all spaces together, and their weights
if it `needs` them. To use one of your own, pass an instance, or give it a name, `METHODS["mine"] = First`:

    @dataclass(frozen=True)
    class First(SpaceMethod):
        name: ClassVar[str] = "first"

        def __call__(self, moments, size):  # the first model's features, in the place of the nearest of the others
            alike, eye = similarity(moments), torch.eye(size, sum(moments.sizes)).double()
            return Merge(eye, eye[:, :size][alike[:, :size].argmax(1)], moments.sizes, 1.0)
"""

from __future__ import annotations

from .activations.average import Average
from .activations.clustering import Agglomerative, KMeans
from .activations.optimal import Optimal
from .activations.permute import Permute
from .activations.recover import Recover
from .activations.transport import Transport
from .activations.zipit import Zip
from .blockwise import BlockMoments, match_blocks
from .energy.energy import Energy
from .merge import Entries, Merge
from .method import Method, SpaceMethod
from .moments import Moments
from .problem import Problem, Run, Space, Weight
from .registry import ENTRIES, FIRST_CLASS, METHODS, Entry, resolve
from .similarities import similarity
from .task_vectors.arithmetic import TaskArithmetic
from .task_vectors.method import Parameter, TaskVectorMethod
from .task_vectors.singular import TSV, IsoC
from .task_vectors.ties import Ties
from .unseen import match_unseen
from .weight_marks import marks
from .weights.cycle_consistent import CycleConsistent
from .weights.dual_space import MuDSC
from .weights.weight_matching import WeightMatching

__all__ = [
    "ENTRIES",
    "FIRST_CLASS",
    "METHODS",
    "TSV",
    "Agglomerative",
    "Average",
    "BlockMoments",
    "CycleConsistent",
    "Energy",
    "Entries",
    "Entry",
    "IsoC",
    "KMeans",
    "Merge",
    "Method",
    "Moments",
    "MuDSC",
    "Optimal",
    "Parameter",
    "Permute",
    "Problem",
    "Recover",
    "Run",
    "Space",
    "SpaceMethod",
    "TaskArithmetic",
    "TaskVectorMethod",
    "Ties",
    "Transport",
    "Weight",
    "WeightMatching",
    "Zip",
    "marks",
    "match_blocks",
    "match_unseen",
    "resolve",
    "similarity",
]

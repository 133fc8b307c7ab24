"""Matching: from what was observed of a feature space to its change of basis, `Merge(M, U)`. Knows nothing of graphs.

A method is a small frozen dataclass. It sees one space at a time and is called with `(moments, size)` (see `Method`),
or it has `match(problem)` and sees all spaces, and the weights if it `needs` them (see `JointMethod`). To add one,
write it and either pass an instance or enter it under a name, `METHODS["mine"] = Mine`:

    @dataclass(frozen=True)
    class First:
        name: ClassVar[str] = "first"

        def __call__(self, moments, size):  # the first model's features, in the place of the nearest of the others
            alike, eye = similarity(moments), torch.eye(size, sum(moments.sizes)).double()
            return Merge(eye, eye[:, :size][alike[:, :size].argmax(1)], moments.sizes, 1.0)

        def relabelling(self):  # the method where only relabellings are legal
            return Permute()
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from ..errors import OptionError
from .activations.average import Average
from .activations.cca import CCA
from .activations.clustering import Agglomerative, KMeans
from .activations.optimal import Optimal
from .activations.permute import Permute
from .activations.recover import Recover
from .activations.transport import Transport
from .activations.zipit import Zip
from .blockwise import BlockMoments, match_blocks
from .energy.energy import Energy
from .merge import Entries, Merge, Method, similarity
from .problem import JointMethod, Problem, Run, Space, Weight, match_spaces, needs
from .unseen import match_unseen
from .weight_marks import marks
from .weights.cycle_consistent import CycleConsistent
from .weights.dual_space import MuDSC
from .weights.weight_matching import WeightMatching

METHODS: dict[str, Callable[[], Method | JointMethod]] = {
    "zip": Zip,
    "permute": Permute,
    "average": Average,
    "energy": Energy,
    "weights": WeightMatching,
    "c2m3": CycleConsistent,
    "mudsc": MuDSC,
    "transport": Transport,
    "cca": CCA,
    "optimal": Optimal,
    "kmeans": KMeans,
    "agglomerative": Agglomerative,
    "recover": Recover,
}
"""The methods that have a name, with their default settings."""
FIRST_CLASS = ("energy", "zip", "permute", "weights", "average")
"""Those that a user decides between; the others are there to compare with."""


def resolve(method: str | Method | JointMethod) -> Method | JointMethod:
    """The method of that name, or the method itself.

    >>> resolve("zip")
    Zip(alpha=1.0, beta=1.0)
    >>> resolve(Zip(alpha=0.1, beta=0.5))
    Zip(alpha=0.1, beta=0.5)

    Raises:
        OptionError: the name is unknown, or `method` is neither a name nor a method.
    """
    if isinstance(method, str):
        if method in METHODS:
            return METHODS[method]()
        near = difflib.get_close_matches(method, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise OptionError(f"`method` must be one of {', '.join(map(repr, METHODS))}; got {method!r}.{hint}")
    joint = callable(getattr(method, "match", None))
    if isinstance(method, type) or not (callable(method) or joint) or not hasattr(method, "relabelling"):
        raise OptionError(
            f"`method` must be a name or a method with its settings, such as `Zip(alpha=0.1)`; got `{method!r}`."
        )
    return method


__all__ = [
    "CCA",
    "FIRST_CLASS",
    "METHODS",
    "Agglomerative",
    "Average",
    "BlockMoments",
    "CycleConsistent",
    "Energy",
    "Entries",
    "JointMethod",
    "KMeans",
    "Merge",
    "Method",
    "MuDSC",
    "Optimal",
    "Permute",
    "Problem",
    "Recover",
    "Run",
    "Space",
    "Transport",
    "Weight",
    "WeightMatching",
    "Zip",
    "marks",
    "match_blocks",
    "match_spaces",
    "match_unseen",
    "needs",
    "resolve",
    "similarity",
]

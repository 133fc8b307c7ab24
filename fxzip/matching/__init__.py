"""Matching: from the moments of one feature space to its change of basis, `Merge(M, U)`. Knows nothing of graphs.

A method is a small frozen dataclass, called with `(moments, size)`. To add one, write it (see `Method`) and either
pass an instance or enter it under a name: `METHODS["mine"] = Mine`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from fxzip.errors import InputError
from fxzip.matching.average import Average
from fxzip.matching.blockwise import BlockMoments, match_blocks
from fxzip.matching.merge import Merge, Method, similarity
from fxzip.matching.permute import Permute
from fxzip.matching.problem import JointMethod, Problem, Run, Space, Weight, match_spaces, needs
from fxzip.matching.weights import WeightMatching
from fxzip.matching.zipping import Zip

METHODS: dict[str, Callable[[], Method | JointMethod]] = {
    "zip": Zip,
    "permute": Permute,
    "average": Average,
    "weights": WeightMatching,
}
"""The methods that have a name, with their default settings."""


def resolve(method: str | Method | JointMethod) -> Method | JointMethod:
    """The method of that name, or the method itself.

    >>> resolve("zip")
    Zip(alpha=1.0, beta=1.0)
    >>> resolve(Zip(alpha=0.1, beta=0.5))
    Zip(alpha=0.1, beta=0.5)

    Raises:
        InputError: the name is unknown, or `method` is neither a name nor a method.
    """
    if isinstance(method, str):
        if method in METHODS:
            return METHODS[method]()
        near = difflib.get_close_matches(method, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"`method` must be one of {', '.join(map(repr, METHODS))}; got {method!r}.{hint}")
    joint = callable(getattr(method, "match", None))
    if isinstance(method, type) or not (callable(method) or joint) or not hasattr(method, "relabelling"):
        raise InputError(
            f"`method` must be a name or a method with its settings, such as `Zip(alpha=0.1)`; got `{method!r}`."
        )
    return method


__all__ = [
    "METHODS",
    "Average",
    "BlockMoments",
    "JointMethod",
    "Merge",
    "Method",
    "Permute",
    "Problem",
    "Run",
    "Space",
    "Weight",
    "WeightMatching",
    "Zip",
    "match_blocks",
    "match_spaces",
    "needs",
    "resolve",
    "similarity",
]

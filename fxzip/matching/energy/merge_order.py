"""The order in which `Elimination` merges features, kept: what it does on the way to few features it does first on the
way to fewer. So one run serves all widths that are tried, and the curve of what is lost with each of them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .clusterwise import Floats, Ints
from .elimination import Elimination, Step


@dataclass(frozen=True, eq=False)
class MergeOrder:
    """Steps of an `Elimination`, from all features on.

    Attributes:
        features: how many there are.
        steps: as far as they are known.
    """

    features: int
    steps: tuple[Step, ...]

    def clusters(self, size: int) -> tuple[Ints, Floats]:
        """With so many clusters left: the cluster of each feature, and its coefficient there; [features] both.

        >>> MergeOrder(3, (Step(2, 0, 0.5, 2.0, 0.1),)).clusters(2)
        (array([0, 1, 0]), array([0.5, 1. , 0.5]))
        """
        cluster: Ints = np.arange(self.features)
        coefficients = np.ones(self.features)
        for step in self.steps[: max(self.features - size, 0)]:
            step.apply(cluster, coefficients)
        return cluster, coefficients


_MOST = 512
_known: OrderedDict[bytes, MergeOrder] = OrderedDict()
"""The orders that were asked for last, by the matrices that they follow from; each takes some bytes per feature."""
_lock = threading.Lock()


def merge_order(
    alike: Floats, correlation: Floats, G: Floats, ridge: float, size: int, P: Callable[[], Floats]
) -> MergeOrder:
    """The order of merging features until so many are left, or fewer.

    Args:
        alike, G: see `Elimination` and `energy.py`.
        correlation, ridge: what P follows from.
        size: how many features are to be left, at least 1.
        P: makes the matrix of that name, if it is needed.
    """
    content = hashlib.blake2b(repr((alike.shape, ridge)).encode(), digest_size=16)
    for matrix in (alike, correlation, G):
        content.update(np.ascontiguousarray(matrix).data)
    key, features = content.digest(), len(alike)

    with _lock:
        found = _known.get(key)
    if found is None or len(found.steps) < features - size:
        loop = Elimination(alike, P(), G)
        for _ in range(features - size):
            loop.step()
        found = MergeOrder(features, tuple(loop.done))

    with _lock:
        _known[key] = found
        _known.move_to_end(key)
        while len(_known) > _MOST:
            _known.popitem(last=False)
    return found

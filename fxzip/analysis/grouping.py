"""Classes, and units of one kind, are grouped into feature spaces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .roles import Roles
from .rules import Constraints
from .solver import Ints, Solver, Unit

_DUAL = "two activations are multiplied and summed over it: both sides share one map"
_BOTH = "one parameter writes it and is summed over along it: both at once only a relabelling can be"
_BENT = "weights that sum over it are a function of parameters that is not linear"
_TIED = "its features move in whole blocks"

Legality = Literal["free", "blockwise", "relabel only", "pinned"]
"""What may be done with the features of a space, see `FeatureSpace`."""


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """Features that may change places with one another.

    Attributes:
        name: the parameter that writes the features first.
        classes: class numbers, shape [n]; the features' order is that of this array.
        legality: "free", "blockwise" (whole blocks first, then inside a block), "relabel only" (averaging clusters
            would not be exact even through linear calls: q and k of a head, a kernel and its transpose), or "pinned".
        reason: why it is not free.
        tie: number of the tie group whose blocks move together, or None.
        blocks: feature numbers, shape [blocks, features per block], or None.
    """

    name: str
    classes: Tensor
    legality: Legality
    reason: str = ""
    tie: int | None = None
    blocks: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.classes)


class Grouping:
    """Groups classes, and units of one kind, into spaces, one after another."""

    def __init__(self, solver: Solver, constraints: Sequence[Constraints], roles: Roles) -> None:
        self.spaces: list[FeatureSpace] = []
        self.space_of, self.feature_of, self.tie_of = (
            torch.full((solver.count,), -1, device="cpu") for _ in range(3)
        )  # of each class
        self._roles, self._dual = roles, np.zeros(solver.count, bool)
        for labels in (labels for stated in constraints for how, labels in stated.touched if how == "dual"):
            self._dual[solver.klass[labels.numpy()]] = True

    def add(self, classes: Ints, tie: int | None = None, blocks: Tensor | None = None) -> None:
        """A space of these classes, if a parameter has them."""
        named = self._roles.name(classes)
        if named is None:
            return

        index = torch.from_numpy(classes)
        self.space_of[index], self.feature_of[index] = len(self.spaces), torch.arange(len(classes), device="cpu")
        legality, reason = self._legality(classes, tie)
        self.spaces.append(FeatureSpace(named, index, legality, reason, tie, blocks))

    def add_tied(self, tie: int, family: Sequence[Unit]) -> None:
        """Spaces of units of one kind, whose blocks move together: one for each cell, and one for the units."""
        for cell in range(len(family[0].members)):
            rows = np.array([unit.members[cell][1] for unit in family], np.int64)
            order = np.argsort(rows, axis=None)
            places = np.empty(rows.size, np.int64)
            places[order] = np.arange(rows.size)
            self.add(rows.reshape(-1)[order], tie, torch.from_numpy(places.reshape(rows.shape)))

        roots, numbers = np.array([unit.root for unit in family]), torch.arange(len(family), device="cpu")
        self.add(roots, tie, numbers[:, None])
        if int(self.space_of[roots[0]]) < 0:
            index = torch.from_numpy(roots)
            self.tie_of[index], self.feature_of[index] = tie, numbers

    def _legality(self, classes: Ints, tie: int | None) -> tuple[Legality, str]:
        """What may be done with these classes, and why no more."""
        if self._dual[classes].any():
            return "relabel only", _DUAL
        if self._roles.both[classes].any():
            return "relabel only", _BOTH
        if self._roles.bent[classes].any():
            return "relabel only", _BENT
        return ("free", "") if tie is None else ("blockwise", _TIED)


def families(units: Sequence[Unit], fingerprints: Ints) -> list[list[Unit]]:
    """Units of one kind together, in the order of their features."""
    found: dict[tuple[object, ...], list[Unit]] = defaultdict(list)
    for unit in units:
        found[int(fingerprints[unit.root]), unit.kind].append(unit)
    return [sorted(family, key=lambda unit: unit.members[0][1]) for family in found.values()]


def singles(roles: Roles, solver: Solver, fingerprints: Ints, units: Sequence[Unit]) -> list[Ints]:
    """The classes that a parameter writes and that move on their own, by kind, in order."""
    alone = (roles.first < len(roles.names)) & (solver.pinned == 0)
    alone[[c for unit in units for c in unit.classes]] = False
    classes = np.flatnonzero(alone)
    _, start, which = np.unique(fingerprints[classes], return_index=True, return_inverse=True)
    order = np.argsort(start[which], kind="stable")
    return np.split(classes[order], np.flatnonzero(np.diff(start[which][order])) + 1) if classes.size else []

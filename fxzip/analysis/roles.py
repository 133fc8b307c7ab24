"""What the parameters do with each class: which of them write it, and which sum over it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .labelling import Labelling
from .rules import Constraints
from .solver import Ints, Solver


@dataclass(frozen=True)
class Roles:
    """What parameters have to do with classes.

    Attributes:
        consumed: the parameter axes that are summed over against activations, as (parameter, field number). One that
            writes features as well (a kernel and its transpose) counts as written.
        both: classes on an axis of that sort: what is summed over takes U, what is written M, and one parameter is
            both only if MᵀM = I up to a factor.
        bent: classes that weights sum over which are computed from a parameter by a function that is not linear: f(w₁)
            + f(w₂) is not f(w₁ + w₂), so that here too only a relabelling is exact.
        names: of the parameters, and of what enters.
        first: for each class the number of the first name that has it on another axis, `len(names)` if none has.
        named: the same, or if there is none the first that has it on a consumed axis.

    Classes that no call uses (rows of a position table beyond the sample's length) are left out: they are no features.
    """

    consumed: frozenset[tuple[str, int]]
    names: tuple[str, ...]
    first: Ints
    named: Ints
    both: NDArray[np.bool_]
    bent: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        labelling: Labelling,
        solver: Solver,
        constraints: Sequence[Constraints],
        params: Collection[str],
        written: Mapping[str, Sequence[Tensor]],
    ) -> Roles:
        unmerged, used = np.zeros(labelling.size, bool), np.zeros(solver.count, bool)
        writes, both = np.zeros(labelling.size, bool), np.zeros(solver.count, bool)
        curved, bent = np.zeros(labelling.size, bool), np.zeros(solver.count, bool)

        for stated in constraints:
            for how, labels in stated.touched:
                if how in ("param", "bent"):
                    (writes if how == "param" else curved)[labels.numpy()] = True
            for labels in stated.consumed:
                unmerged[labels.numpy()] = True
            for labels in (*stated.consumed, *(labels for how, labels in stated.touched if how != "bent")):
                used[solver.klass[labels.numpy()]] = True
        blocks, members = solver.free_edges()
        used[blocks[used[members]]] = True  # of a block, what uses its members may be all that uses it

        names = (*(name for name in labelling.params if name in params), *written)
        first, summed = np.full(solver.count, len(names)), np.full(solver.count, len(names))

        consumed: set[tuple[str, int]] = set()
        for number, name in reversed(list(enumerate(names))):  # the first one stays
            entering = number >= len(names) - len(written)
            for place, labels in enumerate(written[name] if entering else labelling.params[name].fields):
                flat = labels.reshape(-1).numpy()
                flat = flat[flat > 0]
                classes = solver.klass[flat]
                summed_over = bool(unmerged[flat].any())
                if summed_over and writes[flat].any():
                    both[classes[used[classes]]] = True
                if summed_over and curved[flat].any():
                    bent[classes[used[classes]]] = True
                if entering:
                    first[classes] = number
                elif summed_over and not writes[flat].any():
                    consumed.add((name, place))
                    summed[classes[used[classes]]] = number
                else:
                    first[classes[used[classes]]] = number

        return cls(frozenset(consumed), names, first, np.where(first < len(names), first, summed), both, bent)

    def name(self, classes: Ints) -> str | None:
        """The name by which features are called, None if nothing has them: that of the first class which has one."""
        for found in (self.first, self.named):
            numbers = found[classes]
            numbers = numbers[numbers < len(self.names)]
            if numbers.size:
                return self.names[int(numbers[0])]
        return None

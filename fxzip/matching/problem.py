"""All spaces of a trunk at once, with the evidence for matching them: moments of features, and weights.

Methods that look at one space at a time see its `Moments`. Methods that look at weights see every parameter of every
model, because how well features of one space fit depends on how the spaces on the other axes are matched. A parameter
W has *runs*, labelled axes; along a run sit the features of one space or of several (a concatenation), each once or
several times (the positions of a flattened image), and places that carry no feature.

With p_k[s][i] the feature of model k that takes the place of feature i of model 0 in space s (-1: none), `aligned`
brings W_k into model 0's layout along all runs or all but one:  (W_k)[..., p_k(i), ...] at place i.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .moments import Moments

Evidence = Literal["moments", "weights", "downstream"]
"""What a method may ask for: what the data showed, all parameters of the trunk, the weights that read each space."""

Assignment = Mapping[int, Tensor]
"""For one model: space -> int64 [n_0], its feature in the place of each feature of model 0, -1 for none."""


@dataclass(frozen=True, eq=False)
class Space:
    """One feature space of K models.

    Attributes:
        sizes: (n_1, ..., n_K).
        legality: "free", "blockwise", or "relabel only" (see `fxzip.analysis`).
        tie: number of the tie group whose blocks move together, or None.
        blocks: for every model the features of its blocks, int64 [n_blocks, s_k]; empty without a tie.
        moments: what was observed; None if nothing was.
        downstream: for every model the weights of each parameter that sums over the space, [outputs, taps, n_k]; empty
            unless the method `needs` them.
        kept: how many features to keep; 0: those of the first model.
    """

    sizes: tuple[int, ...]
    legality: str = "free"
    tie: int | None = None
    blocks: tuple[Tensor, ...] = ()
    moments: Moments | None = None
    downstream: tuple[tuple[Tensor, ...], ...] = ()
    kept: int = 0

    @property
    def size(self) -> int:
        """How many features are to be kept."""
        return self.kept or self.sizes[0]


@dataclass(frozen=True, eq=False)
class Run:
    """A labelled axis of one parameter, in all models; its places are where the parameter is.

    Attributes:
        axis: which axis; of a grouped kernel axis 1 stands for (group, axis 1).
        slots: space -> for every model the places of its features, int64 [occurrences, n_k].
        rest: for every model the places that carry no feature of any space.
        summed: whether activations are summed over along it, so that it takes U.
    """

    axis: int
    slots: Mapping[int, tuple[Tensor, ...]]
    rest: tuple[Tensor, ...]
    summed: bool = False

    def source(self, k: int, assignment: Assignment) -> Tensor:
        """For each place of model 0's run the place of model k's that goes there, -1 for none.

        >>> run = Run(0, {7: (torch.tensor([[1, 2]]), torch.tensor([[0, 1]]))}, (torch.tensor([0]), torch.tensor([2])))
        >>> run.source(1, {7: torch.tensor([1, 0])})
        tensor([2, 1, 0])
        """
        width = self.rest[0].numel() + sum(slots[0].numel() for slots in self.slots.values())
        source = torch.full((width,), -1, device=self.rest[0].device)
        source[self.rest[0]] = self.rest[k]
        for space, slots in self.slots.items():
            own = assignment[space].to(source.device)
            source[slots[0]] = torch.where(own >= 0, slots[k][:, own.clamp(min=0)], -1)
        return source

    def to(self, device: torch.device) -> Run:
        """The same with its places on a device."""
        slots = {space: tuple(own.to(device) for own in found) for space, found in self.slots.items()}
        return replace(self, slots=slots, rest=tuple(own.to(device) for own in self.rest))


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter of the trunk, in all models: `values[k]` with the same axes, in floating point.

    A grouped kernel [O, C / groups, ...] whose groups are blocks of a tie group is kept as it is (`groups` > 1); other
    ones come in their dense form.
    """

    name: str
    values: tuple[Tensor, ...]
    runs: tuple[Run, ...]
    groups: int = 1

    @property
    def spaces(self) -> frozenset[int]:
        """The spaces on its runs."""
        return frozenset(space for run in self.runs for space in run.slots)

    def aligned(self, k: int, assignment: Assignment, skip: Run | None = None) -> Tensor:
        """Model k's value in model 0's layout, except along `skip`; 0 where model k has nothing to put."""
        value = self.values[k]
        if self.groups > 1:
            return self._aligned_groups(value, *(run.source(k, assignment) for run in self.runs))
        for run in self.runs:
            if run is not skip:
                value = _taken(value, run.axis, run.source(k, assignment))
        return value

    def _aligned_groups(self, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        height, width = len(rows) // self.groups, len(columns) // self.groups
        own = value.shape[0] // self.groups, value.shape[1]
        columns = columns.reshape(self.groups, width).repeat_interleave(height, 0)
        there = (rows[:, None] >= 0) & (columns >= 0) & (rows[:, None] // own[0] == columns // own[1])
        result = value[rows.clamp(min=0)[:, None], columns.clamp(min=0) % own[1]]
        return result * there.reshape(*there.shape, *[1] * (value.ndim - 2)).to(value.dtype)


def _taken(value: Tensor, axis: int, source: Tensor) -> Tensor:
    """Places `source` of an axis, zeros for -1."""
    taken = value.index_select(axis, source.clamp(min=0))
    missing = source < 0
    if bool(missing.any()):
        shape = [1] * value.ndim
        shape[axis] = -1
        taken = taken * (~missing).to(value.dtype).reshape(shape)
    return taken


@dataclass(frozen=True, eq=False)
class Problem:
    """What a method that matches all spaces together gets to see.

    Attributes:
        spaces: by number.
        weights: parameters of the trunk, BatchNorms folded away; empty unless the method `needs` weights.
    """

    spaces: tuple[Space, ...]
    weights: tuple[Weight, ...] = ()

    @property
    def models(self) -> int:
        return len(self.spaces[0].sizes)

    def ties(self) -> list[list[int]]:
        """Space numbers that are matched together: alone, or with the others of their tie group."""
        groups: dict[tuple[str, int], list[int]] = {}
        for number, space in enumerate(self.spaces):
            key = ("alone", number) if space.tie is None else ("tie", space.tie)
            groups.setdefault(key, []).append(number)
        return list(groups.values())

"""Sums of which moments are made, batch by batch, in one process or in several.

Products are taken in the features' own precision, of x - c with a fixed centre c (the first batch's mean), and summed
in float64:  Σ x xᵀ = Σ (x - c)(x - c)ᵀ + c sᵀ + s cᵀ + n c cᵀ  with  s = Σ (x - c).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..matching.moments import SAMPLES, Moments
from . import processes
from .processes import grid

_BLOCK = 128  # rows of a product that are computed at a time: what lies below the diagonal blocks is not


@dataclass
class MomentSums:
    """Moments under way: of x - c, upper blocks of the product only.

    `offsets`: of `total` and `outer`, beside which they are rounded so that their order does not matter (`grid`).
    """

    centre: Tensor
    total: Tensor
    outer: Tensor
    sizes: tuple[int, ...]
    offsets: tuple[float, float]
    count: int = 0
    samples: list[Tensor] = field(default_factory=list)

    @classmethod
    def like(cls, joint: Tensor, sizes: tuple[int, ...]) -> MomentSums:
        n = joint.shape[1]
        zero = torch.zeros(n, n, dtype=torch.float64, device=joint.device)
        centre = joint.mean(0)
        most = (joint - centre).double().square().sum(0).max()
        offsets = grid((most * len(joint)).sqrt()), grid(most)
        return cls(centre, zero[0].clone(), zero, sizes, offsets)

    def add(self, joint: Tensor) -> None:
        """Take in features [positions, n], which are written over."""
        joint -= self.centre
        self.count += len(joint)
        total, outer = self.offsets
        self.total += joint.sum(0).double().add_(total).sub_(total)
        for start in range(0, joint.shape[1], _BLOCK):
            part = (joint[:, start : start + _BLOCK].T @ joint[:, start:]).double()
            self.outer[start : start + _BLOCK, start:] += part.add_(outer).sub_(outer)

    def moments(self) -> Moments:
        outer, c = self.outer, self.centre.double()
        for start in range(0, len(outer), _BLOCK):
            stop = start + _BLOCK
            outer[stop:, start:stop] = outer[start:stop, stop:].T
        outer.addr_(c, self.total).addr_(self.total, c).addr_(c, c, alpha=self.count)
        samples = torch.cat(self.samples)[:SAMPLES] if self.samples else None
        return Moments(float(self.count), self.total + self.count * c, outer, self.sizes, samples)


Centres = dict[int, tuple[Tensor, tuple[int, ...], tuple[float, float]]]
"""Centres, sizes and offsets of sums, by space."""


def share_centres(sums: dict[int, MomentSums]) -> Centres:
    """All processes take the centres of the first, so that each batch's products are those of a single process."""
    centres: Centres = processes.of_first(
        lambda: {space: (own.centre.cpu(), own.sizes, own.offsets) for space, own in sums.items()}
    )
    for space in sums.keys() & centres.keys():
        centre, _, sums[space].offsets = centres[space]
        sums[space].centre = centre.to(sums[space].centre)
    return centres


def moments_of_all(sums: dict[int, MomentSums], centres: Centres) -> dict[int, Moments]:
    """The moments of what all processes have seen."""
    if processes.count() == 1:
        return {space: own.moments() for space, own in sums.items()}
    widths: dict[int, tuple[int, ...]] = {}
    for theirs in processes.everyone({space: own.sizes for space, own in sums.items()}):
        widths = theirs | widths
    device = next((own.outer.device for own in sums.values()), torch.device("cpu"))

    result = {}
    for space, sizes in sorted(widths.items()):
        own = sums.get(space)
        if own is None:
            own = MomentSums.like(torch.zeros(1, sum(sizes), device=device), sizes)
            own.centre = centres[space][0].to(device) if space in centres else own.centre
        alike = space in centres
        found = None if alike else own.moments()  # each about a centre of its own
        total, outer = (own.total, own.outer) if found is None else (found.total, found.outer)
        count = processes.before([own.count])[1][0]
        total, outer = processes.total(total), processes.total(outer)
        drawn = processes.gathered(torch.cat(own.samples) if own.samples else own.centre[None][:0])[:SAMPLES]
        samples = [drawn] if len(drawn) else []
        if alike:
            result[space] = MomentSums(own.centre, total, outer, sizes, own.offsets, count, samples).moments()
        else:
            result[space] = Moments(float(count), total, outer, sizes, drawn if len(drawn) else None)
    return result

"""What the weights around a feature are like, whatever the order of all other features: numbers to tell features apart.

On few inputs features may be constant, silent or affine copies of one another, and nothing that was observed says which
of one model is which of the other. Their weights do. Of each slice of a parameter along the space a few numbers are
taken that no rearrangement of its entries changes: the mean, the root mean square, the third moment, the least and the
greatest entry. They are cheaper than sorted slices (`signatures`), and only have to be different.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import Weight
from .weights.signatures import columns_first


def marks(weights: Sequence[Weight], space: int) -> Tensor | None:
    """Marks of the features of all models side by side, float64 [N, d], standardised; None if no weight has the space.

    >>> from fxzip.matching.problem import Run
    >>> run = Run(0, {0: (torch.arange(2)[None], torch.arange(2)[None])}, (torch.zeros(0).long(),) * 2)
    >>> value = torch.tensor([[3.0, 1.0], [2.0, 5.0]])
    >>> found = marks([Weight("w", (value, value.flip(0)), (run,))], 0)
    >>> torch.equal(found[0], found[3]), torch.equal(found[0], found[2])
    (True, False)
    """
    columns = [
        torch.cat([_numbers(weight, place, space, k) for k in range(len(weight.values))])
        for weight in weights
        for place, run in enumerate(weight.runs)
        if space in run.slots
    ]
    if not columns:
        return None

    joint = torch.cat(columns, 1)
    joint = joint - joint.mean(0)
    return joint / joint.square().mean(0).sqrt().clamp(min=torch.finfo(torch.float64).tiny)


def _numbers(weight: Weight, place: int, space: int, k: int) -> Tensor:
    """[n_k, 5]: of the slices of the features of one model along a run."""
    run, value = weight.runs[place], weight.values[k]
    if weight.groups > 1 and place == 1:
        moved = columns_first(value, weight.groups)
    else:
        moved = value.movedim(run.axis, 0)

    flat = moved.reshape(len(moved), -1)
    wide = flat.double()
    each = torch.stack([wide.mean(1), wide.square().mean(1).sqrt(), wide.pow(3).mean(1), wide.amin(1), wide.amax(1)], 1)

    return each[run.slots[space][k]].mean(0).cpu()

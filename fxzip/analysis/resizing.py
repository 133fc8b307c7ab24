"""Where features would sit along an axis if a feature space had more or fewer of them.

A run of places holds the features of a space in segments: one after the other (channels), each with its occurrences
behind one another (the positions of a flattened image), or all of them again and again (a concatenation with itself).
More features go to the end of every segment, and those that are fewer leave gaps that close.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .spaces import Layout, slots


class IrregularLayoutError(ValueError):
    """Features of a space lie among others, so that there is no telling where one more would go."""


def resized(layout: Layout, sizes: Mapping[int, int]) -> Layout:
    """The layout of the same run when space s has `sizes[s]` features; spaces that are not in it stay as they are.

    Features keep their numbers and their order: of n features and m wanted, those below m stay, and n, ..., m - 1 are
    new.

    >>> row = Layout(torch.tensor([-1, 0, 0, 0, 0]), torch.tensor([-1, 1, 1, 0, 0]), torch.tensor([0, 0, 1, 0, 1]))
    >>> resized(row, {0: 3}).feature.tolist(), resized(row, {0: 1}).feature.tolist()
    ([-1, 1, 1, 0, 0, 2, 2], [-1, 0, 0])

    Raises:
        IrregularLayoutError: features of a space that changes its size lie among others.
    """
    for space, size in sizes.items():
        here = layout.feature[layout.space == space]
        if here.numel() and int(here.max()) + 1 != size:
            layout = _resized(layout, space, size)
    return layout


def _resized(layout: Layout, space: int, size: int) -> Layout:
    starts, inner, order = _segments(layout, space)
    features = torch.cat([order[order < size], torch.arange(len(order), max(len(order), size), device="cpu")])
    length = len(order) * inner
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []

    end = 0
    for number, start in enumerate(starts):
        pieces.append((layout.space[end:start], layout.feature[end:start], layout.occurrence[end:start]))
        own = features.repeat_interleave(inner)
        times = (torch.arange(inner, device="cpu") + number * inner).repeat(len(features))
        pieces.append((torch.full_like(own, space), own, times))
        end = start + length

    pieces.append((layout.space[end:], layout.feature[end:], layout.occurrence[end:]))
    return Layout(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _segments(layout: Layout, space: int) -> tuple[list[int], int, Tensor]:
    """Where the segments of a space start, how many occurrences of a feature stand together, the features' order."""
    here = layout.space == space
    times = int(layout.occurrence[here].max()) + 1
    features = int(layout.feature[here].max()) + 1
    if int(here.sum()) != times * features:
        raise IrregularLayoutError("its features do not occur equally often")

    places = slots(layout, space)
    order = places[0].argsort()
    places = places[:, order]
    steps = (places[1:, 0] - places[:-1, 0] != 1).nonzero().flatten()
    inner = int(steps[0]) + 1 if len(steps) and features > 1 else times
    if times % inner:
        raise IrregularLayoutError("its features do not lie side by side")

    rows = places.reshape(times // inner, inner, features).transpose(1, 2).reshape(times // inner, -1)
    if not torch.equal(rows, rows[:, :1] + torch.arange(rows.shape[1], device="cpu")):
        raise IrregularLayoutError("its features do not lie side by side")

    return rows[:, 0].tolist(), inner, order

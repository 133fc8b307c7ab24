"""Relabellings drawn at random from what an account allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .spaces import Along, Axis, Blocks, Grouped, Order, Space


class Relabelling:
    """One permutation for each space and order, drawn when first asked for."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.orders: dict[Order, np.ndarray] = {}
        self.spaces: dict[Space, np.ndarray] = {}

    def order(self, order: Order) -> np.ndarray:
        root = order.root
        if root not in self.orders:
            self.orders[root] = np.arange(root.count) if root.fixed else self.random.permutation(root.count)
        return self.orders[root]

    def space(self, leaf: Space) -> np.ndarray:
        if leaf not in self.spaces:
            order = self.order(leaf._order)
            count, size = leaf._order.count, leaf.size // leaf._order.count
            inner = [np.arange(size) if leaf._fixed else self.random.permutation(size) for _ in range(count)]
            inner = inner[:1] * count if leaf._alike else inner
            self.spaces[leaf] = np.concatenate([order[b] * size + inner[b] for b in range(count)])
        return self.spaces[leaf]

    def axis(self, along: Axis | Blocks | int) -> np.ndarray:
        """Where on the axis of the original each entry of the copy lies."""
        if isinstance(along, int):
            return np.arange(along)
        if isinstance(along, Blocks):
            return self.order(along.order)
        start, parts = 0, []
        for leaf in along.leaves:
            parts.append(self.space(leaf) + start)
            start += leaf.size
        moved = np.concatenate(parts)
        if along.places is None:
            return moved
        seen: dict[int, int] = {}
        at: dict[tuple[int, int], int] = {}
        turns = []
        for place, feature in enumerate(along.places.tolist()):
            turns.append(seen.get(feature, 0))
            at[feature, turns[-1]] = place
            seen[feature] = turns[-1] + 1
        return np.array([at[int(moved[f]), turn] for f, turn in zip(along.places.tolist(), turns, strict=True)])

    def tensor(self, value: Tensor, axes: Sequence[Along]) -> Tensor:
        for number, along in enumerate(axes):
            if isinstance(along, Grouped):
                value = self._grouped(value, along, axes[0])
            else:
                value = value.index_select(number, torch.from_numpy(self.axis(along)))
        return value

    def _grouped(self, value: Tensor, along: Grouped, other: Along) -> Tensor:
        """The other axis of the kernel, that was moved already, tells which group an entry belongs to."""
        assert isinstance(other, Axis)
        inner, outer = along.size, other.size // along.groups
        places = self.axis(along.axis).reshape(along.groups, inner)
        assert (places // inner == self.axis(other)[::outer, None] // outer).all()
        index = torch.from_numpy(np.repeat(places % inner, outer, 0))
        index = index.reshape(*index.shape, *[1] * (value.ndim - 2)).expand(*index.shape, *value.shape[2:])
        return value.gather(1, index)

"""Samples for a regression: inputs of a call in the zipped network, and what should come out, at random places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..batches import not_finite
from .goals import Goal, Wanted
from .inside import Tail, arguments, find_tail
from .kernels import Places, sampled_places, take, unravelled
from .lockstep import Env, Lockstep
from .survey import Survey
from .units import Site, Unit, called

_RELUS = (F.relu, torch.relu, torch.ops.aten.relu.default)


def row_bytes(inputs: int, outputs: int, itemsize: int) -> int:
    """What a position of a regression takes: inputs as drawn, joined and with a column of ones; targets, summands and
    the originals' features as drawn and joined, what is left of them in float64."""
    return (4 * inputs + 10 * outputs) * itemsize


def sample_bytes(net: nn.Module, positions: int, least: int) -> float:
    """What the samples of the largest regression of a network may take, and its Gram matrix."""
    most = 0.0
    for value in net.parameters():
        if value.ndim > 1 and value.is_floating_point():
            outputs, inputs = len(value), value.numel() // max(len(value), 1)
            row = row_bytes(inputs, outputs, value.element_size())
            most = max(most, max(least, positions * inputs) * row + 16.0 * inputs**2)
    return most


@dataclass(frozen=True, eq=False)
class Sample:
    """One batch's part of a regression.

    Attributes:
        x: inputs, [places, groups, inputs]; for scales and shifts the features themselves, [places, n].
        t: what should come out, [places, n].
        offset: what is added before the ReLU, [places, n], or None.
        rectified: nothing but ReLUs follow.
        batch: number of the batch.
        apart: where other combinations of the features would do, the originals' own, one [places, n_k] for each.
        node: whose features these are, the residual sum's if there is one.
    """

    x: Tensor
    t: Tensor
    offset: Tensor | None
    rectified: bool
    batch: int
    apart: Sequence[Tensor] | None
    node: fx.Node


@dataclass(eq=False)
class Sampler:
    """Draws samples from a zipped network and the originals in lockstep.

    Attributes:
        net: the zipped network.
        numbers: of the batches, for messages.
        positions, least: see `LeastSquares`.
        room: most bytes of the samples of a unit.
        free: whether what reads the result of a node allows other combinations of its features.
    """

    net: Lockstep
    survey: Survey
    numbers: Sequence[int]
    positions: int
    least: int
    room: float
    free: Callable[[fx.Node], bool]
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    tails: dict[Site, bool] = field(default_factory=dict)

    def draw(
        self, unit: Unit, site: Site, batch: int, source: int, envs: Sequence[Env], goal: Goal,
        sums: Callable[[fx.Node], Goal | None],
    ) -> Sample:  # fmt: skip
        """One batch, at one call of a unit. `sums` gives the goal at a residual sum behind it."""
        env = envs[0]
        wanted = goal.on(source, envs[1:])
        tail, total = self._tail(site, env, wanted, goal, sums)
        inputs = unit.kernel.flat.shape[-1] if unit.kernel is not None else 1
        groups = unit.kernel.groups if unit.kernel is not None else 1
        size = unit.kernel.flat.element_size() if unit.kernel is not None else 4
        row = row_bytes(inputs * groups, math.prod(wanted.shape[a] for a in wanted.axes), size)
        wished = min(max(self.least, self.positions * inputs), self.room / row) / (len(self.net) * len(unit.sites))
        places = there = t = offset = None
        last = wanted
        if tail is not None and total is not None:
            last = total.on(source, envs[1:])
            found = self._behind(tail, last, wanted, math.ceil(wished))
            if found is not None:
                places, there, t, offset = found
        if places is None or there is None or t is None:
            tail, last = None, wanted
            places = there = sampled_places(wanted.shape, wanted.axes, math.ceil(wished), self.generator)
            t = wanted.at(places)
        x = self._inputs(unit, site, env, wanted.axes, places)
        for value, network in ((t, "the originals"), (x, "the zipped network")):
            if not bool(value.sum().isfinite()) and (bad := int((~value.flatten(1).isfinite().all(0)).sum())):
                raise not_finite(bad, site.node.name, network, self.numbers[batch])
        node = site.output if tail is None else tail.node
        plain = (site.final or site.norm is not None) if tail is None else tail.scale is None
        apart = last.apart(there) if plain and unit.kernel is not None and self.free(node) else None
        return Sample(x, t, offset, plain and self._meets_relus(node), batch, apart, node)

    def _inputs(self, unit: Unit, site: Site, env: Env, axes: Sequence[int], places: Places) -> Tensor:
        if unit.kernel is None:
            return take(self.net.value(env, site.node), axes, places)
        x: Tensor = arguments(self.net, env, site.node, site.call)[site.at]
        return unit.kernel.patches(x, places)

    def _tail(
        self, site: Site, env: Env, wanted: Wanted, goal: Goal, sums: Callable[[fx.Node], Goal | None]
    ) -> tuple[Tail | None, Goal | None]:
        """The residual sum behind a call, if there is one."""
        if not self.tails.get(site, True):
            return None, None
        whole = site.norm is not None or goal.readings[0].call is None
        start = (site.output, -1) if whole else site.end
        tail = find_tail(self.net, env, self.survey, start, wanted.full)
        total = None if tail is None else sums(tail.node)
        self.tails[site] = total is not None
        return tail, total

    def _behind(
        self, tail: Tail, total: Wanted, wanted: Wanted, count: int
    ) -> tuple[Places, Places, Tensor, Tensor] | None:
        """Places of the call and of the sum, what should come out there for the sum to be right, the other summand.

        None if the features do not come whole and in order.
        """
        if total.shape != tail.index.shape:
            return None
        there = sampled_places(total.shape, total.axes, count, self.generator)
        index = take(tail.index, total.axes, there) - 1
        kept = (index >= 0).all(1)
        index = index[kept]
        coordinates = unravelled(index, wanted.shape)
        places = tuple(c[:, 0] for a, c in enumerate(coordinates) if a not in wanted.axes)
        own = torch.stack([c for a, c in enumerate(coordinates) if a not in wanted.axes])
        feature = torch.zeros_like(index)
        for axis in wanted.axes:
            feature = feature * wanted.shape[axis] + coordinates[axis]
        order = torch.arange(index.shape[1], device=index.device)
        if not len(index) or not bool((own == own[:, :, :1]).all()) or not bool((feature == order).all()):
            return None
        there = tuple(place.to(kept.device)[kept] for place in there)
        offset = take(tail.other, total.axes, there)
        t = total.at(there) - offset
        if tail.scale is not None:
            scale = take(tail.scale, total.axes, there)
            if not bool((scale.abs() > 1e-3 * scale.abs().mean()).all()):
                return None
            t = t / scale
        return places, there, t, offset

    def _meets_relus(self, node: fx.Node) -> bool:
        net = self.net.module
        users = list(node.users)
        return bool(users) and all(_is_relu(net, user) for user in users)


def _is_relu(net: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return isinstance(called(net, node), nn.ReLU) or (node.op == "call_function" and node.target in _RELUS)

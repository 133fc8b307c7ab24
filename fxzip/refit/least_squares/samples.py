"""Samples for a regression: inputs of a call in the zipped network, and what should come out, at random places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...calibration.rejections import not_finite
from ..linear_calls.kernels import Kernel, Places, as_rows, effective, sampled_places, take
from ..linear_calls.parameter_uses import Survey
from ..linear_calls.units import Site, Unit, called
from ..unfit import Unfit
from .dataflow import Function
from .footprint import MOST, row_bytes
from .lockstep import Lockstep
from .node_interior import Route, Tail, arguments, find_tail, result
from .regression_targets import RegressionTarget, TargetValues
from .spill_file import Page, SpillFile, fetched
from .spilling import Env

_Targets = Callable[[fx.Node], "RegressionTarget | None"]

_RELUS = (F.relu, torch.relu, torch.ops.aten.relu.default)
_CHECKED = 256  # places at which it is checked that a call computes what its kernel says
_NEAR = 0.02  # relative; rounding in half precision, where another order of places gives 1


@dataclass(frozen=True, eq=False)
class Sample:
    """One batch's part of a regression.

    Attributes:
        x: inputs, [places, groups, inputs]; for scales and shifts the features themselves, [places, n].
        t: what should come out, [places, n].
        offset: what is added before the ReLU, [places, n], or None.
        rectified: nothing but ReLUs follow.
        batch: number of the batch, among those of all processes; None: there is no other.
        apart: where other combinations of the features would do, the originals' own, of all models side by side and
            behind what acts on them, [places, N].
        node: whose features these are, the residual sum's if there is one.
    """

    x: Tensor | Page
    t: Tensor | Page
    offset: Tensor | Page | None
    rectified: bool
    batch: int | None
    apart: Tensor | Page | None
    node: fx.Node

    def on(self, file: SpillFile) -> Sample:
        """The same on the file."""
        offset, apart = (None if own is None else Page.of(file, fetched(own)) for own in (self.offset, self.apart))
        x, t = (Page.of(file, fetched(own)) for own in (self.x, self.t))
        return replace(self, x=x, t=t, offset=offset, apart=apart)


@dataclass(frozen=True, eq=False)
class _Draw:
    """Where a sample is taken.

    Attributes:
        places: of the call's result.
        there: the places of `last` that these become.
        t: what should come out, [places, n].
        offset: what a residual sum adds, or None.
        last: what should come out of the call, or of the sum behind it.
        apart: the originals' own features there, not merged, one [places, n_k] for each.
        node: whose result that is.
        plain: whether the features are those that the call gives, scaled by nothing.
    """

    places: Places
    there: Places
    t: Tensor
    offset: Tensor | None
    last: TargetValues
    apart: Sequence[Tensor]
    node: fx.Node
    plain: bool


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch in all networks.

    Attributes:
        number: among those of this process.
        source: the source of data that it is from.
        zipped: the values of the zipped network's nodes on it.
        originals: those of the originals that have the target.
    """

    number: int
    source: int
    zipped: Env
    originals: Sequence[Env]


@dataclass(eq=False)
class Sampler:
    """Draws samples from a zipped network and the originals in lockstep.

    Attributes:
        net: the zipped network.
        numbers: of the batches of this process, among those of all.
        batches: how many there are, of all processes.
        positions, least: see `LeastSquares`.
        acts: what is done to each feature of a node's result before it is read, where all that reads it allows other
            combinations of the features; None elsewhere.
        trial: whether this is but a trial on the sample, which says nothing of the values.
    """

    net: Lockstep
    survey: Survey
    numbers: Sequence[int]
    batches: int
    positions: int
    least: int
    acts: Callable[[fx.Node], Function | None]
    trial: bool = False
    generator: torch.Generator = field(default_factory=torch.Generator)
    tails: dict[Site, bool] = field(default_factory=dict)
    routes: dict[tuple[Site, torch.Size], Route] = field(default_factory=dict)
    checked: set[tuple[Site, torch.Size]] = field(default_factory=set)

    def begin(self) -> None:
        """What is drawn next is for another unit: how results reached sums is of no use any more."""
        self.routes.clear()

    def seed(self, unit: int, batch: int) -> None:
        """What is drawn next is for a unit of that number, on a batch of this process: the same whoever has it."""
        self.generator.manual_seed((unit << 24) + self.numbers[batch])

    def draw(self, unit: Unit, site: Site, batch: Batch, target: RegressionTarget, sums: _Targets) -> Sample:
        """One batch, at one call of a unit. `sums` gives the target at a residual sum behind it.

        Raises:
            Unfit: the call does not compute what its kernel says, or the originals have no such values.
            DataError: values are not finite.
        """
        env = batch.zipped
        values = target.on(batch.source, batch.originals)
        scratch = dict(env)  # what is computed ahead to be looked at is forgotten
        own = self._result(site, scratch, values, target)
        seen = None if own is None else _matching(as_rows(own) if target.flat else own, values)
        inputs = unit.kernel.flat.shape[-1] if unit.kernel is not None else 1
        groups = unit.kernel.groups if unit.kernel is not None else 1
        size = unit.kernel.flat.element_size() if unit.kernel is not None else 4
        row = row_bytes(inputs * groups, math.prod(values.shape[a] for a in values.axes), size)
        wished = min(max(self.least, self.positions * inputs), MOST / row)
        count = math.ceil(wished / (self.batches * len(unit.sites)))
        tail, total = self._tail(site, env, scratch, values.full if own is None else own.shape, target, sums)
        drawn = None
        if tail is not None and total is not None:
            drawn = self._behind(tail, total.on(batch.source, batch.originals), values, count)
            if drawn is not None and seen is not None and not self._adds(tail, drawn, scratch, values, seen):
                drawn, self.tails[site] = None, False
        scratch.clear()
        if drawn is None:
            places = sampled_places(values.shape, values.axes, count, self.generator, values.device)
            plain = site.returned is not None or site.norm is not None
            apart = values.apart(places)
            drawn = _Draw(places, places, values.merged(apart), None, values, apart, site.output, plain)
        x = self._inputs(unit, site, env, values.axes, drawn.places)
        if seen is not None and unit.kernel is not None:
            self._check(unit, unit.kernel, x[:_CHECKED], take(seen, values.axes, _first(drawn.places)))
        for value, network in ((drawn.t, "the originals"), (x, "the zipped network")):
            if self.trial or bool(value.sum().isfinite()):
                continue
            if bad := int((~value.flatten(1).isfinite().all(0)).sum()):
                raise not_finite(bad, site.node.name, network, self.numbers[batch.number])
        act = self.acts(drawn.node) if drawn.plain and unit.kernel is not None else None
        acted = None if act is None else act(torch.cat(list(drawn.apart), 1))
        relus = drawn.plain and self._meets_relus(drawn.node)
        number = self.numbers[batch.number] if self.batches > 1 else None
        return Sample(x, drawn.t, drawn.offset, relus, number, acted, drawn.node)

    def _inputs(self, unit: Unit, site: Site, env: Env, axes: Sequence[int], places: Places) -> Tensor:
        if unit.kernel is None:
            return take(self.net.value(env, site.node), axes, places)
        x: Tensor = arguments(self.net, env, site.node, site.call, site.name)[site.at]
        return unit.kernel.patches(x, places)

    def _result(self, site: Site, scratch: Env, values: TargetValues, target: RegressionTarget) -> Tensor | None:
        """What the zipped network gives at the target; None where that was looked at before, on a batch of any size."""
        inner = target.readings[0].call is not None
        if (site, values.full[1:]) in self.checked and not inner:
            return None
        self.checked.add((site, values.full[1:]))
        return (
            result(self.net, scratch, *site.end, site.end_name)
            if inner
            else _tensor(self.net.value(scratch, site.output))
        )

    def _check(self, unit: Unit, kernel: Kernel, x: Tensor, y: Tensor) -> None:
        """Whether the call computes what its kernel says."""
        flat, bias = effective(kernel, None if unit.norm is None else called(self.net.module, unit.norm))
        if not _near(torch.einsum("pgd,gnd->pgn", x.double(), flat).flatten(1) + bias, y):
            raise Unfit("what it returns is more than a product with its weight, or lies in another order")

    def _tail(
        self, site: Site, env: Env, scratch: Env, shape: torch.Size, target: RegressionTarget, sums: _Targets
    ) -> tuple[Tail | None, RegressionTarget | None]:
        """The residual sum behind a call, if there is one. `shape`: of what the call gives."""
        if not self.tails.get(site, True):
            return None, None
        route = self._route(site, shape)
        if route is not None and route.summand is not None:  # on a batch of that shape it is the same
            return Tail(route, _tensor(self.net.value(env, route.summand))), sums(route.node)
        start = (site.output, -1) if target.readings[0].call is None else site.end
        tail = find_tail(self.net, scratch, self.survey, start, shape)
        total = None if tail is None else sums(tail.route.node)
        self.tails[site] = total is not None
        if tail is not None:
            self.routes[site, shape] = tail.route
        return tail, total

    def _route(self, site: Site, shape: torch.Size) -> Route | None:
        """How a result of that shape reaches a sum, as seen on a batch; of another size if it is moved nowhere."""
        if (site, shape) not in self.routes:
            known = (own for (other, seen), own in self.routes.items() if other == site and seen[1:] == shape[1:])
            straight = next((own for own in known if own.straight and own.scale is None), None)
            if straight is not None:
                index = torch.arange(1, shape.numel() + 1, device=straight.index.device)
                self.routes[site, shape] = replace(straight, index=index.reshape(shape))
        return self.routes.get((site, shape))

    def _behind(self, tail: Tail, total: TargetValues, values: TargetValues, count: int) -> _Draw | None:
        """Places of the call and of the sum, and what should come out there for the sum to be right.

        None if the features do not come whole and in order.
        """
        route = tail.route
        if total.shape != route.index.shape:
            return None
        there = sampled_places(total.shape, total.axes, count, self.generator, total.device)
        found = route.back(there, total.axes, values.shape, values.axes)
        if found is None:
            return None
        places, there = found
        offset = take(tail.other, total.axes, there)
        apart = total.apart(there)
        t = total.merged(apart) - offset
        if route.scale is not None:
            scale = take(route.scale, total.axes, there)
            if not bool((scale.abs() > 1e-3 * scale.abs().mean()).all()):
                return None
            t = t / scale
        return _Draw(places, there, t, offset, total, apart, route.node, plain=route.scale is None)

    def _adds(self, tail: Tail, drawn: _Draw, scratch: Env, values: TargetValues, seen: Tensor) -> bool:
        """Whether the sum is what the call gives at these places, scaled, and the other summand."""
        there, axes = _first(drawn.there), drawn.last.axes
        summand = take(seen, values.axes, _first(drawn.places))
        if tail.route.scale is not None:
            summand = summand * take(tail.route.scale, axes, there)
        total = take(_tensor(self.net.value(scratch, tail.route.node)), axes, there)
        return _near(summand + take(tail.other, axes, there), total)

    def _meets_relus(self, node: fx.Node) -> bool:
        users = list(node.users)
        return bool(users) and all(_is_relu(self.net.module, user) for user in users)


def _is_relu(net: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return isinstance(called(net, node), nn.ReLU) or (node.op == "call_function" and node.target in _RELUS)


def _first(places: Places) -> Places:
    return tuple(own[:_CHECKED] for own in places)


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise Unfit("what its node returns is no tensor")
    return value


def _matching(own: Tensor, values: TargetValues) -> Tensor:
    """What the zipped network gives, if it has the places and features of the target."""
    places, features = (
        [[n for a, n in enumerate(shape) if (a in values.axes) == inside] for shape in (own.shape, values.shape)]
        for inside in (False, True)
    )
    if len(own.shape) != len(values.shape) or places[0] != places[1] or len(features[0]) != len(features[1]):
        raise Unfit("an original has values of another shape there")
    return own


def _near(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are the same up to rounding; not asked of what is not finite."""
    found, expected = found.double(), expected.double()
    if not bool(found.isfinite().all() and expected.isfinite().all()):
        return True
    return bool((found - expected).norm() <= _NEAR * expected.norm())

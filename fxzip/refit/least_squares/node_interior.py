"""What happens inside a node: the arguments and the result of one of its ATen calls, and where the result goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ...rewriting.module import part_of
from ...tracing.aten_calls import AtenCall, tensors_in
from ..linear_calls.kernels import Places, take, unravelled
from ..linear_calls.parameter_uses import Survey, is_move
from ..linear_calls.units import only_user
from ..unfit import Unfit
from .lockstep import Lockstep
from .spilling import Env


class _Stop(BaseException):
    """Ends the run of a node once its call of interest has been reached."""

    def __init__(self, call: AtenCall) -> None:
        super().__init__()
        self.call = call


def _reach(net: Lockstep, env: Env, node: fx.Node, number: int, name: str) -> AtenCall:
    """Run a node as far as its call of that number, which is not made.

    Raises:
        Unfit: on these inputs the node makes fewer calls, or this one has another name.
    """

    def on_call(call: AtenCall) -> Any:
        if call.number == number:
            raise _Stop(call)
        return call.make()

    net.inputs(env, node)
    try:
        net.call(env, node, on_call)
    except _Stop as stop:
        if stop.call.name == name:
            return stop.call
        raise Unfit("it is made of other calls on other inputs") from None
    raise Unfit("it is made of fewer calls on other inputs")


def arguments(net: Lockstep, env: Env, node: fx.Node, call: int, name: str) -> Any:
    """The arguments of an ATen call of that name inside a node. The call itself is not made.

    Raises:
        Unfit: on these inputs the node makes other calls.
    """
    return _reach(net, env, node, call, name).args


def result(net: Lockstep, env: Env, node: fx.Node, call: int, name: str) -> Tensor:
    """The result of an ATen call of that name inside a node; the first one if it has several.

    Raises:
        Unfit: on these inputs the node makes other calls.
    """
    return tensors_in(_reach(net, env, node, call, name).make())[0]


@dataclass(frozen=True, eq=False)
class Route:
    """How a result reaches a residual sum.

    Attributes:
        node: the node of the sum.
        index: for every place of the sum, which place of the result comes there, counted from 1; 0: none.
        scale: what the result is multiplied by on its way, in the shape of the sum; None: nothing.
        summand: the node whose value the other summand is. None: it is made inside the node of the sum, or where the
            result goes depends on values; another batch has to be followed by itself.
    """

    node: fx.Node
    index: Tensor
    scale: Tensor | None
    summand: fx.Node | None

    @cached_property
    def straight(self) -> bool:
        """Whether every place of the sum is that of the result."""
        places = self.index.reshape(-1)
        return bool((places == torch.arange(1, len(places) + 1, device=places.device)).all())

    def back(
        self, there: Places, along: Sequence[int], shape: torch.Size, axes: Sequence[int]
    ) -> tuple[Places, Places] | None:
        """The places of the result that come to some of the sum, and those of the latter to which one comes.

        None if the features do not come whole and in order.

        Args:
            there: places of the sum, over all axes but those in `along`, of its features.
            shape, axes: of the result, and where its features lie.
        """
        if self.straight and self.index.shape == shape and tuple(along) == tuple(axes):
            return there, there
        index = take(self.index, along, there) - 1
        kept = (index >= 0).all(1)
        index = index[kept]
        coordinates = unravelled(index, shape)
        places = tuple(c[:, 0] for a, c in enumerate(coordinates) if a not in axes)
        together = all(bool((c == c[:, :1]).all()) for a, c in enumerate(coordinates) if a not in axes)
        feature = torch.zeros_like(index)
        for axis in axes:
            feature = feature * shape[axis] + coordinates[axis]
        order = torch.arange(index.shape[1], device=index.device)
        if not len(index) or not together or not bool((feature == order).all()):
            return None
        return places, tuple(place.to(kept.device)[kept] for place in there)


@dataclass(frozen=True, eq=False)
class Tail:
    """A residual sum on one batch: how a result reaches it, and the other summand."""

    route: Route
    other: Tensor


class _NoSum(BaseException):
    """The result meets something else than a sum."""


class _Sum(BaseException):
    """The result meets the sum."""

    def __init__(self, number: int, moved: _Moved, other: Tensor) -> None:
        super().__init__()
        self.number, self.moved, self.other = number, moved, other


@dataclass(frozen=True, eq=False)
class _Moved:
    """A value in which the result lies, moved at most.

    Attributes:
        value: it, kept so that no other tensor gets its number.
        index: in its shape, which place of the result comes there, see `Tail`.
        scale: in its shape, what the result was multiplied by; None: nothing.
    """

    value: Tensor
    index: Tensor
    scale: Tensor | None


class _Follow:
    """Sees a node run as it is, and follows where the places of a result are moved.

    The places are moved beside the values, never in their stead: what a module asks of its input (a dtype, a size, a
    sign) is true of the values alone.

    Args:
        found: what a run of the network showed.
        start: the number of the call whose result is followed; -1 if it is there already.
    """

    def __init__(self, found: Survey, start: int) -> None:
        self.found, self.start = found, start
        self.size = 0
        self.held: dict[int, _Moved] = {}
        self.steady = True  # the result goes where it goes by its shape alone

    def hold(self, value: Tensor) -> None:
        """Follow this value, all of it as it is."""
        self.size = value.numel()
        index = torch.arange(1, self.size + 1, device=value.device).reshape(value.shape)
        self.held[id(value)] = _Moved(value, index, None)

    def on_call(self, call: AtenCall) -> Any:
        """Make a call, and move the places likewise.

        Raises:
            _Sum: it is the sum. _NoSum: it is neither that nor a move nor a product with a parameter.
        """
        args, tensors = call.args, call.tensors()
        mine = [self.held[id(value)] for value in tensors if id(value) in self.held]
        if call.name == "add" and len(args) == len(tensors) == 2 and len(mine) == 1 and not call.kwargs:
            other = args[1] if args[0] is mine[0].value else args[0]
            if other.shape == mine[0].value.shape and not self.found.holds(other):
                raise _Sum(call.number, mine[0], other)
        factor = self._factor(call)
        moves = bool(args) and id(args[0]) in self.held and (is_move(call.name) or call.name == "constant_pad_nd")
        # What writes in place would change values that the walk still needs.
        if mine and (call.func._schema.is_mutable or not (moves or factor is not None)):
            raise _NoSum

        out = call.make()
        if call.number == self.start:
            self.hold(tensors_in(out)[0])
        elif factor is not None:
            (moved,) = mine
            scale = factor.expand(out.shape) * (1 if moved.scale is None else moved.scale)
            self.held[id(out)] = _Moved(out, moved.index, scale)
        elif moves:
            self._move(call, out)
        return out

    def _factor(self, call: AtenCall) -> Tensor | None:
        """The parameter that a call multiplies the result by, in whose shape it stays; None if it does not."""
        tensors = call.tensors()
        if call.name != "mul" or len(call.args) != 2 or len(tensors) != 2 or call.kwargs:
            return None
        mine = [value for value in tensors if id(value) in self.held]
        others = [value for value in tensors if id(value) not in self.held and self.found.holds(value)]
        if len(mine) != 1 or len(others) != 1:
            return None
        fits = torch.broadcast_shapes(others[0].shape, mine[0].shape) == mine[0].shape
        return others[0] if fits else None

    def _move(self, call: AtenCall, out: Any) -> None:
        """A call that moves the result moves its places and scales."""
        given = self.held[id(call.args[0])]
        self.steady = self.steady and len(call.tensors()) == 1
        index = _beside(call, given.index)
        scales = [None] * len(index) if given.scale is None else _beside(call, given.scale)
        for value, places, scale in zip(tensors_in(out), index, scales, strict=True):
            self.held[id(value)] = _Moved(value, places, scale)


def _beside(call: AtenCall, value: Tensor) -> list[Tensor]:
    """What a call makes of places or scales.

    Raises:
        _NoSum: they do not take it, as integers do not take a padding by infinities.
    """
    try:
        return tensors_in(call.func(value, *call.args[1:], **call.kwargs))
    except RuntimeError as error:
        raise _NoSum from error


def find_tail(net: Lockstep, env: Env, found: Survey, start: tuple[fx.Node, int], shape: torch.Size) -> Tail | None:
    """Follow the result of a call (`start`: node and number; a number of -1 stands for what the node returns), which
    has to be of this shape.

    Moves, dropout, and products with a parameter may lie between it and the sum; nothing else may read it. The other
    summand must be there already, and the sum must be what its node returns.
    """
    node: fx.Node | None
    node, call = start
    scratch = dict(env)
    follow = _Follow(found, call)
    if call < 0:
        value = net.value(scratch, node)
        if not isinstance(value, Tensor):
            return None
        follow.hold(value)
        node = _next(node)
    else:
        net.inputs(scratch, node)

    while node is not None:
        if any(source not in scratch for source in node.all_input_nodes):  # a summand that comes later
            return None
        try:
            scratch[node] = net.call(scratch, node, follow.on_call)
        except _Sum as met:
            if found.calls[node] != met.number + 1 or follow.size != shape.numel():
                return None
            summand = next((own for own in node.all_input_nodes if scratch[own] is met.other), None)
            route = Route(node, met.moved.index, met.moved.scale, summand if follow.steady else None)
            return Tail(route, met.other)
        except _NoSum:
            return None
        follow.start = -1
        node = _next(node)
    return None


def _next(node: fx.Node) -> fx.Node | None:
    """The node that alone reads this one, in the same part of the network."""
    behind = only_user(node)
    if behind is None or behind.op == "output" or part_of(behind) != part_of(node):
        return None
    return behind

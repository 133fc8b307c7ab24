"""What happens inside a node: the arguments and the result of one of its ATen calls, and where the result goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...rewriting.module import part_of
from ..unfit import Unfit
from .lockstep import Env, Lockstep
from .parameter_uses import Survey, is_move, name_of
from .units import only_user


class _Stop(BaseException):
    """Ends the run of a node once its call of interest has been reached."""


class _Until(TorchDispatchMode):
    """Runs to a call, takes its arguments (and its result, if asked to), and stops."""

    def __init__(self, call: int, result: bool) -> None:
        super().__init__()
        self.call, self.result = call, result
        self.calls = 0
        self.kept: list[Any] = []  # results that are held on to may cost a further call, as they do in the analysis
        self.taken: Any = None
        self.name = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.calls == self.call:
            self.taken = func(*args, **(kwargs or {})) if self.result else args
            self.name = name_of(func)
            raise _Stop
        self.calls += 1
        self.kept.append(func(*args, **(kwargs or {})))
        return self.kept[-1]


def _until(net: Lockstep, env: Env, node: fx.Node, call: int, *, result: bool) -> _Until:
    net.inputs(env, node)
    mode = _Until(call, result)
    try:
        with mode:
            net.call(env, node)
    except _Stop:
        return mode
    raise Unfit("it is made of fewer calls on other inputs")


def arguments(net: Lockstep, env: Env, node: fx.Node, call: int, name: str) -> Any:
    """The arguments of an ATen call of that name inside a node. The call itself is not made.

    Raises:
        Unfit: on these inputs the node makes other calls.
    """
    found = _until(net, env, node, call, result=False)
    if found.name != name:
        raise Unfit("it is made of other calls on other inputs")
    return found.taken


def result(net: Lockstep, env: Env, node: fx.Node, call: int) -> Tensor:
    """The result of an ATen call inside a node; the first one if it has several.

    Raises:
        Unfit: on these inputs the node makes fewer calls.
    """
    taken = _until(net, env, node, call, result=True).taken
    return next(value for value in tree_leaves(taken) if isinstance(value, Tensor))


@dataclass(frozen=True, eq=False)
class Tail:
    """How a result reaches a residual sum.

    Attributes:
        node: the node of the sum.
        index: for every place of the sum, which place of the result comes there, counted from 1; 0: none.
        scale: what the result is multiplied by on its way, in the shape of the sum; None: nothing.
        other: the other summand.
    """

    node: fx.Node
    index: Tensor
    scale: Tensor | None
    other: Tensor


class _NoSum(BaseException):
    """The result meets something else than a sum."""


class _Sum(BaseException):
    """The result meets the sum."""

    def __init__(self, moved: _Moved, other: Tensor) -> None:
        super().__init__()
        self.moved, self.other = moved, other


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


class _Follow(TorchDispatchMode):
    """Runs a node as it is, and follows where the places of a result are moved.

    The places are moved beside the values, never in their stead: what a module asks of its input (a dtype, a size, a
    sign) is true of the values alone.
    """

    def __init__(self, found: Survey, start: int) -> None:
        super().__init__()
        self.found, self.start = found, start
        self.calls, self.size = -1, 0
        self.kept: list[Any] = []
        self.held: dict[int, _Moved] = {}

    def hold(self, value: Tensor) -> None:
        """Follow this value, all of it as it is."""
        self.size = value.numel()
        index = torch.arange(1, self.size + 1, device=value.device).reshape(value.shape)
        self.held[id(value)] = _Moved(value, index, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        mine = [self.held[id(value)] for value in tensors if id(value) in self.held]
        name = name_of(func)

        if name == "add" and len(args) == len(tensors) == 2 and len(mine) == 1 and not kwargs:
            other = args[1] if args[0] is mine[0].value else args[0]
            if other.shape == mine[0].value.shape and not self.found.holds(other):
                raise _Sum(mine[0], other)
        factor = self._factor(name, args, kwargs)
        moves = bool(args) and id(args[0]) in self.held and (is_move(name) or name == "constant_pad_nd")
        # What writes in place would change values that the walk still needs.
        if mine and (func._schema.is_mutable or not (moves or factor is not None)):
            raise _NoSum

        out = func(*args, **kwargs)
        self.kept.append(out)
        if self.calls == self.start:
            self.hold(next(value for value in tree_leaves(out) if isinstance(value, Tensor)))
        elif factor is not None:
            (moved,) = mine
            scale = factor.expand(out.shape) * (1 if moved.scale is None else moved.scale)
            self.held[id(out)] = _Moved(out, moved.index, scale)
        elif moves:
            self._move(func, args, kwargs, out)
        return out

    def _factor(self, name: str, args: Any, kwargs: Any) -> Tensor | None:
        """The parameter that a call multiplies the result by, in whose shape it stays; None if it does not."""
        if name != "mul" or len(args) != 2 or kwargs or not all(isinstance(value, Tensor) for value in args):
            return None
        mine = [value for value in args if id(value) in self.held]
        others = [value for value in args if id(value) not in self.held and self.found.holds(value)]
        if len(mine) != 1 or len(others) != 1:
            return None
        factor: Tensor = others[0]
        return factor if torch.broadcast_shapes(factor.shape, mine[0].shape) == mine[0].shape else None

    def _move(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """A call that moves the result moves its places and scales."""
        given, rest = self.held[id(args[0])], args[1:]
        results = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        index = self._beside(func, given.index, rest, kwargs)
        scales = [None] * len(index) if given.scale is None else self._beside(func, given.scale, rest, kwargs)
        for value, places, scale in zip(results, index, scales, strict=True):
            self.held[id(value)] = _Moved(value, places, scale)

    def _beside(self, func: Any, value: Tensor, rest: Any, kwargs: Any) -> list[Tensor]:
        """The same call on places or scales.

        Raises:
            _NoSum: they do not take it, as integers do not take a padding by infinities.
        """
        try:
            out = func(value, *rest, **kwargs)
        except RuntimeError as error:
            raise _NoSum from error
        self.kept.append(out)
        return [own for own in tree_leaves(out) if isinstance(own, Tensor)]


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
            with follow:
                scratch[node] = net.call(scratch, node)
        except _Sum as met:
            if found.calls[node] != follow.calls + 1 or follow.size != shape.numel():
                return None
            return Tail(node, met.moved.index, met.moved.scale, met.other)
        except _NoSum:
            return None
        follow.start, follow.calls = -1, -1
        node = _next(node)
    return None


def _next(node: fx.Node) -> fx.Node | None:
    """The node that alone reads this one, in the same part of the network."""
    behind = only_user(node)
    if behind is None or behind.op == "output" or part_of(behind) != part_of(node):
        return None
    return behind

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

    def __init__(self, index: Tensor, scale: Tensor | None, other: Tensor) -> None:
        super().__init__()
        self.index, self.scale, self.other = index, scale, other


class _Follow(TorchDispatchMode):
    """Runs a node with numbers in place of a result, and follows where they are moved."""

    def __init__(self, found: Survey, tokens: Tensor, start: int) -> None:
        super().__init__()
        self.found, self.tokens, self.start = found, tokens, start
        self.calls = -1
        self.kept: list[Any] = []
        self.held: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        if self.calls == self.start:
            self.held[id(self.tokens)] = self.tokens, None
            return self.tokens
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        mine = [value for value in tensors if id(value) in self.held]
        if not mine:
            self.kept.append(func(*args, **kwargs))
            return self.kept[-1]
        name = name_of(func)
        if is_move(name) or name == "constant_pad_nd":
            return self._moved(func, args, kwargs)
        if name in ("mul", "add") and len(args) == 2 and len(tensors) == 2 and len(mine) == 1 and not kwargs:
            value, other = mine[0], next(t for t in tensors if t is not mine[0])
            scale = self.held[id(value)][1]
            if name == "add" and other.shape == value.shape and not self.found.holds(other):
                raise _Sum(value, scale, other)
            if (
                name == "mul"
                and self.found.holds(other)
                and torch.broadcast_shapes(other.shape, value.shape) == value.shape
            ):
                out = value.clone()
                self.held[id(out)] = out, other.expand(value.shape) * (1 if scale is None else scale)
                return out
        raise _NoSum

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        value, scale = self.held.get(id(args[0]), (None, None))
        if value is None:
            raise _NoSum
        out = func(value, *args[1:], **kwargs)
        shadow = out if scale is None else func(scale, *args[1:], **kwargs)
        for own, other in zip(tree_leaves(out), tree_leaves(shadow), strict=True):
            self.held[id(own)] = own, None if scale is None else other
        return out


def find_tail(net: Lockstep, env: Env, found: Survey, start: tuple[fx.Node, int], shape: torch.Size) -> Tail | None:
    """Follow the result of a call (`start`: node and number; a number of -1 stands for what the node returns).

    Moves, dropout, and products with a parameter may lie between it and the sum; nothing else may read it. The other
    summand must be there already, and the sum must be what its node returns.
    """
    node: fx.Node | None
    node, call = start
    size = shape.numel()
    device = next((value.device for value in env.values() if isinstance(value, Tensor)), None)
    tokens = torch.arange(1, size + 1, device=device).reshape(shape)
    held: dict[int, tuple[Tensor, Tensor | None]] = {id(tokens): (tokens, None)}
    scratch = dict(env)
    if call < 0:
        scratch[node] = tokens
        node = _next(node)
    else:
        net.inputs(scratch, node)
    while node is not None:
        mode = _Follow(found, tokens, call)
        mode.held |= held
        try:
            with mode:
                scratch[node] = net.call(scratch, node)
        except _Sum as met:
            if found.calls[node] != mode.calls + 1:
                return None
            return Tail(node, met.index, met.scale, met.other)
        except (_NoSum, KeyError, RuntimeError, TypeError, IndexError):
            return None
        held, call = mode.held, -1
        node = _next(node)
    return None


def _next(node: fx.Node) -> fx.Node | None:
    """The node that alone reads this one, in the same part of the network."""
    behind = only_user(node)
    if behind is None or behind.op == "output" or part_of(behind) != part_of(node):
        return None
    return behind

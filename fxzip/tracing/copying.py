"""Copies of models, with all that their functions refer to."""

from __future__ import annotations

import copy
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn


def deep_copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules with the result of a computation as a plain attribute (old-style `weight_norm`).

    >>> deep_copy(nn.Linear(2, 2)).weight.shape
    torch.Size([2, 2])
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in [*vars(module).values(), *module._buffers.values()]:
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, (FunctionType, partial)):
                vars(module)[key] = _rebound(value, memo)
    return copied


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """A function that was given to a module, with the copies of modules and tensors that it refers to: `deepcopy`
    leaves functions as they are, and with them what their closures and globals hold."""

    def new(own: Any) -> Any:
        if isinstance(own, (FunctionType, partial)):
            return _rebound(own, memo)
        if isinstance(own, MethodType):
            return MethodType(_rebound(own.__func__, memo), new(own.__self__))
        return memo.get(id(own), own) if isinstance(own, (nn.Module, Tensor)) else own

    if isinstance(value, partial):
        return partial(new(value.func), *map(new, value.args), **{key: new(own) for key, own in value.keywords.items()})
    if not isinstance(value, FunctionType):
        return value
    cells = tuple(_cell(cell, new) for cell in value.__closure__ or ())
    named = {name: value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__}
    moved = {name: new(own) for name, own in named.items() if isinstance(own, nn.Module) and new(own) is not own}
    if not moved and all(a is b for a, b in zip(cells, value.__closure__ or (), strict=True)):
        return value
    names = {**value.__globals__, **moved} if moved else value.__globals__
    result = FunctionType(value.__code__, names, value.__name__, value.__defaults__, cells)
    result.__kwdefaults__ = value.__kwdefaults__
    result.__dict__.update(value.__dict__)
    return result


def _cell(cell: CellType, new: Any) -> CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # not yet bound
        return cell
    return cell if new(content) is content else CellType(new(content))

"""`len`, `isinstance` and `type` in a model's code, of values that are traced.

`len` of a tensor is the size of its first axis: recorded as such, it follows the input. Python turns whatever `len`
returns into an integer, so that no proxy could answer it. `isinstance` of a proxy would be false for tensors, and its
`type` is another: compiled code asks the same way, and must not take a proxy for one. Names beside the functions of the
model can answer. They are there while the model is traced only, and do for all other values what Python's own do.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from .questions import type_on_value
from .threads import only_here


def recorded_len(value: Any) -> Any:
    """The size of the first axis where a tensor is traced, else what `len` gives.

    >>> recorded_len([1, 2])
    2
    """
    if issubclass(type(value), fx.Proxy) and isinstance(vars(value).get("value"), (Tensor, type(None))):
        return value.size(0)
    return builtins.len(value)


def recorded_isinstance(value: Any, kinds: Any) -> bool:
    """Whether what is traced is of such a kind, else what `isinstance` gives.

    >>> recorded_isinstance([1, 2], (list, tuple))
    True
    """
    if not issubclass(type(value), fx.Proxy):
        return builtins.isinstance(value, kinds)
    if issubclass(type(value), fx.proxy.ParameterProxy):
        return builtins.isinstance(value.param, kinds)
    return bool(value.tracer.stands_for(value, kinds))


def _is_tensor(value: Any) -> bool:
    return recorded_isinstance(value, Tensor)


def recorded_type(value: Any, *more: Any) -> Any:
    """The type of what is traced, else what `type` gives.

    >>> recorded_type([1, 2])
    <class 'list'>
    """
    if more or not issubclass(builtins.type(value), fx.Proxy):
        return builtins.type(value, *more)
    if issubclass(builtins.type(value), fx.proxy.ParameterProxy):
        return builtins.type(value.param)
    kind: type = value.tracer.type_of(value)
    return kind


_RECORDED = {
    "len": recorded_len,
    "isinstance": recorded_isinstance,
    "type": type_on_value(builtins.type, lambda _: recorded_type),
}


@contextmanager
def builtins_recorded(model: nn.Module) -> Iterator[None]:
    """Inside, functions next to the `forward`s of a model and its modules find those above by the names of Python's."""
    added: list[tuple[dict[str, Any], str]] = []
    with mock.patch.object(torch, "is_tensor", only_here(_is_tensor, torch.is_tensor)):
        for module in model.modules():
            forward = vars(module).get("forward", type(module).forward)
            found = getattr(getattr(forward, "__func__", forward), "__globals__", None)
            if found is None or _is_namespace_of_torch(found):
                continue
            for name in _RECORDED.keys() - found.keys():
                found[name] = _RECORDED[name]
                added.append((found, name))
        try:
            yield
        finally:
            for space, name in added:
                del space[name]


def _is_namespace_of_torch(space: dict[str, Any]) -> bool:
    """PyTorch's own modules are leaves, or are traced as they are."""
    return str(space.get("__name__", "")).partition(".")[0] == "torch"

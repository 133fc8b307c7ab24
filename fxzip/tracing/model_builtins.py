"""`len`, `isinstance`, `type`, `hasattr`, `getattr` and `callable` in a model's code, of values that are traced.

`len` of a tensor is the size of its first axis: recorded as such, it follows the input. Python turns whatever `len`
returns into an integer, so that no proxy could answer it. `isinstance` of a proxy would be false for tensors, and its
`type` is another: compiled code asks the same way, and must not take a proxy for one. A proxy has every attribute, and
can be called. Names beside the functions of the model can answer, in whatever files these are. They are there while the
model is traced only, and do for all other values what Python's own do.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator
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
    if not _is_traced(value):
        return builtins.isinstance(_parameter_of(value), kinds)
    return bool(value.tracer.stands_for(value, kinds))


def _is_tensor(value: Any) -> bool:
    return recorded_isinstance(value, Tensor)


def recorded_type(value: Any, *more: Any) -> Any:
    """The type of what is traced, else what `type` gives.

    >>> recorded_type([1, 2])
    <class 'list'>
    """
    if more or not _is_traced(value):
        return builtins.type(_parameter_of(value), *more)
    kind: type = value.tracer.type_of(value)
    return kind


def recorded_hasattr(value: Any, name: str) -> bool:
    """Whether what is traced has an attribute, else what `hasattr` gives.

    >>> recorded_hasattr([1, 2], "shape")
    False
    """
    return builtins.hasattr(value.tracer.value_of(value) if _is_traced(value) else value, name)


def recorded_getattr(value: Any, name: str, *default: Any) -> Any:
    """The attribute of what is traced, or a default if it has none, else what `getattr` gives.

    >>> recorded_getattr([1, 2], "shape", None) is None
    True
    """
    if default and _is_traced(value) and not recorded_hasattr(value, name):
        return default[0]
    return builtins.getattr(value, name, *default)


def recorded_callable(value: Any) -> bool:
    """Whether what is traced can be called, else what `callable` gives.

    >>> recorded_callable(len), recorded_callable(torch.ones(1))
    (True, False)
    """
    return builtins.callable(value.tracer.value_of(value) if _is_traced(value) else _parameter_of(value))


def _is_traced(value: Any) -> bool:
    kind = builtins.type(value)
    return issubclass(kind, fx.Proxy) and not issubclass(kind, fx.proxy.ParameterProxy)


def _parameter_of(value: Any) -> Any:
    """The parameter that a proxy stands for, any other value as it is."""
    return value.param if issubclass(builtins.type(value), fx.proxy.ParameterProxy) else value


_RECORDED = {
    "len": recorded_len,
    "isinstance": recorded_isinstance,
    "hasattr": recorded_hasattr,
    "getattr": recorded_getattr,
    "callable": recorded_callable,
    "type": type_on_value(builtins.type, lambda _: recorded_type),
}


@contextmanager
def builtins_recorded(model: nn.Module, spaces: Iterable[dict[str, Any]] = ()) -> Iterator[None]:
    """Inside, functions next to the `forward`s of a model and its modules, and those in further name spaces, find those
    above by the names of Python's."""
    added: list[tuple[dict[str, Any], str]] = []
    with mock.patch.object(torch, "is_tensor", only_here(_is_tensor, torch.is_tensor)):
        for found in (*_spaces(model), *spaces):
            for name in _RECORDED.keys() - found.keys():
                found[name] = _RECORDED[name]
                added.append((found, name))
        try:
            yield
        finally:
            for space, name in added:
                del space[name]


def _spaces(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The names beside the `forward`s of a model and its modules."""
    for module in model.modules():
        forward = vars(module).get("forward", type(module).forward)
        found = getattr(getattr(forward, "__func__", forward), "__globals__", None)
        if found is not None and not _is_namespace_of_torch(found):
            yield found


def _is_namespace_of_torch(space: dict[str, Any]) -> bool:
    """PyTorch's own modules are leaves, or are traced as they are."""
    return str(space.get("__name__", "")).partition(".")[0] == "torch"

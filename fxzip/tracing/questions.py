"""Calls that ask about shapes, and calls that make tensors of sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

FACTORIES = [
    "arange",
    "zeros",
    "ones",
    "full",
    "empty",
    "eye",
    "linspace",
    "tensor",
    "tril_indices",
    "triu_indices",
    "sym_max",
    "sym_min",
    "as_tensor",
    "scalar_tensor",
]
DRAWS = ("rand", "randn", "randint", "randperm", "normal")
"""Those that draw random numbers: in every call other ones, whatever their sizes are made of."""

SHAPE_METHODS = frozenset(
    [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "element_size",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "get_device",
        "storage_offset",
        "type",
    ]
)
SIZE_METHODS = frozenset(["size", "numel", "nelement"])
RANK_METHODS = frozenset(["dim", "ndimension"])
TYPE_QUESTIONS = frozenset(["is_floating_point", "is_complex", torch.is_floating_point, torch.is_complex])
SHAPE_FUNCTIONS = frozenset((getattr, torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor))


def type_on_value(original: type, on_value: Callable[[Any], Any]) -> type:
    """A class that makes what the original makes of the values of proxies (`on_value`); its instances are those of the
    original."""

    class OnValue(type):
        def __call__(cls, *args: Any) -> Any:
            return on_value(original)(*args)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, original)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, original)

    return OnValue(original.__name__, (), {"__module__": original.__module__})


def plain_attribute(owner: Any, name: str) -> Any:
    """The attribute itself: tracing patches `Module.__getattr__`."""
    if isinstance(owner, nn.Module):
        for store in (owner._parameters, owner._buffers, owner._modules):
            if name in store:
                return store[name]
    return vars(owner)[name] if name in vars(owner) else getattr(owner, name)

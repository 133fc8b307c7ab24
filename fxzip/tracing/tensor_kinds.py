"""Kinds of tensors that `isinstance` tells apart, by name: `nn.Parameter`, `torch.FloatTensor`, one's own class."""

from __future__ import annotations

import typing
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn

_OLD_TYPES: Any = type(torch.FloatTensor)
"""Of `torch.FloatTensor` and its like, which stand for a dtype, a layout and a device."""
_MARKED = tuple(kind for kind in (nn.Parameter, getattr(nn, "Buffer", None)) if kind is not None)
"""Classes that tell by a mark of the tensor whether it is one of theirs."""


def kinds_asked(value: Tensor, kinds: Any) -> tuple[str, ...]:
    """Those of the second operand of `isinstance` on which the answer depends among tensors: none where the others
    settle it.

    >>> kinds_asked(torch.ones(1), (list, nn.Parameter)), kinds_asked(torch.ones(1), (Tensor, nn.Parameter))
    (('torch.nn.parameter.Parameter',), ())
    """
    found = _listed(kinds)
    telling = [kind for kind in found if _tells_tensors_apart(kind)]
    if any(isinstance(value, kind) for kind in found if kind not in telling):
        return ()
    return tuple(_name(kind) for kind in telling)


def kinds_of(value: Tensor) -> set[str]:
    """All kinds that a tensor is of.

    >>> sorted(kinds_of(nn.Parameter(torch.ones(1))))[:2]
    ['builtins.object', 'torch.FloatTensor']
    """
    classes = [*type(value).__mro__, *(kind for kind in _MARKED if isinstance(value, kind))]
    return {value.type(), *(_name(kind) for kind in classes)}


def _listed(kinds: Any) -> list[Any]:
    if isinstance(kinds, tuple):
        return [kind for part in kinds for kind in _listed(part)]
    return list(typing.get_args(kinds)) if isinstance(kinds, UnionType) else [kinds]


def _tells_tensors_apart(kind: Any) -> bool:
    return isinstance(kind, _OLD_TYPES) or (issubclass(kind, Tensor) and kind is not Tensor)


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__name__}"

"""Which classes a file may name: those of leaf modules, and those of containers that a network returns."""

from __future__ import annotations

import copyreg
import dataclasses
import importlib
import re
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import nn

from .allowed import is_known, lookup

_OUTPUTS = re.compile(r"transformers\.modeling_outputs$")
_CONTAINERS: tuple[type, ...] = (
    tuple, list, dict, set, frozenset, str, int, float, bool, OrderedDict, defaultdict, deque, UserDict, UserList,
    SimpleNamespace,
)  # fmt: skip
_MAKERS: tuple[Callable[..., Any], ...] = (copyreg.__newobj__, copyreg._reconstructor)  # type: ignore[attr-defined]


def known_module(module: str, name: str) -> type[nn.Module] | None:
    """The class of modules of that name, of PyTorch or of a package that a file may name; None if there is none.

    >>> known_module("torch.nn.modules.linear", "Linear"), known_module("os", "system")
    (<class 'torch.nn.modules.linear.Linear'>, None)
    """
    found = _known(module, name)
    parallel = module.startswith(("torch.nn.parallel", "torch.nn.utils"))
    return found if found is not None and issubclass(found, nn.Module) and not parallel else None


def known_container(module: str, name: str) -> Callable[..., Any] | None:
    """The class of containers of that name, or the function by which Python's copies are made; None if there is none.

    Containers are those of Python, and named tuples, dataclasses and dicts that belong to packages which a file may
    name.

    >>> known_container("builtins", "dict"), known_container("subprocess", "Popen")
    (<class 'dict'>, None)
    """
    plain: tuple[Any, ...] = (*_CONTAINERS, *_MAKERS)
    for own in plain:
        if (own.__module__, own.__qualname__) == (module, name):
            return own  # type: ignore[no-any-return]
    found = _known(module, name)
    if found is None and _OUTPUTS.match(module) and name.isidentifier():
        held = getattr(importlib.import_module(module), name, None)
        found = held if isinstance(held, type) and held.__module__ == module else None
    holds = found is not None and (
        dataclasses.is_dataclass(found)
        or issubclass(found, OrderedDict)
        or (issubclass(found, tuple) and hasattr(found, "_fields"))
    )
    return found if holds and not issubclass(found, nn.Module) else None  # type: ignore[arg-type]


def _known(module: str, name: str) -> type | None:
    if not all(step.isidentifier() for step in (*module.split("."), name)):
        return None
    found = lookup(f"{module}.{name}")
    return found if isinstance(found, type) and is_known(found) else None

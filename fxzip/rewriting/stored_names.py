"""Functions and classes by name: what a saved folder may name, and what its reader trusts beside that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..errors import InputError, LoadError, SaveError
from ..tracing.allowed import named, qualified, trusted
from ..tracing.allowed_classes import known_container, known_module
from ..tracing.stored_graphs import Function


def name_of(called: Any) -> tuple[str, str]:
    """Module and name of a function or class.

    >>> name_of(torch.relu), name_of(nn.Linear)
    (('torch', 'relu'), ('torch.nn.modules.linear', 'Linear'))

    Raises:
        SaveError: it has none by which it could be found again.
    """
    if not isinstance(called, type):
        known = Function.of(called)
        if known.module:
            return known.module, known.path
        if isinstance(called, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return qualified(called)
    module, path = (getattr(called, key, None) for key in ("__module__", "__qualname__"))
    if not isinstance(module, str) or not isinstance(path, str) or "<lambda>" in path:
        raise SaveError(f"{called!r} has no name by which it could be found again; write it as a function of a module")
    return module, path


class Names:
    """What names stand for, for a reader who trusts these functions and classes.

    >>> Names().function(["torch", "relu"]) is torch.relu
    True
    """

    def __init__(self, trust: Iterable[Callable[..., Any]] = ()) -> None:
        given = (trust,) if callable(trust) else tuple(trust)
        for own in given:
            if not callable(own):
                raise InputError(f"`trust` takes functions and classes; found {own!r}.")
        self._own = {name_of(own): own for own in given}

    def function(self, name: Any) -> Any:
        """The function of that name.

        Raises:
            LoadError: it is none that a file may name.
        """
        module, path = _pair(name)
        own = self._trusted(module, path)
        if own is not None and not (isinstance(own, type) and issubclass(own, nn.Module)):
            return own
        try:
            return named(module, path)
        except LoadError:
            raise _unknown("calls", module, path) from None

    def module(self, name: Any) -> type[nn.Module]:
        """The class of modules of that name.

        Raises:
            LoadError: it is none that a file may name.
        """
        module, path = _pair(name)
        own = self._trusted(module, path) or known_module(module, path)
        if isinstance(own, type) and issubclass(own, nn.Module):
            return own
        raise _unknown("has modules of the class", module, path)

    def container(self, name: Any) -> Any:
        """The class of containers of that name, or a function that makes one.

        Raises:
            LoadError: it is none that a file may name.
        """
        module, path = _pair(name)
        own = self._trusted(module, path) or known_container(module, path)
        if own is None or (isinstance(own, type) and issubclass(own, nn.Module)):
            raise _unknown("has containers of the class", module, path)
        return own

    def is_own(self, called: Any) -> bool:
        """Whether the reader has named this function."""
        return any(called is own for own in self._own.values())

    def _trusted(self, module: str, path: str) -> Any:
        return self._own.get((module, path)) or trusted(module, path)


def _pair(name: Any) -> tuple[str, str]:
    if not (isinstance(name, list) and len(name) == 2 and all(isinstance(part, str) for part in name)):
        raise LoadError("a name must be a list of a module and what is in it")
    return name[0], name[1]


def _unknown(what: str, module: str, path: str) -> LoadError:
    last = path.rpartition(".")[2]
    return LoadError(
        f"it {what} {f'{module}.{path}'[:200]!r}, which a saved network may not name. If it is yours, give it: "
        f"`fxzip.load(folder, trust=[{last if last.isidentifier() else 'function'}])`. If it is not, do not load it."
    )

"""What PyTorch keeps once per process, and fxzip needs otherwise, changed for one thread only.

Three means, the least of them first. Most settings have a counterpart that belongs to the thread: a dispatch mode
instead of the default dtype, of the attention backend (`attention`), of the seed (`randomness`). Where code asks a
function of a module, that function is replaced by one that answers differently in the threads that are inside and
passes on all others (`ThreadPatch`). What `torch.fx` itself patches while it traces is made to act in that thread
only, and one thread traces at a time (`tracing`).
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import fx

Replacement = tuple[Any, str, Callable[..., Any]]
"""A module or class, the name of a function there, and what is called instead."""

_TRACING = threading.RLock()


class ThreadPatch:
    """Functions of modules that act otherwise in the threads that are inside, and are replaced only while one is.

    >>> import math
    >>> patch = ThreadPatch(lambda: [(math, "floor", lambda value: "here")])
    >>> with patch.inside():
    ...     math.floor(1.5)
    'here'
    >>> math.floor(1.5)
    1
    """

    def __init__(self, table: Callable[[], Sequence[Replacement]]) -> None:
        self._table = table
        self._lock = threading.Lock()
        self._threads = 0
        self._local = threading.local()
        self._made: list[tuple[Any, str, Any, Any]] = []

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread gets the replacements. May be nested."""
        depth = getattr(self._local, "depth", 0)
        with self._lock:
            if not self._threads:
                self._install()
            self._threads += 1
        self._local.depth = depth + 1
        try:
            yield
        finally:
            self._local.depth = depth
            with self._lock:
                self._threads -= 1
                if not self._threads:
                    self._remove()

    def _install(self) -> None:
        for owner, name, own in self._table():
            original = getattr(owner, name)
            replaced = self._chosen(original, own)
            self._made.append((owner, name, original, replaced))
            setattr(owner, name, replaced)

    def _chosen(self, original: Any, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            return (own if getattr(self._local, "depth", 0) else original)(*args, **kwargs)

        return chosen

    def _remove(self) -> None:
        while self._made:
            owner, name, original, replaced = self._made.pop()
            if getattr(owner, name) is replaced:  # else someone has patched it meanwhile, and ours passes everything on
                setattr(owner, name, original)


def only_here(own: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is `own` in this thread and `original` in all others.

    >>> only_here(lambda: 1, lambda: 2)()
    1
    """
    thread = threading.get_ident()

    @functools.wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        return (own if threading.get_ident() == thread else original)(*args, **kwargs)

    return called


@contextmanager
def tracing() -> Iterator[None]:
    """One thread at a time. `torch.fx` patches `nn.Module.__call__` and `__getattr__` while it traces, and so does
    `torch.export`; inside, what it puts there acts in the thread that traces, and modules called in others are called
    as ever.

    >>> with tracing():
    ...     graph = fx.Tracer().trace(lambda x: x + 1)
    """
    patch_method = fx._symbolic_trace._Patcher.patch_method

    def patch_here(self: Any, cls: type, name: str, new_fn: Callable[..., Any], *rest: Any, **options: Any) -> None:
        patch_method(self, cls, name, only_here(new_fn, getattr(cls, name)), *rest, **options)

    with _TRACING, mock.patch.object(fx._symbolic_trace._Patcher, "patch_method", patch_here):
        yield


class _ThreadWarning(type):
    """Its classes are bases of every warning, but in one thread only."""

    thread: int

    def __subclasscheck__(cls, subclass: type) -> bool:
        return threading.get_ident() == cls.thread and issubclass(subclass, Warning)


@contextmanager
def without_warnings() -> Iterator[None]:
    """No warnings in this thread. Not `warnings.catch_warnings`: it takes the filters of all threads, and puts back
    what they were when it began, which may be in the middle of another thread's.

    >>> with without_warnings():
    ...     warnings.warn("not shown")
    """
    category: Any = _ThreadWarning("OfThisThread", (object,), {"thread": threading.get_ident()})
    entry = ("ignore", None, category, None, 0)
    lists = [warnings.filters]
    lists[0].insert(0, entry)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for filters in (*lists, warnings.filters):  # another thread may have made a copy of the list meanwhile
            while entry in filters:
                filters.remove(entry)  # type: ignore[attr-defined]

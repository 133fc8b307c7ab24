"""What PyTorch keeps once per process, and fxzip needs otherwise, changed for one thread only.

Three means, the least of them first. Most settings have a counterpart that belongs to the thread: a dispatch mode
instead of the default dtype, of the attention backend (`attention`), of the seed (`randomness`). Where code asks a
function of a module, that function is replaced by one that answers differently in the threads that are inside and
passes on all others (`ThreadPatch`). What `torch.fx` itself patches while it traces is made to act in that thread
only (`traces_apart`), and one thread traces at a time (`tracing`).
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any
from unittest import mock

from torch import fx

from ..errors import TraceError

Replacement = tuple[Any, str, Callable[..., Any]]
"""A module or class, the name of a function there, and what is called instead."""

_TRACING = threading.RLock()
_PATIENCE = 300  # seconds


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


class _TracesApart:
    """While someone is inside, what `torch.fx` patches while it traces (`nn.Module.__call__` and `__getattr__`) acts in
    the thread that traces, whoever's trace it is: modules called in others are called as ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._original: Any = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._install()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    fx._symbolic_trace._Patcher.patch_method = self._original  # type: ignore[method-assign]

    def _install(self) -> None:
        patcher = fx._symbolic_trace._Patcher
        original = self._original = patcher.patch_method

        def patch_here(self: Any, cls: type, name: str, new_fn: Callable[..., Any], *rest: Any, **options: Any) -> None:
            original(self, cls, name, only_here(new_fn, getattr(cls, name)), *rest, **options)

        patcher.patch_method = patch_here  # type: ignore[method-assign]
        try:
            _wait_for(fx.Tracer.trace)
        except BaseException:
            patcher.patch_method = original  # type: ignore[method-assign]
            raise


traces_apart = _TracesApart().inside


def _wait_for(function: Callable[..., Any]) -> None:
    """Until no other thread is in a function.

    Raises:
        TraceError: another thread does not come out of it.
    """
    code = inspect.unwrap(function).__code__
    end = time.monotonic() + _PATIENCE
    while any(_runs(frame, code) for thread, frame in sys._current_frames().items() if thread != threading.get_ident()):
        if time.monotonic() > end:
            raise TraceError(
                f"No other thread may be in `{function.__qualname__}` of PyTorch, which patches the whole process; one "
                f"has been there for {_PATIENCE} seconds. Let it end first."
            )
        time.sleep(0.001)


def runs_here(code: CodeType) -> bool:
    """Whether this thread is running this code, somewhere above.

    >>> runs_here(runs_here.__code__), runs_here(only_here.__code__)
    (True, False)
    """
    return _runs(sys._getframe(), code)


def _runs(frame: FrameType | None, code: CodeType) -> bool:
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def _guarded() -> list[tuple[Any, str]]:
    """Functions of PyTorch that keep something once per process while they run."""
    found: list[tuple[Any, str]] = [(fx.Tracer, "trace")]
    if "torch.export._trace" in sys.modules:  # it takes a second to import
        found.append((sys.modules["torch.export._trace"], "_export"))
    return found


@contextmanager
def _alone() -> Iterator[None]:
    """Calls of guarded functions by other threads wait until the lock is free, and keep it while they run; those that
    had begun before are waited for.

    Raises:
        TraceError: another thread does not come out of one.
    """
    with ExitStack() as stack:
        originals = [getattr(owner, name) for owner, name in _guarded()]
        for (owner, name), original in zip(_guarded(), originals, strict=True):
            stack.enter_context(mock.patch.object(owner, name, _waiting(original)))
        for original in originals:
            _wait_for(original)
        yield


def _waiting(original: Callable[..., Any]) -> Callable[..., Any]:
    """A guarded function for all threads; calls inside of one that is itself being waited for do not wait."""

    @functools.wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        while not any(runs_here(inspect.unwrap(getattr(owner, name)).__code__) for owner, name in _guarded()):
            if _TRACING.acquire(timeout=0.1):
                try:
                    return original(*args, **kwargs)
                finally:
                    _TRACING.release()
        return original(*args, **kwargs)

    return called


@contextmanager
def tracing() -> Iterator[None]:
    """One thread at a time, whoever traces: two traces that end in another order than they began would leave PyTorch
    patched for good. One that another thread has begun by itself is waited for, and one that it begins waits.

    >>> with tracing():
    ...     graph = fx.Tracer().trace(lambda x: x + 1)
    """
    with traces_apart(), _TRACING, _alone():
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

"""Which way a model's own code goes: a trace must take the branches that the model takes.

What stands for a tensor in a trace answers Python's questions (`callable(h)`, `h.__class__`, `match h`, a `float(h)`
that is tried) as what it is, and not always as the tensor would. The outputs tell it only where the branch shows on the
sample. So the functions of the model's own code are watched (`sys.settrace`) while the model runs and while it is
traced: two calls of a function take one way if they execute the same instructions. Calls that only one of both runs
makes (hooks, bodies of custom operators, modules that are leaves of the trace) are not compared, nor is the code of
PyTorch, of Python and of installed packages.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import CO_GENERATOR
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

_TRACED_THROUGH = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<eval_with_key", "<frozen")
_PYTHON = str(Path(os.__file__).parent)
_INSTALLED = tuple(f"{os.sep}{folder}{os.sep}" for folder in ("site-packages", "dist-packages"))
_LONG = 200_000  # instructions of one call that are compared
_PASSING = {
    "modules": ("module.py", "container.py"),
    "fx": ("_symbolic_trace.py",),
    "experimental": ("proxy_tensor.py",),
    "utils": ("_contextlib.py",),
    "tracing": ("symbolic.py",),
    Path(os.__file__).parent.name: ("functools.py",),
}
"""Files whose functions call what the model has given them, in a trace as well, by the folder that they are in."""


@dataclass(eq=False)
class Way:
    """What one call of a function did.

    Attributes:
        code: of the function.
        space: the names beside it.
        path: offsets of the instructions that it executed.
        calls: the calls of the model's own functions that it made, each with the length that `path` had.
    """

    code: CodeType
    space: dict[str, Any]
    path: array[int] = field(default_factory=lambda: array("I"))
    calls: list[tuple[int, Way]] = field(default_factory=list)


def entered(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The function called: what it calls is one run of a model.

    >>> entered(max, 1, 2)
    2
    """
    return function(*args, **kwargs)


@contextmanager
def watched(there_is_code: bool = True) -> Iterator[list[Way]]:
    """Inside, every run of a model in this thread notes its way. Where something else watches Python already, a
    debugger say, or the model has no code of its own, none is noted.

    >>> with watched() as ways:
    ...     _ = entered(torch.nn.Sequential(torch.nn.ReLU()), torch.ones(1))
    >>> [(way.code.co_name, way.calls) for way in ways]
    [('entered', [])]
    """
    recorder = _Recorder()
    if sys.gettrace() is not None or not there_is_code:
        yield recorder.runs
        return
    sys.settrace(recorder.enter)
    try:
        yield recorder.runs
    finally:
        if sys.gettrace() == recorder.enter:  # else the model has begun to debug
            sys.settrace(None)


class _Recorder:
    def __init__(self) -> None:
        self.runs: list[Way] = []
        self._live: dict[FrameType, Way] = {}
        self._own: dict[str, bool] = {}

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        """What follows the calls of all functions: gives what follows the instructions of one, None for others."""
        code = frame.f_code
        if code is entered.__code__:
            way = Way(code, frame.f_globals)
            self.runs.append(way)
            self._live[frame] = way
            frame.f_trace_lines = False
            return self._leave
        own = self._own.get(code.co_filename)
        if own is None:
            own = self._own[code.co_filename] = _is_models(code.co_filename)
        if not own:
            return None
        found = self._live.get(frame)  # a generator that goes on
        if found is None:
            above = self._caller(frame)
            if above is None:
                return None
            found = self._live[frame] = Way(code, frame.f_globals)
            above.calls.append((len(above.path), found))
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._follower(found)

    def _leave(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "return":
            del self._live[frame]
        return self._leave

    def _follower(self, way: Way) -> Any:
        path, note = way.path, way.path.append
        generates = bool(way.code.co_flags & CO_GENERATOR)

        def follow(frame: FrameType, event: str, _: Any) -> Any:
            if event == "opcode":
                note(frame.f_lasti)
                frame.f_trace_opcodes = len(path) < _LONG
            elif event == "return" and not generates:
                self._live.pop(frame, None)
            return follow

        return follow

    def _caller(self, frame: FrameType) -> Way | None:
        """The way of the function of the model that calls a frame, by itself or through what only passes calls on."""
        above = frame.f_back
        while above is not None:
            if (way := self._live.get(above)) is not None:
                return way
            if not _passes(above.f_code):
                return None
            above = above.f_back
        return None


def _is_models(file: str) -> bool:
    """Whether code in a file is the model's own, not PyTorch's, Python's or that of an installed package."""
    return not (file.startswith((*_TRACED_THROUGH, _PYTHON)) or _is_installed(file))


def _is_installed(file: str) -> bool:
    return any(folder in file for folder in _INSTALLED)


def _passes(code: CodeType) -> bool:
    """Whether a function that is not the model's calls in a trace what it calls in the model; those of installed
    packages do, but for PyTorch's."""
    if _is_installed(code.co_filename) and not code.co_filename.startswith(_TRACED_THROUGH):
        return True
    folder, file = os.path.split(code.co_filename)
    return file in _PASSING.get(os.path.basename(folder), ())


def inside(way: Way) -> Iterator[Way]:
    """The ways of all calls that a run made."""
    for _, call in way.calls:
        yield call
        yield from inside(call)


def asks(ways: Sequence[Way], names: frozenset[str]) -> bool:
    """Whether code that was run has one of these names in it, as a name or as a text.

    >>> with watched() as ways:
    ...     _ = entered(torch.nn.ReLU(), torch.ones(1))
    >>> asks(ways, frozenset(["hasattr"]))
    False
    """
    codes = {call.code for way in ways for call in inside(way)}
    return any(not names.isdisjoint((*code.co_names, *filter(_is_text, code.co_consts))) for code in codes)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def parting(model: Way, traced: Way) -> str:
    """Where a trace went another way than the model, as `model.py:12 in "forward"`; "" if it did not.

    >>> with watched() as ways:
    ...     _ = [entered(torch.nn.ReLU(), torch.ones(1)) for _ in range(2)]
    >>> parting(*ways)
    ''
    """
    model = _without_call(model, traced)
    common = _common(model.path, traced.path)
    mine, theirs = (_by_place(way.calls) for way in (traced, model))
    for place in sorted(mine.keys() & theirs.keys()):
        if place <= common and (found := _parting_calls(theirs[place], mine[place], model, place)):
            return found
    if len(model.path) == len(traced.path) == common:
        return ""
    return _place(model, common)


def _without_call(model: Way, traced: Way) -> Way:
    """The run of a model without what a `__call__` of its own does around its `forward`, with which a trace begins."""
    calls = [way for _, way in model.calls]
    same = [way.code for way in calls] == [way.code for _, way in traced.calls]
    if model.code is not entered.__code__ or same or [way.code.co_name for way in calls] != ["__call__"]:
        return model
    return Way(model.code, model.space, calls=[(0, way) for _, way in calls[0].calls])


def _parting_calls(model: Sequence[Way], traced: Sequence[Way], above: Way, place: int) -> str:
    """The same of the calls that were made at one place of a function."""
    codes = [way.code for way in model], [way.code for way in traced]
    if not any(code in codes[1] for code in codes[0]):
        return _place(above, place)  # another function was called
    for code in dict.fromkeys(codes[0]):
        if codes[0].count(code) != codes[1].count(code):
            continue
        # code that a run makes itself, as `namedtuple` does, is another object each time, and equal
        pairs = zip((w for w in model if w.code == code), (w for w in traced if w.code == code), strict=True)
        if found := next(filter(None, (parting(*pair) for pair in pairs)), ""):
            return found
    return ""


def _by_place(calls: Sequence[tuple[int, Way]]) -> dict[int, list[Way]]:
    found: dict[int, list[Way]] = {}
    for place, way in calls:
        found.setdefault(place, []).append(way)
    return found


def _common(a: array[int], b: array[int]) -> int:
    """How many items at the beginning of both are the same."""
    if a == b:
        return len(a)
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _place(way: Way, count: int) -> str:
    """The line of the last of so many instructions of a function, and its name."""
    offset = way.path[count - 1] if count and way.path else 0
    line = next((line for start, end, line in way.code.co_lines() if start <= offset < end), way.code.co_firstlineno)
    return f"{Path(way.code.co_filename).name}:{line} in `{way.code.co_name}`"

"""Why a model gives something else in each call: which functions it calls that no seed and no argument determine."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .calls import Call
from .execution import difference, run_eager

_UNSTEADY = frozenset(
    [
        *("time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns", "time.perf_counter", "builtins.id"),
        *("time.perf_counter_ns", "time.process_time", "time.localtime", "time.gmtime", "time.strftime", "time.ctime"),
        *("datetime.now", "datetime.today", "datetime.utcnow", "date.today", "posix.urandom", "nt.urandom"),
    ]
)
_RUNS = 4  # what takes one of few values may give the same by chance
_NOT_THE_MODELS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), str(Path(os.__file__).parent), "<")


def unsteady(model: nn.Module, call: Call) -> str:
    """What a model does that gives something else in each call, with a way out; "" if it gives the same.

    >>> unsteady(nn.Linear(2, 2), Call((torch.ones(1, 2),), {}))
    ''
    """
    calls: dict[str, str] = {}
    first = run_eager(model, call)
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, called: _note(calls, frame, called) if event == "c_call" else None)
    try:
        later = [run_eager(model, call) for _ in range(_RUNS)]
    finally:
        sys.setprofile(before)
    if all(difference(output, first) is None for output in later):
        return ""
    made = next(filter(None, (_made_anew(output, first) for output in later)), "")
    if made:
        return (
            f"Its `forward` returns a `{made}`, a class that it makes anew in each call. Define the class at module "
            "level, outside of `forward`."
        )
    named = " and ".join(f"`{name}` at {place}" for name, place in calls.items())
    return (
        "Its `forward` gives something else in each call on the same input, from the same random state"
        f"{f'; it calls {named}' if named else ''}. Make what it reads beside its arguments an argument, a tensor, of "
        "the model."
    )


def _made_anew(a: Any, b: Any) -> str:
    """The name of a class of which two results have one each, of the same name; "" if there is none."""
    if type(a) is not type(b):
        names = [(own.__module__, own.__qualname__) for own in (type(a), type(b))]
        return names[0][1].rpartition(".")[2] if names[0] == names[1] else ""
    if isinstance(a, Mapping):
        pairs = [(a[key], b[key]) for key in a.keys() & b.keys()]
    elif isinstance(a, (tuple, list)):
        pairs = list(zip(a, b, strict=False))
    else:
        return ""
    return next(filter(None, (_made_anew(*pair) for pair in pairs)), "")


def _note(calls: dict[str, str], frame: Any, called: Any) -> None:
    """Note a call of a function of C by what the model's code calls, and the line."""
    name = f"{module}.{called.__name__}" if (module := getattr(called, "__module__", None)) else called.__qualname__
    if name not in _UNSTEADY or frame.f_code.co_filename.startswith(_NOT_THE_MODELS[:2]):
        return
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_MODELS):
        frame = frame.f_back
    if frame is not None:
        calls.setdefault(name, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")

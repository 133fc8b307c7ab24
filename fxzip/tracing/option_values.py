"""What an option of a public function may be, in one table by its name: what it says no to never reaches a stage.

The table knows types only. Whether names are known, and numbers are in range, is known where they are used.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import numpy as np
from torch import Tensor, nn

from ..errors import OptionError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Allowed:
    """What an option may be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Allowed) -> Allowed:
        return Allowed(f"{self.words}, or {other.words}", lambda value: self.holds(value) or other.holds(value))


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which looks at the options that the table knows before it does anything.

    >>> @checked
    ... def zipped(model, *, verify=True):
    ...     return verify
    >>> zipped(None, verify=False)
    False
    >>> zipped(None, verify="no")
    Traceback (most recent call last):
    fxzip.errors.OptionError: `verify` must be True or False; found 'no'.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checking(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # the function itself says best what is missing
            return function(*args, **kwargs)

        for name, value in given.items():
            if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL and name not in _MANY:
                continue
            allowed = _OPTIONS.get(name)
            if allowed is not None and not allowed.holds(value):
                raise OptionError(f"`{name}` must be {allowed.words}; found {shown(value)}.")
        return function(*args, **kwargs)

    return checking


def shown(value: Any) -> str:
    """A value in an error: plain ones as they are written, of others the type.

    >>> shown(["layer1", 2]), shown(np.zeros(3))
    ("['layer1', 2]", 'a `ndarray`')
    """
    plain = (str, bytes, int, float, complex, type(None), list, tuple, dict, set)
    if isinstance(value, type):
        return f"the class `{value.__name__}`"
    return f"{value!r:.80}" if type(value) in plain else f"a `{type(value).__name__}`"


def is_finite(value: Any) -> bool:
    """Whether something is a real number; truth values are none.

    >>> is_finite(np.float32(1)), is_finite(True), is_finite(math.nan)
    (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_)) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and is_finite(value) and -(2**63) <= int(value) < 2**63


def _path(value: Any) -> bool:
    written = os.fspath(value) if isinstance(value, os.PathLike) else value
    return isinstance(written, str) and bool(written)


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) > 0


def _shares(value: Any) -> bool:
    by_name = isinstance(value, Mapping)
    return is_finite(value) or (by_name and all(isinstance(k, str) and is_finite(v) for k, v in value.items()))


def _functions(value: Any) -> bool:
    return isinstance(value, Iterator) or (
        isinstance(value, (list, tuple, set, frozenset)) and all(map(callable, value))
    )


def _refit(value: Any) -> bool:
    return callable(value) and not isinstance(value, (type, nn.Module))


def _table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and callable(v) for k, v in value.items())


def _models(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (Tensor, str, bytes))


_MANY = {"functions"}
"""Arguments of any number that are one option together."""

_NONE = Allowed("None", lambda value: value is None)
_FLAG = Allowed(
    "True or False", lambda value: isinstance(value, (bool, np.bool_)) or (_whole(value) and value in (0, 1))
)
_NUMBER = Allowed("a number", is_finite)
_WHOLE = Allowed("a whole number", _whole)
_NAME = Allowed("a name", lambda value: isinstance(value, str) and bool(value))
_PATH = Allowed("the path of a folder", _path)
_SHARE = Allowed(
    'a number, a dict of numbers by name, or "auto"', lambda value: _shares(value) or isinstance(value, str)
)
_MEASURE = Allowed("a function of a network", callable)
_OPTIONS = {
    **dict.fromkeys(("hold_out", "joint", "strict", "timed", "verify"), _FLAG),
    "progress": Allowed("True, False or None", lambda value: value is None or _FLAG.holds(value)),
    **dict.fromkeys(("points", "seed"), _WHOLE),
    **dict.fromkeys(("max_cost", "min_agreement"), _NUMBER | _NONE),
    "max_costs": Allowed("a list of numbers", lambda value: _listed(value) and all(map(is_finite, value))) | _NONE,
    **dict.fromkeys(("width", "rank"), _SHARE),
    "until": Allowed(
        'a name, a fraction in [0, 1], "auto" or None',
        lambda value: value is None or _NAME.holds(value) or (isinstance(value, Real) and not isinstance(value, bool)),
    ),
    "cuts": Allowed("a list of what `until` takes", _listed) | _NONE,
    "methods": Allowed("a list of methods", _listed) | _NONE,
    **dict.fromkeys(("loss", "score"), _MEASURE | _NONE),
    "refit": Allowed(
        'a name, a refit with its settings, such as `LeastSquares()`, or None',
        lambda value: value is None or isinstance(value, str) or _refit(value),
    ),
    "rules": Allowed("a table by ATen call, `fxzip.RULES | ...`", _table) | _NONE,
    "resume": _PATH | _NONE,
    "folder": _PATH,
    "path": Allowed("the path of a file", _path),
    "max_batches": Allowed("a whole number of at least 1", lambda value: _whole(value) and value >= 1),
    "models": Allowed("a list of models, or a dict of them by the names of their tasks", _models),
    "functions": Allowed("functions", _functions),
    "trust": Allowed(
        "a function, or a list of them",
        lambda value: callable(value) or isinstance(value, (Iterator, list, tuple, set, frozenset)),
    ),
}  # fmt: skip

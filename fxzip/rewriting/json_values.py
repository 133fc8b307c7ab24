"""Values as JSON: what JSON lacks is an object with one key, a tag that begins with `$`.

    {"$tuple": [1, 2]}, {"$slice": [0, null, 2]}, {"$dtype": "float32"}, {"$float": "inf"}, {"$dict": [[1, "a"]]}

A value is known by its exact class: what is not listed here cannot be stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx.immutable_collections import immutable_dict, immutable_list

from ..errors import LoadError, SaveError

DEPTH = 60
"""How deep values may be nested."""


def encoded(value: Any, own: Callable[[Any], Any] = lambda value: None, depth: int = 0) -> Any:
    """A value as JSON has it. `own` gives the form of values that only the caller knows, and None for others.

    >>> encoded((1, slice(None), torch.float32))
    {'$tuple': [1, {'$slice': [None, None, None]}, {'$dtype': 'float32'}]}

    Raises:
        SaveError: there is no form for a value.
    """
    if depth > DEPTH:
        raise SaveError(f"values may be nested {DEPTH} deep")
    given = own(value)
    if given is not None:
        return given
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind in (list, immutable_list):
        return [encoded(item, own, depth + 1) for item in value]
    if kind in (dict, immutable_dict):
        pairs = [(key, encoded(item, own, depth + 1)) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$dict": [[encoded(key, own, depth + 1), item] for key, item in pairs]}
    for tag, (known, to, _) in _FORMS.items():
        if kind is known:
            return {tag: encoded(to(value), own, depth + 1)}
    raise SaveError(f"a `{kind.__module__}.{kind.__qualname__}` cannot be stored")


def decoded(value: Any, own: Mapping[str, Callable[[Any], Any]] | None = None, depth: int = 0) -> Any:
    """The value that JSON stands for. `own`: for each further tag what gives its value.

    >>> decoded({"$tuple": [1, {"$slice": [None, None, None]}, {"$dtype": "float32"}]})
    (1, slice(None, None, None), torch.float32)

    Raises:
        LoadError: it stands for none.
    """
    if depth > DEPTH:
        raise LoadError(f"values may be nested {DEPTH} deep")
    if isinstance(value, list):
        return [decoded(item, own, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    tags = [key for key in value if key.startswith("$")]
    if not tags:
        return {key: decoded(item, own, depth + 1) for key, item in value.items()}
    if len(value) > 1:
        raise LoadError(f"{_brief(value)} stands for no value")
    tag, held = tags[0], value[tags[0]]
    if own is not None and tag in own:
        return own[tag](held)
    if tag == "$dict":
        pairs = decoded(held, own, depth + 1)
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise LoadError(f"{_brief(value)} stands for no dict")
        return dict(pairs)
    if tag not in _FORMS:
        raise LoadError(f"{tag!r} stands for no kind of value")
    kind, _, back = _FORMS[tag]
    try:
        made = back(decoded(held, own, depth + 1))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        made = None
    if type(made) is not kind:
        raise LoadError(f"{_brief(value)} stands for no value")
    return made


def plain(text: bytes, limit: int) -> Any:
    """JSON as Python reads it: no key twice, no numbers that JSON does not have.

    >>> plain(b'{"a": 1}', 100)
    {'a': 1}

    Raises:
        LoadError: it is longer than `limit`, or no JSON.
    """
    if len(text) > limit:
        raise LoadError(f"it is longer than {limit:,} bytes")
    try:
        return json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"it is no JSON: {str(error)[:200]}") from error


def fields(value: Any, **kinds: Any) -> tuple[Any, ...]:
    """The items of an object that has these keys and no others, each of its class.

    >>> fields({"a": 1, "b": "x"}, a=int, b=str)
    (1, 'x')

    Raises:
        LoadError: it has others, or of another class.
    """
    if not isinstance(value, dict) or set(value) != set(kinds):
        raise LoadError(f"{_brief(value)} must be an object with the keys {', '.join(kinds)}")
    for key, kind in kinds.items():
        if type(value[key]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise LoadError(f"{key!r} is of the wrong class: {_brief(value[key])}")
    return tuple(value[key] for key in kinds)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is there twice")
    return result


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # a number with thousands of digits
        text = f"a `{type(value).__name__}`"
    return text if len(text) < 80 else text[:77] + "..."


def _of_torch(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _in_torch(name: Any) -> Any:
    return getattr(torch, name) if isinstance(name, str) and not name.startswith("_") else None


def _whole(numbers: Any, count: int | None = None, *, optional: bool = False) -> list[Any]:
    """Numbers that are integers; `optional`: or None."""
    kinds = (int, type(None)) if optional else (int,)
    listed = list(numbers) if isinstance(numbers, list) else [""]
    if any(type(number) not in kinds for number in listed) or (count is not None and len(listed) != count):
        raise ValueError("other numbers are needed")
    return listed


def _tuple(items: Any) -> Any:
    return tuple(items) if isinstance(items, list) else None


def _slice(items: Any) -> Any:
    return slice(*items) if isinstance(items, list) and len(items) == 3 else None


def _complex(items: Any) -> Any:
    return complex(*items) if isinstance(items, list) and [type(item) for item in items] == [float, float] else None


def _float(name: Any) -> Any:
    return float(name) if name in ("inf", "-inf", "nan") else None


_FORMS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "$tuple": (tuple, list, _tuple),
    "$size": (torch.Size, list, lambda items: torch.Size(_whole(items))),
    "$slice": (slice, lambda s: [s.start, s.stop, s.step], _slice),
    "$range": (range, lambda r: [r.start, r.stop, r.step], lambda items: range(*_whole(items, 3))),
    "$ellipsis": (type(...), lambda e: True, lambda held: ... if held is True else None),
    "$float": (float, str, _float),
    "$complex": (complex, lambda c: [c.real, c.imag], _complex),
    "$dtype": (torch.dtype, _of_torch, _in_torch),
    "$layout": (torch.layout, _of_torch, _in_torch),
    "$memory_format": (torch.memory_format, _of_torch, _in_torch),
    "$device": (torch.device, str, lambda name: torch.device(name) if isinstance(name, str) else None),
}
"""For each tag the class, how a value of it is written, and how it is read; None where there is no such value."""

"""The options of a recipe: the keyword parameters of `compile_zip`, with their types, defaults and help.

Nothing is listed here twice: a parameter that `compile_zip` gains is an option of every recipe.
"""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from docstring_parser import parse as parse_docstring

import fxzip
from fxzip.matching import METHODS
from fxzip.refit import REFITS, LeastSquares

from ...errors import OptionError, RecipeError

ELSEWHERE = {
    "models": "the recipe's `models`",
    "sample_input": "the recipe's `sample_input`, or the first inputs of its data",
    "data": "the recipe's `data`",
    "progress": "`--quiet`",
    "rules": "functions of Python, which a recipe cannot hold; call `compile_zip` for them",
}
"""Parameters of `compile_zip` that are no options of a recipe, and what stands for them."""

WithSettings = dict[str, dict[str, Any]]
"""A method or refit by name, with its settings: `{zip: {alpha: 0.1}}`."""

_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Option:
    """One option of a recipe.

    Attributes:
        name: of the parameter, and of the key in a recipe.
        type: what a recipe may hold: numbers, strings, lists and mappings of them.
        default: of `compile_zip`.
        help: from the docstring of `compile_zip`.
    """

    name: str
    type: Any
    default: Any
    help: str

    @property
    def takes_numbers_and_names(self) -> bool:
        """Whether a value may be a number or a string, which differ: `until: 1` is a share, `until: "1"` a module."""
        parts = typing.get_args(self.type)
        return str in parts and (int in parts or float in parts)


def options(function: Callable[..., Any] = fxzip.compile_zip) -> list[Option]:
    """The options that a recipe has for `compile_zip`.

    >>> [option.default for option in options() if option.name in ("until", "verify")]
    [None, True]
    """
    texts = {entry.arg_name: entry.description or "" for entry in parse_docstring(function.__doc__ or "").params}
    return [
        Option(name, _plain(parameter.annotation, name), parameter.default, " ".join(texts.get(name, "").split()))
        for name, parameter in inspect.signature(function, eval_str=True).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ELSEWHERE
    ]


def _plain(hint: Any, name: str) -> Any:
    """What of a type can be written in a recipe; a mapping of settings stands for objects."""
    parts = list(typing.get_args(hint)) if typing.get_origin(hint) in (Union, types.UnionType) else [hint]
    kept = [part for part in parts if _is_plain(part)]
    if len(kept) < len(parts) and name in _REGISTRIES:
        kept.append(WithSettings)
    if not kept:
        raise TypeError(f"`{name}` of `compile_zip` can be written in no recipe: enter it in `ELSEWHERE`.")
    return Union[tuple(kept)]  # noqa: UP007 - of a list


def _is_plain(hint: Any) -> bool:
    if hint in _PLAIN or typing.get_origin(hint) is Literal:
        return True
    holders = (list, tuple, dict, collections.abc.Sequence, collections.abc.Mapping)
    return typing.get_origin(hint) in holders and all(map(_is_plain, typing.get_args(hint)))


def _refits() -> dict[str, Callable[..., Any]]:
    kinds = {name: type(refit) for name, refit in REFITS.items() if name and not inspect.isfunction(refit)}
    return {"lstsq": LeastSquares, **kinds}


_REGISTRIES: Mapping[str, Callable[[], Mapping[str, Callable[..., Any]]]] = {
    "method": lambda: METHODS,
    "refit": _refits,
}


def with_settings(name: str, value: Any) -> Any:
    """The method or refit that a recipe names: a name as it is, `{name: {setting: value}}` as an object.

    >>> with_settings("method", {"zip": {"alpha": 0.1}})
    Zip(alpha=0.1, beta=1.0)
    >>> with_settings("method", "zip")
    'zip'

    Raises:
        RecipeError: the name or a setting is unknown.
    """
    if not isinstance(value, Mapping):
        return value
    known = _REGISTRIES[name]()
    if len(value) != 1 or (kind := next(iter(value))) not in known:
        raise RecipeError(
            f"`{name}` with settings must be one of {', '.join(known)} and its settings; found {dict(value)}. "
            f"Write `{name}: {{{next(iter(known))}: {{setting: value}}}}`."
        )
    try:
        return known[kind](**(value[kind] or {}))
    except (TypeError, ValueError, OptionError) as error:
        settings = ", ".join(inspect.signature(known[kind]).parameters) or "none"
        raise RecipeError(f"`{name}: {kind}` takes the settings {settings}; found {value[kind]}: {error}.") from error

"""Packages that only some recipes need, and functions that a recipe names."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from ...errors import RecipeError


def needed(module: str, extra: str) -> Any:
    """A module of a package that fxzip does without.

    >>> needed("json", "zoo").__name__
    'json'

    Raises:
        RecipeError: it is not installed; the message says how it is.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise RecipeError(
            f"This needs the package `{missing}`, which is not installed. Install it with "
            f"`pip install 'fxzip[{extra}]'`."
        ) from error


def function_of(name: str, where: str) -> Any:
    """What `package.module:function` names. The folder that the command runs in is searched, too.

    >>> function_of("os.path:basename", "data")("a/b")
    'b'

    Raises:
        RecipeError: it cannot be imported, or is no function.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a module does when it is imported
        raise RecipeError(
            f"`{where}` names `{name}`, which cannot be imported from here: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise RecipeError(f"`{where}` must name a function; `{name}` is a `{type(found).__name__}`.")
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error, which may have none.

    >>> first_line(ValueError("wrong\\nat 3")), first_line(EOFError())
    ('wrong', 'EOFError')
    """
    return next(iter(str(error).splitlines()), type(error).__name__)


def called(function: Any, arguments: dict[str, Any], name: str, where: str) -> Any:
    """What a function that a recipe names returns.

    Raises:
        RecipeError: it raises something; the message names it.
    """
    try:
        return function(**arguments)
    except RecipeError:
        raise
    except Exception as error:  # code of the user's, or of a model's package
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise RecipeError(f"`{where}`: `{name}({given})` raised {type(error).__name__}: {error}") from error

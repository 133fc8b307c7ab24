"""Recipes as they stand in files of YAML, and what the command line puts in their place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ...errors import RecipeError
from .recipe import Data, Location

LOCATIONS = ("architecture", "checkpoint", "path", "labels", "classes", "sample_input")
"""Keys whose text is a path, or a name that may hold one; a relative path is relative to where it is written."""

_DATA = ("data", "test")


def read(path: Path) -> dict[str, Any]:
    """What stands in a recipe. Relative paths are relative to it.

    Raises:
        RecipeError: it is missing, or no mapping in YAML.
    """
    try:
        held = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe `{path}`.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe `{path}` cannot be read: {error}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"The recipe `{path}` is no YAML: {error}") from error
    if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
        raise RecipeError(f"The recipe `{path}` must hold `models`, `data` and options by name, as `key: value`.")
    return _located(with_paths(held), str(path.absolute().parent))  # type: ignore[no-any-return]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which no key stands twice, and `1e-3` is a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((name for name in names if isinstance(name, str) and names.count(name) > 1), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"`{twice}` stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _located(value: Any, folder: str, key: str = "") -> Any:
    """Values with the folder that relative paths in them start from. Arguments of functions stay as they are."""
    if isinstance(value, dict):
        inside = {name: own if name == "arguments" else _located(own, folder, name) for name, own in value.items()}
        return inside
    if isinstance(value, str) and key in LOCATIONS:
        return Location(value, cwd=folder)
    return value


def override(values: dict[str, Any], name: str, text: str) -> None:
    """Put a value of the command line in the place of the recipe's. In place.

    >>> values = {"models": {"pets": {"arguments": {"num_classes": 3}}}}
    >>> override(values, "models.pets.arguments.num_classes", "37")
    >>> values["models"]["pets"]["arguments"]
    {'num_classes': 37}

    Raises:
        RecipeError: the value is no YAML, or the name leads into something that has no keys.
    """
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"`--{name}` must be a value in YAML; found {text!r}: {error}") from error
    *path, last = name.split(".")
    if isinstance(value, str) and _names_data(path, last):
        path, last = [*path, last], "path"  # `--data images`, `--test.pets images`
        whole = values.get(path[0])
        if len(path) == 1 and isinstance(whole, dict) and "path" not in whole:
            values[path[0]] = {}  # by task so far, of all from now on
    held = values
    for place, part in enumerate(path):
        if held.get(part) is None:
            held[part] = {}
        held = held[part]
        if not isinstance(held, dict):
            raise RecipeError(f"`--{name}`: `{'.'.join(path[: place + 1])}` is {held!r}, which has no `{last}`.")
    in_arguments = "arguments" in path
    held[last] = value if in_arguments else _located(value, str(Path.cwd()), last)


def _names_data(path: Sequence[str], last: str) -> bool:
    """Whether a key is a whole source of data: `data`, or one task of it."""
    whole = (*path, last)
    own = {field.name for field in fields(Data)}
    return whole[0] in _DATA and (len(whole) == 1 or (len(whole) == 2 and last not in own))


def with_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values in which data and models are mappings, where only a path or an architecture is given.

    >>> with_paths({"data": "images", "test": {"pets": "pets"}})
    {'data': {'path': 'images'}, 'test': {'pets': {'path': 'pets'}}}
    """
    found = {name: _with_path(own) if name in _DATA else own for name, own in values.items()}
    models = found.get("models")
    if isinstance(models, dict):
        found["models"] = {
            task: {"architecture": own} if isinstance(own, (str, Location)) else own for task, own in models.items()
        }
    return found


def _with_path(data: Any) -> Any:
    if isinstance(data, (str, Location)):
        return {"path": data}
    if isinstance(data, dict) and "path" not in data:
        return {task: {"path": own} if isinstance(own, (str, Location)) else own for task, own in data.items()}
    return data

"""Arguments and recipes: what is written becomes typed values, or one message about what is wrong.

A recipe is a file of YAML. `--KEY=VALUE` overrides what stands in it: the key with dots (`--models.pets.checkpoint`),
the value in YAML. jsonargparse holds the result against the dataclasses of `recipe.py` and the options of
`compile_zip`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from ...errors import RecipeError
from .messages import readable
from .options import options, with_settings
from .reading import override, read, with_paths
from .recipe import Data, Location, Model, ZipRecipe


@dataclass(frozen=True)
class Settings:
    """What a command was asked for.

    Attributes:
        flags: what stands on the command line alone: files, `--json`, ...
        keys: what a recipe may hold, typed and with defaults; dataclasses made.
    """

    flags: argparse.Namespace
    keys: Namespace


class Flags(argparse.ArgumentParser):
    """The parser of what stands on the command line alone. Errors end the command with exit code 2."""

    def __init__(self, command: str, summary: str, keys: ArgumentParser | None = None, more: str = "") -> None:
        super().__init__(
            prog=f"fxzip {command}",
            description=textwrap.fill(f"{sentence(summary)} {more}", 78),
            epilog=None if keys is None else _help(keys),
            formatter_class=argparse.RawDescriptionHelpFormatter if keys is not None else argparse.HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--quiet", action="store_true", help="no progress bars, notes and warnings")
        self.add_argument("--debug", action="store_true", help="show where an error came from")

    def json(self) -> None:
        """Let the command take `--json`."""
        self.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")

    def force(self, what: str) -> None:
        """Let the command take `--force`."""
        self.add_argument("--force", action="store_true", help=f"replace {what} that is there")

    def trust(self) -> None:
        """Let the command take `--trust`."""
        self.add_argument(
            "--trust", action="append", default=[], metavar="PACKAGE:FUNCTION",
            help="a function that the folder names and that fxzip does not know; can be given several times",
        )  # fmt: skip


def sentence(summary: str) -> str:
    """A summary as the first sentence of a description.

    >>> sentence("write an .onnx")
    'Write an .onnx.'
    """
    return f"{summary[0].upper()}{summary[1:]}."


def recipe_flags(command: str, summary: str, keys: ArgumentParser) -> Flags:
    """The parser of a command that goes by a recipe."""
    more = (
        "The recipe is a file of YAML. Its keys, listed below, can be given or overridden here, as --KEY=VALUE: "
        "--until=layer3, --data.path=images, --models.pets.checkpoint=pets.pt."
    )
    result = Flags(command, summary, keys, more)
    shown = _Keys(prog="", usage=argparse.SUPPRESS, add_help=False)
    shown.add_class_arguments(Model, "models.TASK")
    shown.add_class_arguments(Data, "data")
    result.epilog = f"{_help(keys)}\n\n{_help(shown)}\n\n`data` and `test` may also be by task: --data.TASK.path=..."
    result.add_argument("recipe", metavar="RECIPE", nargs="?", help="the recipe")
    result.add_argument("--print_config", action="store_true", help="print the recipe with overrides and defaults")
    result.json()
    return result


class _Keys(ArgumentParser):
    """A parser of what recipes hold. It raises `RecipeError`s."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # made by jsonargparse for a part of the values
            super().error(message, ex)
        raise RecipeError(readable(message)) from ex


def keys_of(kind: type, skip: Sequence[str] = ()) -> ArgumentParser:
    """The keys that the fields of a dataclass stand for."""
    result = _Keys(prog="", usage=argparse.SUPPRESS, add_help=False)
    result.add_class_arguments(kind, skip=set(skip))
    return result


def recipe_keys() -> ArgumentParser:
    """The keys of recipes: which networks, which data, and the options of `compile_zip`."""
    result = keys_of(ZipRecipe)
    group = result.add_argument_group("options of compile_zip")
    for option in options():
        group.add_argument(f"--{option.name}", type=option.type, default=option.default, help=option.help)
    return result


def _help(keys: ArgumentParser) -> str:
    """What keys there are, for the help of a command."""
    text = re.sub(r"^ *--[\w.]+\.help.*\n(?: {20,}.*\n)*", "", keys.format_help(), flags=re.MULTILINE)
    text = re.sub(r", --[\w.]+\+ (?:\w+|\[ITEM,\.\.\.\])", "", text)
    text = re.sub(r"^ *--\S+ CONFIG +Path to a configuration file\.\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\(type:\s+Optional\[dict\[str, str \|.*?default:\s+null\)", "(a mapping)", text, flags=re.DOTALL)
    return text.replace("Path_", "path").strip("\n")


def parse(flags: Flags, keys: ArgumentParser | None, arguments: Sequence[str], recipe: str | None = None) -> Settings:
    """Read the arguments of a command.

    Args:
        flags: what stands on the command line alone.
        keys: what a recipe may hold, and the command line overrides; None: nothing.
        arguments: of the command line.
        recipe: the name among `flags` under which the recipe stands; None: the command has none, or an optional one.

    Raises:
        RecipeError: the recipe cannot be read, or holds something else.
    """
    known = [] if keys is None else _names(keys)
    rest, overrides = _separated(flags, arguments, known)
    found, unknown = flags.parse_known_args(rest)
    if unknown:
        name = unknown[0].partition("=")[0].removeprefix("--").partition(".")[0]
        near = difflib.get_close_matches(name, known, n=1)
        flags.error(f"there is no {unknown[0]}." + (f" Did you mean --{near[0]}?" if near else ""))
    file = None if recipe is None else getattr(found, recipe)
    values = {} if file is None else read(Path(file))
    for name, text in overrides:
        override(values, name, text)
    if keys is None:
        return Settings(found, Namespace())
    if getattr(found, "print_config", False):
        print(yaml.safe_dump(_plain(_typed(keys, values, make=False)), sort_keys=False), end="")
        raise SystemExit(0)
    return Settings(found, _typed(keys, values))


def _separated(flags: Flags, arguments: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Arguments of the command line alone, and overrides of keys with their values."""
    rest: list[str] = []
    overrides: list[tuple[str, str]] = []
    pending = iter(arguments)
    for token in pending:
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or name.partition(".")[0] not in known:
            rest.append(token)
        elif equals:
            overrides.append((name, value))
        elif (following := next(pending, None)) is None:
            flags.error(f"--{name} needs a value: --{name}=VALUE.")
        else:
            overrides.append((name, following))
    return rest, overrides


def _names(keys: ArgumentParser) -> list[str]:
    """The keys of the outermost level."""
    return [action.dest for action in keys._actions if "." not in action.dest and action.option_strings]


def _typed(keys: ArgumentParser, values: Mapping[str, Any], *, make: bool = True) -> Namespace:
    """Values held against their types, with defaults; `make`: dataclasses made of them.

    Raises:
        RecipeError: a key is missing or unknown, or a value is of another type.
    """
    found: Namespace = keys.parse_object(with_paths(values))
    return keys.instantiate(found) if make else found


def _plain(value: Any) -> Any:
    """Typed values as they are written in a recipe in the current folder."""
    if isinstance(value, Location):
        return value.relative if value.cwd == str(Path.cwd()) or ":" in value.relative else value.absolute
    if isinstance(value, Namespace):
        return {name: _plain(own) for name, own in vars(value).items()}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(own) for name, own in value.items()}
    return [_plain(own) for own in value] if isinstance(value, (list, tuple)) else value


def recipe_of(keys: Namespace) -> ZipRecipe:
    """The recipe of typed keys."""
    return ZipRecipe(**{own.name: keys[own.name] for own in fields(ZipRecipe)})


def recipe_in(path: Path) -> ZipRecipe:
    """The recipe of a file.

    Raises:
        RecipeError: see `parse`.
    """
    return recipe_of(_typed(recipe_keys(), read(path)))


def option_values(keys: Namespace) -> dict[str, Any]:
    """The options of a recipe by name; methods and refits with settings are made."""
    return {option.name: with_settings(option.name, keys[option.name]) for option in options()}


def changed(values: Mapping[str, Any]) -> list[str]:
    """Names of the options whose value is not the default."""
    return [option.name for option in options() if values[option.name] != option.default]

"""`fxzip compare recipe.yaml` and `fxzip sweep recipe.yaml`: several zips in one table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import fxzip
from fxzip.tools.table import FIXED

from ...errors import Interrupted, RecipeError
from .judging import labelled_batches
from .options import with_settings
from .output import Result, as_csv, check_target, write_whole
from .parsing import Settings, changed, option_values, parse, recipe_flags, recipe_keys, recipe_of
from .preparing import Prepared, note, prepare
from .recipe import ZipRecipe

COMPARE = "zip the networks of a recipe by several methods, in one table"
SWEEP = "zip the networks of a recipe at several cuts or costs, in one table"
SUFFIXES = (".csv", ".json", ".html")


def compare_settings(arguments: Sequence[str]) -> Settings:
    """What `fxzip compare` is asked for."""
    return _settings("compare", COMPARE, arguments)


def sweep_settings(arguments: Sequence[str]) -> Settings:
    """What `fxzip sweep` is asked for."""
    return _settings("sweep", SWEEP, arguments)


def _settings(command: str, summary: str, arguments: Sequence[str]) -> Settings:
    keys = recipe_keys()
    flags = recipe_flags(command, summary, keys)
    flags.add_argument("--out", type=Path, metavar="FILE", help=f"a file for the table: {' or '.join(SUFFIXES)}")
    flags.force("a file")
    return parse(flags, keys, arguments, recipe="recipe")


def compare(asked: Settings) -> Result:
    """A row for each method at each cut."""
    recipe = recipe_of(asked.keys)
    given: dict[str, Any] = {}
    if recipe.methods is not None:
        given["methods"] = [_method(entry, f"methods[{place}]") for place, entry in enumerate(recipe.methods)]
    if recipe.cuts is not None:
        given["cuts"] = recipe.cuts
    return _table(asked, recipe, fxzip.compare, given)


def sweep(asked: Settings) -> Result:
    """A row for each cut at each cost."""
    recipe = recipe_of(asked.keys)
    given = {name: value for name in ("cuts", "max_costs") if (value := getattr(recipe, name)) is not None}
    return _table(asked, recipe, fxzip.sweep, given)


def _table(asked: Settings, recipe: ZipRecipe, function: Callable[..., fxzip.Table], given: dict[str, Any]) -> Result:
    target, quiet = asked.flags.out, asked.flags.quiet
    if target is not None:
        if target.suffix not in SUFFIXES:
            raise RecipeError(f"`--out` must end in {' or '.join(SUFFIXES)}; found `{target}`.")
        check_target(target, force=asked.flags.force)
    values = option_values(asked.keys)
    known = inspect.signature(function).parameters
    unused = [name for name in changed(values) if name not in known]
    if recipe.data is None:
        raise RecipeError(f"`fxzip {function.__name__}` needs `data`: a fifth of it is held out to compare on.")
    made = prepare(recipe)
    for text in [*made.notes, *_unused(function.__name__, unused)]:
        note(text, quiet=quiet)
    options = {name: value for name, value in values.items() if name in known}
    interrupted = ""
    try:
        table = function(
            list(made.modules.values()), made.sample, data=_in_order(made.batches), score=_score(made),
            progress=False if quiet else None, **options, **given,
        )  # fmt: skip
    except Interrupted as stop:
        table, interrupted = stop.table, "interrupted; the table has the rows that were done"
    result = Result(str(table), {"rows": list(table), "note": table.note}, interrupted)
    if target is not None:
        _write(target, table, result, " + ".join(map(str, recipe.models)))
    return result


def _write(target: Path, table: fxzip.Table, result: Result, title: str) -> None:
    """The table as its file's suffix says."""
    if target.suffix == ".html":
        target.parent.mkdir(parents=True, exist_ok=True)
        table.html(target, title=title)
    elif target.suffix == ".csv":
        write_whole(target, as_csv(table, [*FIXED[:-2], *table.scores, *FIXED[-2:]]))
    else:
        write_whole(target, result.as_json() + "\n")


def _unused(command: str, names: Sequence[str]) -> list[str]:
    """A note where a recipe says something that a command does not go by."""
    listed = ", ".join(f"`{name}`" for name in names)
    return [f"`fxzip {command}` does not go by {listed} of the recipe"] if names else []


def _in_order(batches: Any) -> Any:
    """Data by task as `compare` takes them, whose models have no names."""
    return fxzip.PerModel(*batches.values()) if isinstance(batches, dict) else batches


def _score(made: Prepared) -> Callable[[nn.Module], dict[str, float]] | None:
    """The accuracy of each head on `test` data, where they are labelled."""
    if not made.test or not all(own.labelled for own in made.test.values()):
        return None
    if None in made.test:
        raise RecipeError("`test` with labels must be by task, for labels count the classes of one head each.")
    tasks = list(made.networks)

    def score(network: nn.Module) -> dict[str, float]:
        batches = labelled_batches(network, {str(task): own for task, own in made.test.items()}, made.device)
        found = fxzip.evaluate(network, fxzip.PerModel(*batches.values()), max_batches=2**62)
        return dict(zip(tasks, found.per_task, strict=True))

    return score


def _method(entry: Any, where: str) -> Any:
    """A method of `compare`: a name, a name with settings, or a pair of one with a refit."""
    if not isinstance(entry, list):
        return with_settings("method", entry)
    if len(entry) != 2:
        raise RecipeError(f"`{where}` must be a method, or a pair [method, refit]; found {entry}.")
    return (with_settings("method", entry[0]), with_settings("refit", entry[1]))

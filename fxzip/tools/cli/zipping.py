"""`fxzip zip recipe.yaml --out folder`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fxzip

from ...errors import Interrupted
from .output import Result, check_target
from .parsing import Settings, option_values, parse, recipe_flags, recipe_keys, recipe_of
from .preparing import note, prepare

SUMMARY = "zip the networks of a recipe, and save the zipped network in a folder"


def settings(arguments: Sequence[str]) -> Settings:
    """What the command is asked for."""
    keys = recipe_keys()
    flags = recipe_flags("zip", SUMMARY, keys)
    needed = "--print_config" not in arguments
    flags.add_argument("--out", type=Path, metavar="FOLDER", required=needed, help="the folder, for `fxzip.load`")
    flags.force("a zipped network")
    return parse(flags, keys, arguments, recipe="recipe")


def run(asked: Settings) -> Result:
    """Zip, save, and give the report."""
    folder, quiet = asked.flags.out, asked.flags.quiet
    check_target(folder, force=asked.flags.force, folder=True)
    values = option_values(asked.keys)
    made = prepare(recipe_of(asked.keys), values["method"], values["refit"])
    for text in made.notes:
        note(text, quiet=quiet)
    progress = False if quiet else None
    interrupted = ""
    try:
        zipped = fxzip.compile_zip(made.modules, made.sample, data=made.batches, progress=progress, **values)
    except Interrupted as stop:  # a search that has found something
        zipped, interrupted = stop.zipped, f"the search was interrupted; the best network so far is in `{folder}`"
    zipped.meta["fxzip_report"] = _with_sources(zipped.report, made.preprocessing, made.notes)
    fxzip.save(zipped, folder)
    text = f"{zipped.report}\nsaved in `{folder}`"
    return Result(text, {"folder": str(folder.absolute()), "report": zipped.report.as_dict()}, interrupted)


def _with_sources(report: fxzip.Report, preprocessing: dict[str, Any], notes: list[str]) -> fxzip.Report:
    """The report with what was known here alone; `fxzip evaluate` reads images by it."""
    known = {"preprocessing": preprocessing} if preprocessing else {}
    return fxzip.Report({**report, **known}).noting(*notes)

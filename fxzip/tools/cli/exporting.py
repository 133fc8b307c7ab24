"""`fxzip export folder model.onnx`: a zipped network for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fxzip

from ...errors import RecipeError
from .evaluating import opened_folder
from .output import Result, check_target
from .parsing import Flags, Settings, parse

SUMMARY = "write a zipped network as .onnx or .pt2, and check the file by running it"
SUFFIXES = (".onnx", ".pt2")


def settings(arguments: Sequence[str]) -> Settings:
    """What the command is asked for."""
    flags = Flags("export", SUMMARY)
    flags.add_argument("folder", type=Path, help="of `fxzip zip`")
    flags.add_argument("path", type=Path, help="the file, which ends in .onnx or .pt2")
    flags.add_argument("--task", help="write the network of this task alone")
    flags.trust()
    flags.force("a file")
    flags.json()
    return parse(flags, None, arguments)


def run(asked: Settings) -> Result:
    """Load, export, and say what the outputs are called."""
    flags = asked.flags
    if flags.path.suffix not in SUFFIXES:
        raise RecipeError(f"The file must end in {' or '.join(SUFFIXES)}; found `{flags.path}`.")
    check_target(flags.path, force=flags.force)
    zipped = opened_folder(flags.folder, flags.trust)
    if flags.task is not None and flags.task not in zipped.tasks:
        known = ", ".join(zipped.tasks) or "none by name"
        raise RecipeError(f"`--task` must be one of the tasks, {known}; found `{flags.task}`.")
    network = zipped if flags.task is None else zipped.single(flags.task)
    flags.path.parent.mkdir(parents=True, exist_ok=True)
    fxzip.export(network, flags.path)
    outputs = list(zipped.tasks) or [f"head_{k}" for k in range(len(zipped.heads))]
    if flags.task is not None:
        outputs = [flags.task]
    names = ", ".join(map(str, outputs))
    text = f"wrote `{flags.path}` with the outputs {names}; it gives what the zipped network gives"
    return Result(text, {"path": str(flags.path.absolute()), "outputs": outputs})

"""`fxzip inspect MODEL`: feature spaces, ties, barriers and cuts of one network, or the report of a zipped one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import fxzip

from .evaluating import opened
from .models import network
from .output import Result
from .parsing import Flags, Settings, keys_of, parse
from .preparing import note, traced_with
from .recipe import Location, Model, ZipRecipe

SUMMARY = "show which features of a network belong together, and where `until` may cut; or the report of a zipped one"


@dataclass
class Keys(Model):
    """A network, as a recipe has it, and what it is traced with.

    Args:
        architecture: `timm:NAME`, `torchvision:NAME`, `transformers:FOLDER`, or `package.module:function`.
        sample_input: a shape, the batch first, for random numbers, or `package.module:function`.
        verify: check the spaces by relabelling at random.
    """

    sample_input: Location | list[int] | None = None
    verify: bool = True


def settings(arguments: Sequence[str]) -> Settings:
    """What the command is asked for."""
    keys = keys_of(Keys, skip=["architecture"])
    flags = Flags("inspect", SUMMARY, keys)
    kinds = "`timm:NAME`, `torchvision:NAME`, `transformers:FOLDER`, `package.module:function`"
    flags.add_argument("model", metavar="MODEL", help=f"{kinds}, or a folder of `fxzip zip`")
    flags.trust()
    flags.json()
    return parse(flags, keys, arguments)


def run(asked: Settings) -> Result:
    """Build the network, with random weights if no others are named, and look into it."""
    name = asked.flags.model
    if (Path(name) / "fxzip.json").is_file():
        report = opened(Path(name), asked.flags.trust).report
        return Result(str(report), report.as_dict())
    given = {own.name: asked.keys[own.name] for own in fields(Model) if own.name != "architecture"}
    made = network(Model(Location(name), **given), "MODEL", weights=False)
    for text in made.notes:
        note(text, quiet=asked.flags.quiet)
    recipe = ZipRecipe({}, sample_input=asked.keys.sample_input)
    found = fxzip.inspect(made.module, traced_with(recipe, {"MODEL": made}, {}), verify=asked.keys.verify)
    return Result(str(found), _values(found))


def _values(found: Any) -> dict[str, Any]:
    spaces = [
        {"name": space.name, "size": space.size, "legality": space.legality, "reason": space.reason}
        for space in found.spaces
    ]
    barriers = [barrier.reason for barrier in found.barriers]
    return {
        "traced": found.rung, "self_check": found.error, "spaces": spaces, "ties": found.ties, "barriers": barriers,
        "fixed": found.fixed, "cuts": found.cuts, "notes": found.notes,
    }  # fmt: skip

"""`fxzip report folder`: a page that shows a zipped network in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..pages import write_page
from .evaluating import opened_folder
from .output import Result, check_target
from .parsing import Flags, Settings, parse

SUMMARY = "write a page of HTML that shows a zipped network: tasks, graph, spaces, and why sharing stops"


def settings(arguments: Sequence[str]) -> Settings:
    """What the command is asked for."""
    flags = Flags("report", SUMMARY)
    flags.add_argument("folder", type=Path, help="of `fxzip zip`")
    flags.add_argument("--out", type=Path, metavar="PAGE", help="the file (default: beside the folder, FOLDER.html)")
    flags.trust()
    flags.force("a file")
    flags.json()
    return parse(flags, None, arguments)


def run(asked: Settings) -> Result:
    """Load, write the page, and say where it is."""
    flags = asked.flags
    folder = flags.folder.absolute()
    path = flags.out or folder.with_name(f"{folder.name}.html")
    check_target(path, force=flags.force)
    zipped = opened_folder(flags.folder, flags.trust)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(zipped, path)
    text = f"wrote `{path}`, which a browser shows: {len(zipped.graph.nodes)} nodes"
    return Result(text, {"path": str(path.absolute()), "nodes": len(zipped.graph.nodes)})

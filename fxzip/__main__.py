"""The command `fxzip`, and `python -m fxzip`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fxzip import __version__
from fxzip.errors import FxzipError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status, 1 for an error that fxzip names."""
    settings = parser().parse_args(argv)
    try:
        settings.command(settings)
    except FxzipError as error:
        print(f"fxzip: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of every subcommand; `command` is the function that runs it."""
    result = argparse.ArgumentParser(prog="fxzip", description="Zip trained networks into one, without training.")
    result.add_argument("--version", action="version", version=f"fxzip {__version__}")
    commands = result.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="train two networks on digits, zip them, and compare"))
    return result


def _add_demo(demo: argparse.ArgumentParser) -> None:
    from fxzip.tools.demo import EPOCHS

    demo.description = "Train two small networks on disjoint digits, zip them by each method, and compare."
    demo.add_argument("--seed", type=int, default=0, help="of the split, the networks and the training")
    demo.add_argument("--epochs", type=_positive, default=EPOCHS, help="epochs of training (default: %(default)s)")
    demo.add_argument("--output", default="zipped.pt2", help="where the zipped program goes (default: %(default)s)")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(command=_run_demo)


def _run_demo(settings: argparse.Namespace) -> None:
    from fxzip.tools import demo

    demo.run(seed=settings.seed, epochs=settings.epochs, output=settings.output, quiet=settings.quiet)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; found {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())

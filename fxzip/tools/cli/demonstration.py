"""`fxzip demo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fxzip.tools import demo

from .parsing import Flags, Settings, parse

SUMMARY = "train two small networks that read numbers, merge them in several ways, and compare"


def settings(arguments: Sequence[str]) -> Settings:
    """What the command is asked for."""
    flags = Flags("demo", SUMMARY)
    flags.add_argument("--seed", type=int, default=0, help="of the split, the networks and the training")
    flags.add_argument("--epochs", type=_positive, default=demo.EPOCHS, help="of training (default: %(default)s)")
    flags.add_argument(
        "--output",
        default="zipped.pt2",
        help="where the zipped program goes; a saved folder and a page lie beside it (default: %(default)s)",
    )
    return parse(flags, None, arguments)


def run(asked: Settings) -> None:
    """Run it; it prints as it goes."""
    flags = asked.flags
    demo.run(seed=flags.seed, epochs=flags.epochs, output=flags.output, quiet=flags.quiet)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; found {number}")
    return number

"""The command `fxzip`: chooses among its commands, prints what they give, and ends with an exit code.

0: done. 1: an error. 2: the arguments or the recipe are wrong. 130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fxzip

from ...errors import CutError, FxzipError, FxzipWarning, InputError, OptionError, RecipeError
from . import comparing, demonstration, evaluating, exporting, inspecting, reporting, zipping
from .output import Result
from .parsing import Settings

_USAGE = (RecipeError, OptionError, CutError, InputError)


@dataclass(frozen=True)
class Command:
    """A command: its summary, how its arguments are read, and what it does."""

    summary: str
    settings: Callable[[Sequence[str]], Settings]
    run: Callable[[Settings], Result | None]


COMMANDS = {
    "zip": Command(zipping.SUMMARY, zipping.settings, zipping.run),
    "compare": Command(comparing.COMPARE, comparing.compare_settings, comparing.compare),
    "sweep": Command(comparing.SWEEP, comparing.sweep_settings, comparing.sweep),
    "inspect": Command(inspecting.SUMMARY, inspecting.settings, inspecting.run),
    "evaluate": Command(evaluating.SUMMARY, evaluating.settings, evaluating.run),
    "export": Command(exporting.SUMMARY, exporting.settings, exporting.run),
    "report": Command(reporting.SUMMARY, reporting.settings, reporting.run),
    "demo": Command(demonstration.SUMMARY, demonstration.settings, demonstration.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        _overview().parse_args(arguments)  # ends here: --help, --version, or no such command
    command, debug = COMMANDS[arguments[0]], "--debug" in arguments
    try:
        asked = command.settings(arguments[1:])
        with _messages(quiet=asked.flags.quiet):
            result = _run(command, asked)
        if result is not None:
            print(result.as_json() if asked.flags.json else result.text, flush=True)
        if result is not None and result.interrupted:
            print(f"fxzip: {result.interrupted}", file=sys.stderr)
            return 130
    except KeyboardInterrupt:
        print("fxzip: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read stdout has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _failed(error, debug=debug)
    return 0


def _run(command: Command, asked: Settings) -> Result | None:
    """Run a command. What packages print on the way goes to stderr, so that stdout holds the result alone."""
    if command.run is demonstration.run:
        return command.run(asked)
    with contextlib.redirect_stdout(sys.stderr):
        return command.run(asked)


def _failed(error: Exception, *, debug: bool) -> int:
    """Say what went wrong. Errors of fxzip speak for themselves; of others, the kind is named."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, FxzipError):
        print(f"fxzip: {error}", file=sys.stderr)
    else:
        hint = "" if debug else " `--debug` shows where it came from."
        print(f"fxzip: {type(error).__name__}: {error}{hint}", file=sys.stderr)
    return 2 if isinstance(error, _USAGE) else 1


@contextlib.contextmanager
def _messages(*, quiet: bool) -> Iterator[None]:
    """Warnings of fxzip as one line each, those of other packages not at all."""

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, FxzipWarning) and not quiet:
            print(f"fxzip: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _overview() -> argparse.ArgumentParser:
    """What there is."""
    lines = [f"  {name:10}{own.summary}" for name, own in COMMANDS.items()]
    result = argparse.ArgumentParser(
        prog="fxzip",
        usage="fxzip COMMAND ...",
        description="Zip trained networks into one, without training.",
        epilog="commands:\n"
        + "\n".join(lines)
        + "\n\n`fxzip COMMAND --help` says what it takes; docs/cli.md has recipes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--version", action="version", version=f"fxzip {fxzip.__version__}")
    result.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return result

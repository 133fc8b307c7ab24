"""The command `fxzip`, and `python -m fxzip`."""

from __future__ import annotations

import sys

from .tools.cli.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

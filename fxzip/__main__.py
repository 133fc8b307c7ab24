"""`python -m fxzip` is the command `fxzip`."""

import sys

from fxzip.cli import main

if __name__ == "__main__":
    sys.exit(main())

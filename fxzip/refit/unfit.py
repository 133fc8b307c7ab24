"""What cannot be fitted, found out while it is tried."""

from __future__ import annotations


class Unfit(Exception):
    """A unit that cannot be fitted; the message says why, and completes "left as zipped, since". It keeps its weights.

    `restart` names the unit where others were fitted in the belief that it would be, too.
    """

    restart: str = ""

"""Axes to draw on, from matplotlib, which is imported only when something is drawn."""

from __future__ import annotations

from typing import Any

from ..errors import FxzipError


def axes(ax: Any = None) -> Any:
    """The axes given, or those of a new figure.

    Raises:
        FxzipError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise FxzipError(
            "`plot` needs matplotlib, which is not installed here. Install it with `pip install 'fxzip[plot]'`; the "
            "numbers are in the object itself."
        ) from error
    return pyplot.figure().add_subplot()

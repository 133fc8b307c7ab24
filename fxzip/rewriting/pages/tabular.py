"""Rows of a table of zips: their columns, the texts of their cells, and where they lie in a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .content import Point

FIXED = (
    "method",
    "refit",
    "until",
    "max_cost",
    "cost",
    "parameters",
    "latency",
    "agreement",
    "worst",
    "seconds",
    "error",
)
"""Keys of every row; what the score function gives stands between "worst" and "seconds"."""
TEXTS = FIXED[:3]
"""Columns of text; the others are numbers."""
BOUND = "side by side"
"""The method of the row in which nothing is merged."""


def scores(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the user's scores, in the order in which rows have them.

    >>> scores([{"method": "zip", "cost": 1.0, "latency": 1.1, "mean IoU": 0.7}])
    ('mean IoU',)
    """
    return tuple(dict.fromkeys(key for row in rows for key in row if key not in FIXED))


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that hold something, and "until"."""
    names = [*FIXED[:-2], *scores(rows), "seconds"]
    return [name for name in names if name == "until" or any(row.get(name) is not None for row in rows)]


def cell(name: str, row: Mapping[str, Any]) -> str:
    """The text of one cell.

    >>> cell("until", {"method": "zip", "until": None}), cell("cost", {"cost": 1.0}), cell("worst", {})
    ('heads', '1.000', '')
    """
    value = row.get(name)
    if name == "until":
        return "heads" if value is None and row.get("method") != BOUND else str(value or "")
    if value is None:
        return ""
    return f"{value:.1f}" if name == "seconds" else f"{value:.3f}" if isinstance(value, float) else str(value)


def points_of(rows: Sequence[Mapping[str, Any]], measure: str) -> list[Point]:
    """Rows that have the measure, as points over their cost: a line per method and refit, and per cut where widths are
    by need; each point with the cut, or the cost asked for, that it is of.

    >>> row = {"method": "zip", "refit": "repair", "until": "layer1", "cost": 1.4, "worst": 0.9}
    >>> [(point.line, point.label, point.value) for point in points_of([row, row | {"max_cost": 1.2}], "worst")]
    [('zip + repair', 'layer1', 0.9), ('zip + repair until layer1', '≤ 1.2 ×', 0.9)]
    """
    points = []
    for row in rows:
        value = row.get(measure)
        if row.get("error") is not None or value is None:
            continue
        if row["method"] == BOUND:
            points.append(Point("", BOUND, row["cost"], value))
            continue

        line, cut, limit = str(row["method"]), cell("until", row), row.get("max_cost")
        if row.get("refit") is not None:
            line += f" + {row['refit']}"
        if limit is not None:
            line, cut = f"{line} until {cut}", f"≤ {limit:g} ×"
        points.append(Point(line, cut, row["cost"], value))
    return points

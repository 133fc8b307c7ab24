"""What `sweep` and `compare` return: rows of plain values that print as a table and draw as a figure."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..rewriting.pages import Point, TablePage, fragment, table_html, tabular, write_html
from ..rewriting.pages.tabular import BOUND, FIXED, TEXTS
from .plotting import axes

_MEASURES = {
    "agreement": "agreement with the originals (share of inputs)",
    "worst": "agreement of the worst head (share of inputs)",
    "parameters": "parameters (× the first model)",
    "latency": "latency (× the first model)",
    "seconds": "time of matching, rewriting and refit (s)",
}


@dataclass(frozen=True, eq=False)
class Table(Sequence[Mapping[str, Any]]):
    """Rows of dicts. `print` it.

    >>> table = Table(({"method": "zip", "until": None, "cost": 1.0, "agreement": 0.9},))
    >>> table[0]["agreement"], len(table)
    (0.9, 1)
    >>> print(table)
    method  until   cost  agreement
    -------------------------------
    zip     heads  1.000      0.900

    Attributes:
        rows: one zip each, with the keys "method", "refit", "until", "max_cost" (what widths by need may take, else
            None), "cost" (FLOPs), "parameters" and "latency" (of the zip, relative to the first model), "agreement"
            (mean over the heads), "worst" (of the heads), the user's scores, "seconds" (of matching, rewriting and
            refit), and "error": None, or why there is no zip.
        note: what holds for all rows.
    """

    rows: tuple[Mapping[str, Any], ...]
    note: str = ""

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the user's scores."""
        return tabular.scores(self.rows)

    def __str__(self) -> str:
        names = tabular.columns(self.rows)
        cells = [names, *([tabular.cell(name, row) for name in names] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if name in TEXTS else cell.rjust(width)
                for name, cell, width in zip(names, line, widths, strict=True)
            ).rstrip()
            for line in cells
        ]
        for place, row in enumerate(self.rows, 1):
            if row.get("error"):
                lines[place] += f"  failed: {row['error']}"
        ruled = [lines[0], "-" * len(lines[0]), *lines[1:]]
        return "\n".join([*ruled, *([self.note] if self.note else [])])

    __repr__ = __str__

    def plot(self, ax: Any = None, *, y: str | None = None) -> Any:
        """Draw `y` (the first score, else the agreement) over the cost, a line per method, and per cut where widths are
        by need; each point with the cut it is of. What all models side by side reach is a dashed line. Returns
        matplotlib axes."""
        ax = axes(ax)
        y = self._measure(y)
        lines: dict[str, list[Point]] = {}
        for point in tabular.points_of(self.rows, y):
            lines.setdefault(point.line or BOUND, []).append(point)
        named: set[tuple[str, float]] = set()
        for line, points in lines.items():
            if line == BOUND:
                _draw_bound(ax, points[0])
                continue
            points.sort(key=lambda point: (point.cost, point.value))
            ax.plot([point.cost for point in points], [point.value for point in points], marker="o", label=line)
            for point in points:
                if (point.label, round(point.cost, 2)) not in named:  # several lines at one cut share its name
                    ax.annotate(point.label, (point.cost, point.value), xytext=(0, -13), textcoords="offset points",
                                fontsize="small", ha="center")  # fmt: skip
                named.add((point.label, round(point.cost, 2)))
        ax.set_title(f"Cost against {'agreement' if y == 'worst' else y}")
        ax.set_xlabel("FLOPs (× the first model)")
        ax.set_ylabel(_MEASURES.get(y, y))
        ax.legend()
        return ax

    def html(self, path: str | os.PathLike[str], *, y: str | None = None, title: str = "Zips compared") -> None:
        """Write a page: the plot of `y` (the first score, else the agreement) over the cost, and all rows. It is one
        file without scripts, which a browser shows without a network.

        >>> import tempfile
        >>> row = {"method": "zip", "refit": "repair", "until": None, "cost": 1.0, "agreement": 0.9}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Table((row, row | {"until": "layer1", "cost": 1.4})).html(f"{folder}/table.html")
        ...     print(open(f"{folder}/table.html", encoding="utf-8").read()[:15])
        <!DOCTYPE html>

        Args:
            path: of the file, which is replaced if there is one.
            y: a column of numbers, as in `plot`.
            title: of the page.
        """
        y = self._measure(y)
        page = TablePage(
            title, _MEASURES.get(y, y).partition(" (")[0], tuple(tabular.points_of(self.rows, y)), **self._content(),
            version=str(getattr(sys.modules[__name__.partition(".")[0]], "__version__", "")),
        )  # fmt: skip
        write_html(path, table_html(page))

    def _repr_html_(self) -> str:
        """The table as notebooks show it."""
        return fragment("table.html", **self._content())

    def _measure(self, y: str | None) -> str:
        return y or next(iter(self.scores), "agreement")

    def _content(self) -> dict[str, Any]:
        """Columns and cells, for a template."""
        names = tabular.columns(self.rows)
        cells = [{"cells": [tabular.cell(name, row) for name in names], "error": row.get("error")} for row in self.rows]
        texts = sum(name in TEXTS for name in names)
        return {"head": names, "rows": cells, "texts": texts, "notes": [self.note] if self.note else []}


def _draw_bound(ax: Any, point: Point) -> None:
    """What the models side by side reach: a dashed line with their cost."""
    ax.axhline(point.value, linestyle="--", color="0.5", label=point.label)
    ax.annotate(f"{point.label}, at {point.cost:.2f} ×", (0.01, point.value), xycoords=("axes fraction", "data"),
                xytext=(0, 3), textcoords="offset points", fontsize="small", color="0.4")  # fmt: skip


__all__ = ["FIXED", "Table"]

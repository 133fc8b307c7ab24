"""What `sweep` and `compare` return: rows of plain values that print as a table and draw as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..rewriting.pages import fragment
from .plotting import axes

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
_BOUND = "side by side"
_MEASURES = {
    "agreement": "agreement with the originals (share of inputs)",
    "worst": "agreement of the worst head (share of inputs)",
    "parameters": "parameters (× the first model)",
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
        return tuple(dict.fromkeys(key for row in self.rows for key in row if key not in FIXED))

    def __str__(self) -> str:
        names = self._columns()
        cells = [names, *([_cell(name, row) for name in names] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if name in FIXED[:3] else cell.rjust(width)
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
        y = y or next(iter(self.scores), "agreement")
        named: set[tuple[str, float]] = set()
        for label, rows in self._lines(y).items():
            if label == _BOUND:
                cost = rows[0]["cost"]
                ax.axhline(rows[0][y], linestyle="--", color="0.5", label=label)
                ax.annotate(f"{label}, at {cost:.2f} ×", (0.01, rows[0][y]), xycoords=("axes fraction", "data"),
                            xytext=(0, 3), textcoords="offset points", fontsize="small", color="0.4")  # fmt: skip
                continue
            rows = sorted(rows, key=lambda row: (row["cost"], row[y]))
            ax.plot([row["cost"] for row in rows], [row[y] for row in rows], marker="o", label=label)
            for row in rows:
                name = f"≤ {row['max_cost']:g} ×" if row.get("max_cost") is not None else _cell("until", row)
                if (name, round(row["cost"], 2)) not in named:  # several lines at one cut share its name
                    ax.annotate(name, (row["cost"], row[y]), xytext=(0, -13), textcoords="offset points",
                                fontsize="small", ha="center")  # fmt: skip
                named.add((name, round(row["cost"], 2)))
        ax.set_title(f"Cost against {'agreement' if y == 'worst' else y}")
        ax.set_xlabel("FLOPs (× the first model)")
        ax.set_ylabel(_MEASURES.get(y, y))
        ax.legend()
        return ax

    def _lines(self, y: str) -> dict[str, list[Mapping[str, Any]]]:
        """Rows that have `y`, by the line that they belong to."""
        lines: dict[str, list[Mapping[str, Any]]] = {}
        for row in self.rows:
            if row.get("error") is None and row.get(y) is not None:
                refit = "" if row.get("refit") is None else f" + {row['refit']}"
                cut = "" if row.get("max_cost") is None else f" until {_cell('until', row)}"
                lines.setdefault(f"{row['method']}{refit}{cut}", []).append(row)
        return lines

    def _repr_html_(self) -> str:
        """The table as notebooks show it."""
        names = self._columns()
        rows = [{"cells": [_cell(name, row) for name in names], "error": row.get("error")} for row in self.rows]
        texts = sum(name in FIXED[:3] for name in names)
        return fragment("table.html", head=names, rows=rows, texts=texts, notes=[self.note] if self.note else [])

    def _columns(self) -> list[str]:
        """The columns that hold something."""
        names = [*FIXED[:-2], *self.scores, "seconds"]
        return [n for n in names if n == "until" or any(row.get(n) is not None for row in self.rows)]


def _cell(name: str, row: Mapping[str, Any]) -> str:
    value = row.get(name)
    if name == "until":
        return "heads" if value is None and row.get("method") != "side by side" else str(value or "")
    if value is None:
        return ""
    return f"{value:.1f}" if name == "seconds" else f"{value:.3f}" if isinstance(value, float) else str(value)

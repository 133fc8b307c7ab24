"""What `sweep` and `compare` return: rows of plain values that print as a table and draw as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plotting import axes

FIXED = ("method", "refit", "until", "max_cost", "cost", "parameters", "agreement", "worst", "seconds", "error")
"""Keys of every row; what the score function gives stands between "worst" and "seconds"."""


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
            None), "cost" and "parameters" (of the zip, relative to the first model), "agreement" (mean over the heads),
            "worst" (of the heads), the user's scores, "seconds" (of matching, rewriting and refit), and "error": None,
            or why there is no zip.
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
        names = [*FIXED[:-2], *self.scores, "seconds"]
        names = [n for n in names if n == "until" or any(row.get(n) is not None for row in self.rows)]
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
        by need. Returns matplotlib axes."""
        ax = axes(ax)
        y = y or next(iter(self.scores), "agreement")
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            if row.get("error") is None and row.get(y) is not None:
                refit = "" if row.get("refit") is None else f" + {row['refit']}"
                cut = "" if row.get("max_cost") is None else f" until {_cell('until', row)}"
                lines.setdefault(f"{row['method']}{refit}{cut}", []).append((row["cost"], row[y]))
        for label, points in lines.items():
            ax.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        ax.set_xlabel("FLOPs relative to the first model")
        ax.set_ylabel(y)
        ax.legend()
        return ax


def _cell(name: str, row: Mapping[str, Any]) -> str:
    value = row.get(name)
    if name == "until":
        return "heads" if value is None and row.get("method") != "side by side" else str(value or "")
    if value is None:
        return ""
    return f"{value:.1f}" if name == "seconds" else f"{value:.3f}" if isinstance(value, float) else str(value)

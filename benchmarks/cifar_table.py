"""The rows of the tables, and their means and spreads over several draws of the calibration images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

COLUMNS = (
    "network", "until", "width", "refit", "per task", "average", "joint", "FLOPs", "latency", "parameters", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One row of the table. Ratios are to the first model; seconds are those of `compile_zip`.

    `latency`: the least of many runs of the network over that of the first model, in turn (see `--latency-batch`).
    `spread`: standard deviation of `average` and `joint` over the draws, where there are several.
    """

    network: str
    until: str
    width: str
    refit: str
    per_task: tuple[float, ...]
    average: float
    joint: float | None
    flops: float
    parameters: float
    seconds: float | None
    spread: tuple[float, float | None] | None = None
    latency: float | None = None


def averaged(rows: Sequence[Result]) -> Result:
    """One row for several draws: means, and the spread of the accuracies."""
    if len(rows) == 1:
        return rows[0]
    joint = [row.joint for row in rows if row.joint is not None]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    return replace(
        rows[0],
        per_task=tuple(mean(values) for values in zip(*(row.per_task for row in rows), strict=True)),
        average=mean(row.average for row in rows),
        joint=mean(joint) if joint else None,
        flops=mean(row.flops for row in rows),
        parameters=mean(row.parameters for row in rows),
        seconds=mean(seconds) if seconds else None,
        latency=None if rows[0].latency is None else mean(row.latency or 0.0 for row in rows),
        spread=(stdev(row.average for row in rows), stdev(joint) if joint else None),
    )


def format_table(rows: Sequence[Result], markdown: bool = False) -> str:
    """Aligned columns; accuracies in per cent."""

    def cells(row: Result) -> list[str]:
        spread = row.spread or (None, None)
        return [
            row.network,
            row.until,
            row.width,
            row.refit,
            " / ".join(_percent(value) for value in row.per_task),
            _percent(row.average, spread[0]),
            "" if row.joint is None else _percent(row.joint, spread[1]),
            f"{row.flops:.3f}",
            "" if row.latency is None else f"{row.latency:.3f}",
            f"{row.parameters:.3f}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        ]

    table = [list(COLUMNS), *map(cells, rows)]
    if markdown:
        lines = [f"| {' | '.join(line)} |" for line in table]
        return "\n".join([lines[0], "|" + "---|" * len(COLUMNS), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(_pad(line, widths)) for line in table)


def _percent(value: float, spread: float | None = None) -> str:
    return f"{100 * value:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _pad(line: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """Words to the left, numbers to the right."""
    for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
        yield cell.ljust(width) if column < 4 else cell.rjust(width)

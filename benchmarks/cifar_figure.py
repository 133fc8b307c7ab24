"""Draw accuracy against latency, of the rows that `cifar.py --json FILE` has written.

python benchmarks/cifar_figure.py rows.json [more.json …] docs/images/latency.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxzip.tools.plotting import axes

NAMES = {"energy": "fxzip", "zip": "ZipIt!", "alone": "each narrowed alone", "average": "weights averaged"}
MARKS = {"fxzip": "o", "ZipIt!": "s", "each narrowed alone": "^", "weights averaged": "v", "side by side": "*"}


def label(row: Mapping[str, Any]) -> str:
    """What a row is called in the figure."""
    name = row["network"].partition(":")[0]
    return NAMES.get(name, name)


def remark(row: Mapping[str, Any]) -> str:
    """What stands beside a point: its cut, and what its widths may cost."""
    cut = "" if row["until"] in ("", "none") else f"until {row['until']}"
    kind, _, cost = row["width"].partition(":")
    width = "" if row["width"] in ("", "1") else f"at most {cost}" if kind == "auto" else f"width {kind}"
    return ", ".join(filter(None, (cut, width)))


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One point a row that has a latency; a line for the accuracy of all networks side by side."""
    plot = axes(None)
    timed = [row for row in rows if row["latency"] is not None]
    for kind in dict.fromkeys(map(label, timed)):
        own = [row for row in timed if label(row) == kind]
        points = [(row["latency"], 100 * row["average"]) for row in own]
        plot.scatter(*zip(*points, strict=True), label=kind, marker=MARKS.get(kind, "o"), s=60)
        # Zips and networks narrowed alone lie close together: what is said of them goes to either side.
        place = {"xytext": (7, 3)} if kind == NAMES["alone"] else {"xytext": (-7, -10), "ha": "right"}
        for row, point in zip(own, points, strict=True):
            plot.annotate(remark(row), point, textcoords="offset points", fontsize=7, **place)
    whole = next((row for row in rows if row["network"] == "side by side"), None)
    if whole is not None:
        plot.axhline(100 * whole["average"], linestyle=":", color="gray", linewidth=1)
    plot.set_xlabel("latency, relative to one network")
    plot.set_ylabel("accuracy per task (%)")
    plot.set_title("Two networks in one: CIFAR-10, ResNet-20 of double width")
    plot.margins(x=0.25, y=0.12)
    plot.legend()
    plot.figure.savefig(path, dpi=150, bbox_inches="tight")


def main(argv: Sequence[str]) -> None:
    if len(argv) < 2:
        raise SystemExit(__doc__)
    *sources, target = map(Path, argv)
    rows: list[Mapping[str, Any]] = []
    for source in sources:
        for row in json.loads(source.read_text(encoding="utf-8"))["rows"]:
            if row["network"] != "side by side" or all(other["network"] != "side by side" for other in rows):
                rows.append(row)
    draw([row for row in rows if not row["network"].startswith("model ")], target)


if __name__ == "__main__":
    main(sys.argv[1:])

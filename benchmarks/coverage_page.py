"""docs/coverage.md from the results of the coverage sweep: what was asked and what was found, and a row a model."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from coverage_models import torchvision_kinds

Row = dict[str, Any]

INTRODUCTION = """\
# Coverage

Written by `python benchmarks/coverage.py`. Random parameters and statistics, off their initial values; small inputs;
CPU seconds of one thread.

*exact*: largest movement of the output, relative to its largest magnitude, under a random relabelling of all spaces,
in float64 (very large models in float32). *FLOPs*, *parameters*: per cent that may be zipped / only relabelled / are
pinned.

Seconds are counted so: *trace*: `tracing.trace`, all of it. *forward*: one forward pass of the traced program on the
sample, the faster of two. *analysis*: `analysis.label`, which is one forward pass with every call looked at, less
*forward*; and `analysis.solve`. *check*: `analysis.self_check`, less the time inside the traced program while it makes
its own forward passes (two, in float64 on a batch of two, if all is well), and less `analysis.solve`, which it calls
again; random parameters, casts and relabelling are counted. Nothing is left out of the sum of *analysis* and *check*
but these forward passes.
"""


def page(rows: Sequence[Row], growth: Sequence[Row] = ()) -> str:
    """The text of docs/coverage.md; `growth`: the rows of coverage_growth.py."""
    lines = [INTRODUCTION, "## Asked and found", "", "| what | asked | found |", "|---|---|---|"]
    lines += ["| " + " | ".join(line) + " |" for line in summary(rows)]
    lines += ["", *below(rows), *tied_tables(rows), "## Seconds and nodes", "", *timing(rows), *growing(growth), ""]
    lines += ["## Behind barriers", "", *barriers(rows), ""]
    for zoo in dict.fromkeys(row["zoo"] for row in rows):
        own = [row for row in rows if row["zoo"] == zoo]
        lines += [f"## {zoo}: {_exact(own)} of {len(own)} exact", "", *_table(own), ""]
    return "\n".join(lines)


def _exact(rows: Sequence[Row]) -> int:
    return sum(bool(row.get("exact")) for row in rows)


def _is_refused(row: Row) -> bool:
    return "must have floating point weights" in row.get("error", "")


def summary(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(what, asked, found)."""
    kinds = torchvision_kinds()
    lines = []

    def of(zoo: str, *wanted: str) -> list[Row]:
        return [row for row in rows if row["zoo"] == zoo and (not wanted or kinds.get(row["name"]) in wanted)]

    main = of("torchvision", "classification", "segmentation", "video")
    if main:
        zippable = {row["name"]: 100 * row["flops"]["zippable"] for row in main if "flops" in row}
        least = min(zippable, key=lambda name: zippable[name])
        lines += [
            ("torchvision classification, segmentation, video: exact", "95 of 95", f"{_exact(main)} of {len(main)}"),
            ("the same: median share of FLOPs zippable", "≥ 95 %", f"{median(zippable.values()):.1f} %"),
            ("the same: least share", "≥ 60 %", f"{zippable[least]:.1f} % (`{least}`)"),
        ]
    for what, zoo, wanted, asked in [
        ("torchvision detection, optical flow: exact", "torchvision", ("detection", "optical_flow"), "14 of 14"),
        ("timm, a model of each module: exact", "timm", (), "≥ 97 of 98"),
        ("transformers: exact", "transformers", (), "≥ 17 of 19"),
        ("home-made: exact", "home-made", (), "all"),
    ]:
        if own := of(zoo, *wanted):
            lines.append((what, asked, f"{_exact(own)} of {len(own)}"))
    if quantised := of("torchvision", "quantization"):
        refused = sum(map(_is_refused, quantised))
        lines.append(("torchvision quantised: refused with a clear error", "all", f"{refused} of {len(quantised)}"))
    small = [row for row in of("torchvision") if "passes_s" in row and row["parameters"] < 100e6]
    for what, seconds in (
        ("analysis", _analysis),
        ("analysis and self-check", lambda row: _analysis(row) + _check(row)),
    ):
        if small:
            worst = max(small, key=seconds)
            text = f"{seconds(worst):.2f} s (`{worst['name']}`), median {median(map(seconds, small)):.2f} s"
            lines.append((f"torchvision below 100 M parameters: {what} beyond forward passes", "≤ 2 s", text))
    return lines


def _analysis(row: Row) -> float:
    return max(float(row["label_s"] + row["solve_s"] - row["forward_s"]), 0.0)


def _check(row: Row) -> float:
    return max(float(row["check_s"] - row["solve_s"] - row["passes_s"]), 0.0)


def fit(*columns: Sequence[float], to: Sequence[float]) -> tuple[list[float], float]:
    """Coefficients and R² of the least-squares fit of `to` by the columns and a constant (the first coefficient).

    >>> fit([1.0, 2.0, 3.0], to=[3.0, 5.0, 7.0])
    ([1.0, 2.0], 1.0)
    """
    target = np.asarray(to)
    matrix = np.stack([np.ones(len(target)), *map(np.asarray, columns)], 1)
    found = np.linalg.lstsq(matrix, target, rcond=None)[0]
    rest = float(((target - matrix @ found) ** 2).sum() / ((target - target.mean()) ** 2).sum())
    return [round(float(value), 12) for value in found], round(1 - rest, 12)


def timing(rows: Sequence[Row]) -> list[str]:
    """How the seconds of the analysis grow with the number of nodes."""
    timed = [row for row in rows if "passes_s" in row and "labels" in row]
    if len(timed) < 4:
        return ["Too few models for a fit."]
    seconds = [_analysis(row) for row in timed]
    nodes, labels = [row["nodes"] for row in timed], [row["labels"] for row in timed]
    (base, slope), by_nodes = fit(nodes, to=seconds)
    (base2, slope2, per_label), by_both = fit(nodes, labels, to=seconds)
    passes = [row["forward_s"] for row in timed]
    (base3, slope3, per_label3, per_pass), by_three = fit(nodes, labels, passes, to=seconds)
    large = [(n, s) for n, s in zip(nodes, seconds, strict=True) if n >= 50 and s > 0]
    (_, power), _ = fit(np.log([n for n, _ in large]), to=np.log([s for _, s in large]))  # type: ignore[arg-type]
    return [
        f"Least squares over {len(timed)} models, {min(nodes)} to {max(nodes)} nodes; analysis less one forward pass:",
        "",
        f"- seconds = {base:.3f} + {1e3 * slope:.3f}·nodes/1000, R² = {by_nodes:.2f};",
        f"- seconds = {base2:.3f} + {1e3 * slope2:.3f}·nodes/1000 + {1e6 * per_label:.3f}·labels/10⁶ (a label "
        f"is an index of an axis of a parameter, or a block), R² = {by_both:.2f};",
        f"- seconds = {base3:.3f} + {1e3 * slope3:.3f}·nodes/1000 + {1e6 * per_label3:.3f}·labels/10⁶ + {per_pass:.3f}·"
        f"forward (attention is run as its matrix products, which takes longer than fused), R² = {by_three:.2f};",
        f"- seconds ∝ nodes^{power:.2f} (fit of the logarithms, from 50 nodes on).",
    ]


def growing(growth: Sequence[Row]) -> list[str]:
    """The same for one architecture that gets deeper and deeper."""
    lines = []
    for family in dict.fromkeys(row["family"] for row in growth):
        own = [row for row in growth if row["family"] == family]
        nodes, seconds = [row["nodes"] for row in own], [row["seconds"] for row in own]
        (base, slope), quality = fit(nodes, to=seconds)
        lines.append(
            f"- {family}, {min(nodes)} to {max(nodes)} nodes: seconds = {base:.3f} + {1e3 * slope:.3f}·nodes/1000, "
            f"R² = {quality:.4f}."
        )
    if not lines:
        return []
    return [
        "",
        "Across the zoo widths, resolutions and kinds of calls change together with the number of nodes: the spread "
        "about the first line is that of widths (labels) and of the work in a call (forward). With nothing but depth "
        "changing (`benchmarks/coverage_growth.py`) it is a line:",
        "",
        *lines,
    ]


def below(rows: Sequence[Row]) -> list[str]:
    """Why one model is below the share of FLOPs that is asked for."""
    kinds = torchvision_kinds()
    asked = ("classification", "segmentation", "video")
    low = [r for r in rows if "flops" in r and kinds.get(r["name"]) in asked and r["flops"]["zippable"] < 0.6]
    if not low:
        return []
    lines = ["## Below 60 %", ""]
    for row in low:
        shares = [f"{100 * row['flops'][k]:.1f} %" for k in ("zippable", "relabel", "pinned")]
        why = REASONS.get(row["name"], "Not looked into.")
        lines += [f"`{row['name']}`: {' / '.join(shares)} of its FLOPs. {why}", ""]
    return lines


REASONS = {
    "mvit_v2_s": "No call is a barrier. Its attention adds the pooled q to the product of attention and v (residual "
    "pooling), so the features of v are those of q; and those of q and k are multiplied with one another, so they may "
    "only be relabelled. All of the packed q, k, v projection and of the products of attention thus falls outside of "
    "what may be zipped, and there is no rule that could make it free without being wrong: the sum is elementwise. "
    "Tables of relative positions, shared by all heads, are multiplied with q of every head, so features of different "
    "heads at the same place are one feature. The heads themselves could still change places as a whole, which a label "
    "per feature cannot say; this is the share that counts as pinned: it is that of the products of q and k, whose "
    "result has no features but the heads.",
}


TIED = ("GPT-2", "Mamba", "Whisper")


def tied_tables(rows: Sequence[Row]) -> list[str]:
    """Networks whose embedding is their last layer as well."""
    shares = {r["name"]: f"{100 * r['flops']['zippable']:.0f} %" for r in rows if r["name"] in TIED and "flops" in r}
    if not shares:
        return []
    names = ", ".join(f"`{name}` ({share})" for name, share in shares.items())
    return [
        "## Tied tables", "",
        f"{names} of the FLOPs may be zipped: one table is read as an embedding and multiplied with as the last layer. "
        "Merged features would need it merged in the one role and spread in the other. So its features, and all that "
        "are added to them, may only be relabelled.", "",
    ]  # fmt: skip


def barriers(rows: Sequence[Row]) -> list[str]:
    """What could be shared if the trunk went on after a call without a rule."""
    seen = [row for row in rows if "barriers" in row]
    stopped = {row["name"]: row["behind"] for row in seen if row["barriers"]}
    if not seen:
        return ["No results."]
    mean = 100 * sum(stopped.values()) / len(seen)
    others = [f"`{name}` {100 * share:.0f} %" for name, share in stopped.items()]
    return [
        f"A trunk ends in front of a call without a rule. Models with such a call: {len(stopped)} of {len(seen)}. "
        f"Share of their FLOPs in it and behind it: {', '.join(others) or 'none'}. On average over all models that is "
        f"{mean:.2f} % of the FLOPs, the most that a trunk which goes on behind it could gain; fxzip leaves that out.",
    ]


def _percent(row: Row, what: str) -> str:
    share = row.get(what)
    return " / ".join(f"{100 * share[k]:.0f}" for k in ("zippable", "relabel", "pinned")) if share else ""


def _table(rows: Sequence[Row]) -> list[str]:
    lines = ["| model | rung | nodes | exact | FLOPs | parameters | trace | analysis | check | forward | notes |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        said = [*row.get("warnings", []), *row.get("barriers", []), *row.get("probed", [])]
        notes = row.get("error", "") or "; ".join(said[:3]) + (f"; {len(said) - 3} more" if len(said) > 3 else "")
        if row.get("variant", row["name"]) != row["name"]:
            notes = f"{row['variant']}{'; ' if notes else ''}{notes}"
        seconds = [row["trace_s"], _analysis(row), _check(row), row["forward_s"]] if "passes_s" in row else [None] * 4
        gap = f"{row['gap']:.0e}" if row.get("exact") else "refused" if _is_refused(row) else "no"
        cells = [row["name"], row.get("rung", ""), str(row.get("nodes", "")), gap, _percent(row, "flops"),
                 _percent(row, "params"), *("" if s is None else f"{s:.2f}" for s in seconds),
                 " ".join(notes.split()).replace("|", "/")[:400]]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines

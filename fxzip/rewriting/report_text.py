"""The text of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "-"


def headline(v: Mapping[str, Any]) -> str:
    """What was gained and what it cost, in one line.

    >>> costs = {"total": 100, "originals": [100, 100], "side_by_side": 200}
    >>> headline({"models": 2, "flops": costs})
    '2 networks in one: 1.00x the FLOPs of one, 0.50x of both'
    """
    flops, every = v["flops"], "both" if v["models"] == 2 else f"all {v['models']}"
    one = flops["originals"][0]
    several = v["models"] > 1
    text = f"{v['models']} networks in one: " if several else "one network, narrowed: "
    if one:
        text += f"{flops['total'] / one:.2f}x the FLOPs" + (" of one" if several else "")
        text += f", {flops['total'] / flops['side_by_side']:.2f}x of {every}" if several else ""
    else:
        text += "FLOPs unknown"

    seconds = v.get("latency")
    if seconds:
        text += f"; {seconds['zipped'] / seconds['originals'][0]:.2f}x the latency"
        text += f", {seconds['zipped'] / seconds['side_by_side']:.2f}x of {every}" if several else ""
    return text + _agreeing(v.get("agreement"))


def _agreeing(found: Mapping[str, Any] | None) -> str:
    """How far the heads agree with their originals, as the headline says it."""
    if not found:
        return ""
    heads, inputs = found["heads"], " / ".join(str(n) for n in dict.fromkeys(found["inputs"]))
    if len(heads) == 1:
        agree, off = "it agrees with its original", "it is off its original"
    else:
        agree, off = "heads agree with their originals", "heads are off their originals"
    if all(head["same_class"] is not None for head in heads):
        shares = " / ".join(f"{100 * head['same_class']:.1f} %" for head in heads)
        return f"; {agree} on {shares} of {inputs} held-out inputs"
    errors = " / ".join(f"{100 * head['relative_error']:.2g} %" for head in heads)
    fits = " / ".join(f"{head['r_squared']:.3f}" for head in heads)
    return f"; {off} by {errors} (R² {fits}) on {inputs} held-out inputs"


def lines(v: Mapping[str, Any]) -> list[str]:
    """The text of a report."""
    result = [headline(v), f"zip of {v['models']} models by {v.get('method')}, refit {v.get('refit')}, {v.get('data')}"]
    cut = v["cut"]
    merged = [", ".join(f"`{name}`" for name in twins) for twins in cut.get("merged", [])]
    result += [f"trunk begins at {names}, merged; what is in front each model computes on its own" for names in merged]
    ends = ", ".join(f"`{name}`" for name in cut["after"])
    result.append(f"trunk ends after {ends}" if ends else "nothing is shared")
    result += [f"  the models part: the first {text}" for text in cut["parting"]]
    result += [f"  `{name}` is not shared: {why}" for name, why in list(cut["ends"].items())[:8]]
    stems = any("stems" in v[what] for what in ("flops", "parameters"))
    first = f"{'stems':>14}" if stems else ""
    result.append(f"{'':12}{first}{'trunk':>14}{'heads':>14}{'total':>14}{'of one':>8}{'of all':>8}")
    for what in ("flops", "parameters"):
        c = v[what]
        first = f"{sum(c.get('stems', [])):>14,}" if stems else ""
        result.append(
            f"{what:12}{first}{c['trunk']:>14,}{sum(c['heads']):>14,}{c['total']:>14,}"
            f"{_ratio(c['total'], c['originals'][0]):>8}{_ratio(c['total'], c['side_by_side']):>8}"
        )
    result.append(f"{'space':40}{'size':>6}{'kept':>6}  {'legality':14}{'corr.':>7}  folded into the heads")
    for space in v["spaces"]:
        seen = "-" if space["correlation"] is None else f"{space['correlation']:.3f}"
        result.append(
            f"{space['name'][:40]:40}{space['size']:>6}{space['kept']:>6}  {space['legality']:14}{seen:>7}  "
            f"{_folded(space)}"
        )
    for k, narrow in enumerate(v.get("narrowed", [])):
        names = [f"head {k}: {own['name']}"[:40] for own in narrow]
        result += [f"{name:40}{own['size']:>6}{own['kept']:>6}" for name, own in zip(names, narrow, strict=True)]
    result += _factorised(v.get("ranks", []))
    mixed = set(v.get("mixed", []))
    for how, names in (
        ("a gather", [name for name in v["unmerges"] if name not in mixed]),
        ("a matrix product", v.get("mixed", [])),
    ):
        if names:
            result.append(f"unmerged by {how}: " + ", ".join(f"`{name}`" for name in names))
    result += [f"barrier: {reason}" for reason in dict.fromkeys(v["barriers"])]
    result += [f"probed: {reason}" for reason in dict.fromkeys(v["probed"])]
    for k, tracing in enumerate(v["tracing"]):
        if tracing["failures"]:
            result.append(f"model {k} traced by {tracing['rung']}: " + " ".join(tracing["failures"]))
    result += [f"note: {note}" for note in v.get("notes", [])]
    return result


def _factorised(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every call that was made two.

    >>> _factorised([{"name": "trunk.conv1", "rank": 4, "outputs": 12, "inputs": 108}])[1].split()
    ['trunk.conv1', '12', 'x', '108', '4']
    """
    if not ranks:
        return []
    lines = [f"{'call made two':40}{'outputs x inputs':>18}{'rank':>6}"]
    for own in ranks:
        size = f"{own['outputs']} x {own['inputs']}"
        lines.append(f"{own['name'][:40]:40}{size:>18}{own['rank']:>6}")
    return lines


def _folded(space: Mapping[str, Any]) -> str:
    return "yes" if all(space["folded"]) else ", ".join(str(k) for k, f in enumerate(space["folded"]) if f) or "no"

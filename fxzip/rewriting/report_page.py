"""From a zipped network and its report to what a page shows.

All is read from the graph as it is, the provenance of its nodes, and the report; so it is the same behind `load`, and
for a graph that was changed since the report was made. Of nodes that the report does not know the page tells less.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..ops import mix
from .module import EmittedModule
from .page_nodes import Nodes, Places
from .pages import Costs, Node, Page, Point, Space, Task, fragment, grouped, page_html, tabular, write_html

if TYPE_CHECKING:
    from .report import Report

_COSTS = (("FLOPs", "flops"), ("parameters", "parameters"))
WORST = "agreement of the worst head"


def page_of(zipped: EmittedModule, report: Report, table: Sequence[Mapping[str, Any]] = ()) -> Page:
    """The page. `table`: rows of zips of the same models, for the plot of cost against agreement."""
    measure = next(iter(tabular.scores(table)), WORST)
    points = tabular.points_of(table, "worst" if measure == WORST else measure)
    spaces, first = _spaces(report)
    names = task_names(report)
    facts = report.get("nodes", {})
    places = Places(zipped, facts, names)
    groups, inside = grouped(places.placed())
    nodes = Nodes(zipped, facts, first, places, inside).nodes()
    nodes, spaces = _in_order(nodes, spaces)
    return Page(
        title=_title(report),
        headline=report.headline,
        costs=tuple(_costs(name, report[key]) for name, key in _COSTS),
        tasks=tuple(_task(k, name, report, zipped, nodes) for k, name in enumerate(names)),
        nodes=nodes,
        groups=tuple(groups),
        spaces=spaces,
        notes=tuple(report.notes),
        facts=_facts(report),
        points=(*(_tried(report) if measure == WORST else ()), *points),
        measure=measure,
        text=str(report),
        latency=_latency(report),
        version=str(getattr(sys.modules[__name__.partition(".")[0]], "__version__", "")),
    )


def _title(report: Report) -> str:
    number = report["models"]
    return " + ".join(report.tasks) or ("One network, narrowed" if number == 1 else f"{number} networks in one")


def _in_order(nodes: tuple[Node, ...], spaces: tuple[Space, ...]) -> tuple[tuple[Node, ...], tuple[Space, ...]]:
    """The spaces in the order in which the graph meets them, those of the trunk first; nodes that number them so."""
    met = {space: n for n, space in reversed(list(enumerate(space for node in nodes for space in node.spaces)))}
    order = sorted(range(len(spaces)), key=lambda n: (-1 if (head := spaces[n].head) is None else head, met.get(n, 0)))
    numbers = {space: n for n, space in enumerate(order)}
    renumbered = (replace(node, spaces=tuple(sorted(numbers[space] for space in node.spaces))) for node in nodes)
    return tuple(renumbered), tuple(spaces[space] for space in order)


def task_names(report: Report) -> list[str]:
    """Names of the tasks, "head 0" and so on where they have none."""
    if report["models"] == 1:
        return report.tasks or ["the network"]
    return report.tasks or [f"head {k}" for k in range(report["models"])]


def _spaces(report: Report) -> tuple[tuple[Space, ...], list[int]]:
    """The spaces of the trunk and of narrowed heads, and the number of the first of each head."""
    found = [
        Space(
            own["name"], tuple(own.get("sizes", [own["size"]])), own["kept"], own["legality"], own["reason"],
            own["correlation"], None if own.get("error") is None else tuple(own["error"]), tuple(own["folded"]),
        )
        for own in report["spaces"]
    ]  # fmt: skip
    first = []
    for k, narrow in enumerate(report.get("narrowed", [])):
        first.append(len(found))
        for own in narrow:
            error = None if own.get("error") is None else (own["error"],)
            found.append(Space(own["name"], (own["size"],), own["kept"], "free", errors=error, head=k))
    return tuple(found), first


def _costs(name: str, costs: Mapping[str, Any]) -> Costs:
    return Costs(name, tuple(costs.get("stems", ())), costs["trunk"], tuple(costs["heads"]), tuple(costs["originals"]))


def _task(k: int, name: str, report: Report, zipped: EmittedModule, nodes: Sequence[Node]) -> Task:
    flops, own = report["flops"], [node for node in nodes if node.part == f"head {k}"]
    stem = flops.get("stems", [0] * len(flops["heads"]))[k]
    targets = {node.name: node.target for node in zipped.graph.nodes}
    given = [targets[node.name] for node in own if node.role == "unmerge"]
    parameters = report["parameters"]
    stops = dict.fromkeys(node.stop for node in own if node.begins and node.stop is not None)
    return Task(
        name, flops["originals"][k], flops["heads"][k] + stem,
        parameters["heads"][k] + parameters.get("stems", [0] * len(flops["heads"]))[k], len(given),
        sum(target is mix for target in given), *_agreement(report, k), tuple(stops),
    )  # fmt: skip


def _agreement(report: Report, k: int) -> tuple[float | None, float | None, int]:
    """How far a head agrees with its original: share of the same class, else relative error; and on how many inputs."""
    found, auto = report.get("agreement"), report.get("auto", {})
    if found:
        same = found["heads"][k]["same_class"]
        return same, None if same is not None else found["heads"][k]["relative_error"], found["inputs"][k]
    if "agreement" in auto:
        return auto["agreement"][k], None, auto["held_out"]
    return None, None, 0


def _latency(report: Report) -> tuple[float, float, float] | None:
    """Seconds of the zip, of the first network, and of all side by side."""
    found = report.get("latency")
    return None if not found else (found["zipped"], found["originals"][0], found["side_by_side"])


def _tried(report: Report) -> list[Point]:
    """What `until="auto"` tried."""
    auto = report.get("auto", {})
    return [
        Point(
            'until="auto"', "heads" if own["until"] is None else str(own["until"]), own["cost"],
            min(own["agreement"]), own["until"] == auto["until"],
        )
        for own in auto.get("frontier", [])
    ]  # fmt: skip


def _facts(report: Report) -> dict[str, str]:
    """How it was made, in a few words each."""
    checked = ["not run" if error is None else f"{error:.1e}" for error in report["self_check"]]
    facts = {
        "method": str(report.get("method")), "refit": str(report.get("refit")), "data": str(report.get("data")),
        "self-check, relative error": ", ".join(checked),
        "traced": ", ".join(own["rung"] for own in report["tracing"]),
    }  # fmt: skip
    inputs = [f"{own['name']} {own['shape']} {own['dtype']}" for own in report.get("inputs", [])]
    if inputs:
        facts["sample input"] = "; ".join(inputs)
    if report.get("agreement"):
        facts["held-out inputs"] = ", ".join(str(n) for n in dict.fromkeys(report["agreement"]["inputs"]))
    return facts


def write(zipped: EmittedModule, report: Report, path: str | os.PathLike[str], table: Any = None) -> None:
    """Write the page of a zipped network; see `Report.html`."""
    write_html(path, page_html(page_of(zipped, report, () if table is None else table)))


def brief(report: Report) -> str:
    """A report as notebooks show it."""
    return fragment("report.html", **_in_brief(report))


def network_brief(zipped: EmittedModule) -> str:
    """A network as notebooks show it: its report, if it has one, and how to see more."""
    known = "fxzip_report" in zipped.meta
    values = _in_brief(zipped.report) if known else {}
    return fragment("network.html", nodes=len(zipped.graph.nodes), known=known, **values)


def _in_brief(report: Report) -> dict[str, Any]:
    return {
        "headline": report.headline,
        "names": task_names(report),
        "notes": report.notes,
        "spaces": _spaces(report)[0],
        "costs": [_costs(name, report[key]) for name, key in _COSTS],
    }

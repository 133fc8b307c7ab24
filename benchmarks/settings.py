"""One table for networks of one architecture on one input: side by side, narrowed alone, averaged, by ZipIt!, by fxzip.

Several networks have the rows

    side by side       the networks themselves
    alone              each narrowed by itself to 1/K of the cost (`fxzip.narrow`), side by side; FLOPs, or latency
    average            weights averaged, with REPAIR
    ZipIt!             with REPAIR
    default            `fxzip.compile_zip(models, sample, data=...)`
    by need            the same with `width="auto", max_cost=1`; FLOPs, or latency, or FLOPs with `rank="auto"`
    until auto         the same with `until="auto"`, FLOPs

and one network is narrowed to some costs. FLOPs are those of `torch.utils.flop_counter`: convolutions and products of
matrices. Latency is the least of many runs, all rows of a setting in turn in one run (`fxzip.compiler.timing.fastest`),
of the batch that the table names. Both are relative to the first network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxzip
from fxzip.compiler.timing import as_used, fastest
from fxzip.tracing.calls import Call

Outputs = Sequence[Tensor]
"""What the networks of a setting give for all test inputs, one after another."""


@dataclass(frozen=True, eq=False)
class Setting:
    """Networks of one architecture on one input, and what their outputs are worth.

    Attributes:
        models: by the names of their tasks, in eval mode.
        sample: an input, of the batch size that is timed.
        data: unlabelled batches.
        tests: batches to score on.
        score: of the outputs of all networks on `tests`; figures by name.
        rivals: other networks for the same task, or no network at all: functions of a batch.
        costs: of the narrowed networks, where there is one network only.
    """

    models: Mapping[str, nn.Module]
    sample: Tensor
    data: Sequence[Tensor]
    tests: Sequence[Tensor]
    score: Callable[[Outputs], dict[str, float]]
    rivals: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    costs: Sequence[float] = (0.7, 0.5, 0.3)


SHARED: dict[str, dict[str, Any]] = {
    "average": {"method": "average", "refit": "repair"},
    "ZipIt!": {"method": "zip", "refit": "repair"},
    "default": {},
    "by need, latency": {"width": "auto", "max_cost": 1.0, "budget": "latency"},
    "by need, FLOPs": {"width": "auto", "max_cost": 1.0, "budget": "flops"},
    "by need, FLOPs, ranks too": {"width": "auto", "rank": "auto", "max_cost": 1.0, "budget": "flops"},
    "until auto, FLOPs": {"until": "auto", "width": "auto", "max_cost": 1.0, "budget": "flops"},
}
"""What `compile_zip` is given, by row."""
ALONE: dict[str, dict[str, Any]] = {
    "alone, latency": {"budget": "latency"},
    "alone, FLOPs": {"budget": "flops"},
    "alone, FLOPs, ranks too": {"budget": "flops", "rank": "auto"},
}
"""What `narrow` is given, by row."""


@dataclass(frozen=True)
class Row:
    """A line of the table: costs relative to the first network, the figures of the setting, seconds of the compile."""

    name: str
    flops: float
    latency: float
    figures: Mapping[str, float]
    seconds: float


def built(setting: Setting) -> dict[str, Callable[[], nn.Module]]:
    """How each row comes by its network."""
    models = dict(setting.models)
    # Zips of one setting have one analysis: the default row checks it for all.
    common = {"data": setting.data, "progress": False, "hold_out": False, "verify": False}

    def alone(share: float, options: Mapping[str, Any]) -> nn.Module:
        apart = [fxzip.narrow(m, setting.sample, max_cost=share, **common, **options) for m in models.values()]
        return apart[0] if len(apart) == 1 else fxzip.side_by_side(apart, setting.sample)

    rows: dict[str, Callable[[], nn.Module]] = {}
    if len(models) == 1:
        for cost in setting.costs:
            for name, options in ALONE.items():
                title = name.replace("alone", f"narrow to {cost:g}")
                rows[title] = lambda cost=cost, options=options: alone(cost, options)
        return rows

    rows["side by side"] = lambda: fxzip.side_by_side(list(models.values()), setting.sample)
    for name, options in ALONE.items():
        rows[name] = lambda options=options: alone(1 / len(models), options)
    for name, options in SHARED.items():
        whole = {**common, "verify": name == "default", **options}
        rows[name] = lambda options=whole: fxzip.compile_zip(models, setting.sample, **options)
    return rows


def flops(network: Callable[[Tensor], Any], sample: Tensor) -> int:
    """Those of convolutions and products of matrices."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(sample)
    return counter.get_total_flops()


def measure(setting: Setting, wanted: Sequence[str] = (), say: Callable[[str], None] = print) -> list[Row]:
    """All rows of a setting. `wanted`: only those; what cannot be had is left out, and said why."""
    first = next(iter(setting.models.values()))
    networks: dict[str, nn.Module] = {"one network": first}
    seconds = {"one network": 0.0}
    for name, build in built(setting).items():
        if wanted and name not in wanted:
            continue
        start = time.perf_counter()
        try:
            networks[name] = build()
        except fxzip.FxzipError as error:  # a budget that cannot be kept, too few inputs to hold out
            say(f"{name}: {error}")
            continue
        seconds[name] = time.perf_counter() - start
        say(f"{name}: {seconds[name]:.0f} s")

    rivals = {name: network for name, network in setting.rivals.items() if isinstance(network, nn.Module)}
    timed = {**networks, **rivals}
    copies = [as_used(network) for network in timed.values()]
    taken = dict(zip(timed, fastest(copies, Call((setting.sample,), {}), rounds=100, seconds=60.0), strict=True))
    unit = flops(first, setting.sample)
    rows = []
    for name, network in {**networks, **setting.rivals}.items():
        outputs = outputs_of(network, setting.tests)
        if name == "one network" and len(setting.models) > 1:
            continue  # it has no figures of its own: the row side by side has them
        if len(outputs) < len(setting.models):
            outputs = [outputs[0]] * len(setting.models)
        cost = flops(network, setting.sample) / unit
        latency = taken.get(name, float("nan")) / taken["one network"]
        rows.append(Row(name, cost, latency, setting.score(outputs), seconds.get(name, 0.0)))
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """Markdown."""
    names = list(rows[0].figures)
    lines = ["| row | FLOPs | latency | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        latency = "" if row.latency != row.latency else f"{row.latency:.2f}"
        figures = " | ".join(f"{row.figures[name]:.1f}" for name in names)
        lines.append(f"| {row.name} | {row.flops:.2f} | {latency} | {figures} |")
    return "\n".join(lines)


def outputs_of(network: Callable[[Tensor], object], tests: Sequence[Tensor]) -> Outputs:
    """What a network with one output, or with one for each task, gives for all test inputs."""
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for batch in tests:
            output = network(batch)
            values = output.values() if isinstance(output, Mapping) else output
            parts.append((values,) if isinstance(values, Tensor) else tuple(values))
    return [torch.cat(own) for own in zip(*parts, strict=True)]

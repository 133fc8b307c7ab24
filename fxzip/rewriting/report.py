"""What was shared, what was not and why: a mapping that prints as text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..analysis.flops import Flops, count_flops, flops_of
from ..errors import InputError
from ..matching.moments import Moments
from ..ops import mix
from ..partition.node_names import module_path
from ..tracing import Program, flat_inputs
from ..tracing.calls import Call
from ..tracing.shapes import checked_shapes
from .factorised import factorised_calls
from .module import EmittedModule, ZippedModule, is_unmerge, part_of
from .node_facts import node_facts
from .report_text import headline, lines
from .space_facts import narrowed_facts, space_facts
from .zip_plan import ZipPlan

NOTHING: Mapping[int, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Report(Mapping[str, Any]):
    """A read-only dict of plain values; `str(report)` is a text for people.

    `docs/report.md` says what each key holds: what was asked for ("models", "method", "budget" ...), what came out
    ("agreement", "latency", "flops" ...), what is shared and why no more ("cut", "spaces" ...), what the compiler saw
    ("tracing", "self_check", "nodes" ...). Costs are counts, seconds and bytes; "cost" is relative to the first model.
    """

    values_: dict[str, Any]
    network_: Any = field(default=None, repr=False, compare=False)

    def __getitem__(self, key: str) -> Any:
        return self.values_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks; empty where they have none."""
        return list(self.values_.get("tasks", []))

    @property
    def headline(self) -> str:
        """What was gained and what it cost, in one line."""
        return headline(self.values_)

    @property
    def cost(self) -> float:
        """FLOPs relative to the first model alone."""
        return float(self.values_["flops"]["total"] / max(self.values_["flops"]["originals"][0], 1))

    @property
    def notes(self) -> list[str]:
        """What is worth knowing beside the figures, one sentence each."""
        return list(self.values_["notes"])

    def as_dict(self) -> dict[str, Any]:
        """The report as a plain dict."""
        return dict(self.values_)

    def noting(self, *notes: str) -> Report:
        """The report with further notes.

        >>> Report({"notes": ["a"]}).noting("b")["notes"]
        ['a', 'b']
        """
        return Report({**self.values_, "notes": [*self.values_["notes"], *notes]})

    def of(self, network: EmittedModule) -> Report:
        """The report together with the network that it is about, whose graph `html` draws."""
        return Report(self.values_, network)

    def html(self, path: str | os.PathLike[str], *, table: Any = None) -> None:
        """Write a page: what each task costs, the graph with its stages, spaces and the places where sharing stops, and
        why. It is one file, which a browser shows without a network.

        >>> import fxzip, tempfile, torch
        >>> from torch import nn
        >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
        >>> zipped = fxzip.compile_zip({"pets": a, "birds": b}, torch.randn(16, 4), progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     zipped.report.html(f"{folder}/zipped.html")
        ...     print(open(f"{folder}/zipped.html", encoding="utf-8").read()[:15])
        <!DOCTYPE html>

        Args:
            path: of the file, which is replaced if there is one.
            table: what `fxzip.sweep` or `fxzip.compare` gave for the same models: its rows join the plot of cost
                against agreement.

        Raises:
            InputError: the report was taken out of a file and has no network with it; use `zipped.report`.
        """
        from .report_page import write

        if self.network_ is None:
            raise InputError(
                "`html` draws the graph of the network that a report is about; this report has none with it. Call it "
                "as `zipped.report.html(path)`."
            )
        write(self.network_, self, path, table)

    def _repr_html_(self) -> str:
        from .report_page import brief

        return brief(self)

    def __str__(self) -> str:
        return "\n".join(lines(self.values_))

    __repr__ = __str__

    def __reduce__(self) -> Any:
        return Report, (self.values_,)  # not the network, of which it is a part


def _costs(trunk: int, heads: list[int], stems: list[int], originals: list[int]) -> dict[str, Any]:
    own = {"stems": stems} if any(stems) else {}
    return {
        "trunk": trunk, "heads": heads, **own, "total": trunk + sum(heads) + sum(stems), "originals": originals,
        "side_by_side": sum(originals),
    }  # fmt: skip


def _flops(zipped: ZippedModule, programs: tuple[Program, ...], found: Flops) -> dict[str, Any]:
    parts: dict[str, int] = {}
    for node in zipped.graph.nodes:
        part = part_of(node)
        parts[part] = parts.get(part, 0) + found.by_node[node.name]
    heads, stems = ([parts.get(f"{part} {k}", 0) for k in range(len(programs))] for part in ("head", "stem"))
    originals = [flops_of(program) for program in programs]
    unknown = [f"`{name}` (node `{node}`)" for node, names in found.unknown.items() for name in names]
    known = _costs(parts.get("trunk", 0), heads, stems, [own.total for own in originals])
    return known | {"unknown": unknown}


def uncounted(costs: Mapping[str, Any]) -> list[str]:
    """A note if there are calls whose FLOPs are not known; `costs` as in a report."""
    names: list[str] = costs["flops"].get("unknown", [])
    if not names:
        return []
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return [
        f"the FLOPs of {shown} are not known and count as none: shares of FLOPs (`until` as a fraction, `max_cost`, "
        "`width`) and the figures of this report leave them out"
    ]


def _parameters(zipped: ZippedModule, programs: tuple[Program, ...]) -> dict[str, Any]:
    named = [(name, p.numel()) for name, p in zipped.named_parameters()]
    trunk = sum(n for name, n in named if name.startswith("trunk."))
    heads, stems = (
        [sum(n for name, n in named if name.startswith(f"{part}_{k}.")) for k in range(len(programs))]
        for part in ("head", "stem")
    )
    return _costs(trunk, heads, stems, [sum(p.numel() for p in program.module.parameters()) for program in programs])


def costs(zipped: ZippedModule, programs: tuple[Program, ...], counted: Flops) -> dict[str, dict[str, Any]]:
    """FLOPs and parameters of trunk, heads, each original, and all of them side by side. `counted`: of the zip."""
    return {"flops": _flops(zipped, programs, counted), "parameters": _parameters(zipped, programs)}


def described_inputs(zipped: ZippedModule, call: Call) -> list[dict[str, Any]]:
    """Name, shape and dtype of each input of the sample, of whole numbers also their range; empty where not all are
    tensors."""
    names = [str(node.target) for node in zipped.graph.nodes if node.op == "placeholder"]
    values = flat_inputs(zipped, call)
    if not all(isinstance(value, Tensor) for value in values):
        return []
    found = []
    for name, value in zip(names, values, strict=True):
        own = {"name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if value.numel() and not value.is_floating_point() and not value.is_complex():
            own["range"] = [int(value.min()), int(value.max())]
        found.append(own)
    return found


def tracing_facts(program: Program) -> dict[str, Any]:
    """How a model was traced, as a report has it."""
    strays = program.strays
    known = {"lost": list(strays.lost), "otherwise": strays.otherwise}
    return {"rung": program.rung, "failures": list(program.failures), **known}


def make_report(
    zipped: ZippedModule, plan: ZipPlan, settings: Mapping[str, Any], statistics: Mapping[int, Moments] = NOTHING,
    alone: Mapping[int, Mapping[int, Moments]] = NOTHING,
) -> Report:  # fmt: skip
    """Facts about a zip.

    Args:
        settings: what only the driver knows (method, refit, data, notes ...).
        statistics: moments of the trunk's spaces, by number, from which the plan was made.
        alone: the same of the spaces of each model by itself, where heads keep fewer features.
    """
    trunk = plan.trunk
    programs = trunk.alignment.programs
    last = [node for node in programs[0].module.graph.nodes if node.name in set(trunk.nodes)]
    computed = any(node.op != "placeholder" for node in last)  # else nothing is shared, and inputs end nothing
    edge = [
        n
        for n in last
        if any(user.name not in set(trunk.nodes) for user in n.users)
        and n.name in trunk.labellings[0].dynamic
        and computed
    ]
    left = [node for node in zipped.graph.nodes if is_unmerge(node)]
    counted = count_flops(zipped, programs[0].sample)
    spent = costs(zipped, programs, counted)
    values = {
        "models": len(programs),
        **settings,
        "notes": [*settings.get("notes", []), *uncounted(spent)],
        "checked_shapes": checked_shapes(programs),
        "inputs": described_inputs(zipped, programs[0].sample),
        "cut": {
            "after": [node.name for node in edge],
            "modules": [module_path(node) for node in edge],
            "parting": [text for text in trunk.alignment.parting if text],
            "ends": dict(trunk.ends),
            "unmatched": dict(trunk.unmatched),
            "alike": list(trunk.alike),
            "masked": list(trunk.masked),
            "merged": [list(twins) for twins in trunk.alignment.entries],
        },
        "spaces": space_facts(plan, statistics),
        "narrowed": [narrowed_facts(plan, k, alone.get(k, NOTHING)) for k in range(len(programs))],
        "ranks": factorised_calls(zipped),
        **spent,
        "unmerges": [node.name for node in left],
        "mixed": [node.name for node in left if node.target is mix],
        "barriers": [b.reason for label in trunk.labellings for b in label.barriers],
        "probed": [p.reason for label in trunk.labellings for p in label.probed],
        "tracing": [tracing_facts(program) for program in programs],
        "nodes": node_facts(zipped, counted, plan),
    }
    return Report(values)

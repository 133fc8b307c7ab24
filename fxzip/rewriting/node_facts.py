"""What a report keeps of every node of a zip: where it is, what it gives, and why sharing stops there."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..analysis.flops import Flops
from ..partition.node_names import module_path
from ..partition.region import Trunk
from ..partition.trunk_search import RETURNED
from .module import ZippedModule, part_of, sources_of
from .zip_plan import ZipPlan

_ASKED = "the models could share it; the cut that was asked for ends the trunk in front of it"
_PARTED = "not all models compute this: the graphs differ here"


def node_facts(zipped: ZippedModule, counted: Flops, plan: ZipPlan | None = None) -> dict[str, dict[str, Any]]:
    """For each node of the graph, by name, plain values.

    Keys: "path", the module it is in; "shape" on the sample, None if it gives no tensor; "plain", whether it gives
    sizes and other numbers only; "flops"; "spaces", the numbers of the trunk's spaces whose features it carries;
    "narrowed", the numbers of the spaces of its head; "stop", None, or of a head's node why it is not shared: a dict of
    "kind" and "reason".

    The kinds: "barrier" (a call without a rule), "unmatched" (features that cannot be matched), "output" (what the
    model returns), "differ" (the graphs differ), "cut" (asked for with `until`), "unsound" (all else).

    `plan`: None where nothing is merged; then no node has spaces.
    """
    about = None if plan is None else _About(plan)
    return {
        node.name: {
            "path": path_of(node),
            "shape": None if (shape := counted.shapes.get(node.name)) is None else list(shape),
            "plain": node.name in counted.plain,
            "flops": counted.by_node.get(node.name, 0),
            "spaces": [] if about is None else about.spaces(node),
            "narrowed": [] if about is None else about.narrowed(node),
            "stop": None if about is None else about.stop(node),
        }
        for node in zipped.graph.nodes
    }


def path_of(node: fx.Node) -> str:
    """The path, in its model, of the module that a node of a zip is in, its own for a module call; "" at the top."""
    path = module_path(node)
    return path.partition(".")[2] if node.op == "call_module" else path


def _task(part: str) -> int:
    """The number of the model that a part belongs to; 0 for what is shared."""
    return int(part.split()[1]) if " " in part else 0


class _About:
    """What a plan knows of nodes."""

    def __init__(self, plan: ZipPlan) -> None:
        trunk = plan.trunk
        self.plan, self.trunk = plan, trunk
        self.shared = set(trunk.nodes)
        pairs = trunk.alignment.pairs
        self.back = [{twins[k]: name for name, twins in pairs.items()} for k in range(len(trunk.spaces))]
        nodes = [program.module.graph.nodes for program in trunk.alignment.programs]
        self.inputs = [{n.name: [i.name for i in n.all_input_nodes] for n in own} for own in nodes]
        self.barriers = [{barrier.node: barrier.reason for barrier in own.barriers} for own in trunk.labellings]

    def spaces(self, node: fx.Node) -> list[int]:
        """Numbers of the trunk's spaces, as model 0 counts them, along which the value has features."""
        k = _task(part_of(node))
        return sorted(s for name in sources_of(node)[:1] for s in _carried(self.trunk, k, name))

    def narrowed(self, node: fx.Node) -> list[int]:
        """Numbers, in the order of the report, of the spaces of a head that keep fewer features."""
        part = part_of(node)
        own = self.plan.heads.get(_task(part)) if part.startswith("head ") else None
        if own is None:
            return []
        places = {s: place for place, s in enumerate(own.kept)}
        carried = {s for name in sources_of(node)[:1] for s in _carried(own.trunk, 0, name)}
        return sorted(places[s] for s in carried & places.keys())

    def stop(self, node: fx.Node) -> dict[str, str] | None:
        """Why a node of a head is not shared; None where the reason is that of a node in front of it."""
        part, names = part_of(node), sources_of(node)
        if not part.startswith("head ") or not names or node.op in ("placeholder", "get_attr", "output"):
            return None
        k, own = _task(part), names[0]
        first = self.back[k].get(own)
        if self._shared(k, own):
            return None  # it hands over, or computes again, what is shared
        if own in self.barriers[k]:
            return {"kind": "barrier", "reason": self.barriers[k][own]}
        reason = self.trunk.ends.get(first or "")
        if reason is not None:
            kind = "unmatched" if first in self.trunk.unmatched else "output" if reason in RETURNED else "unsound"
            return {"kind": kind, "reason": reason}
        inputs = self.inputs[k][own]
        if first is None and all(name in self.back[k] or self._shared(k, name) for name in inputs):
            parting = self.trunk.alignment.parting
            told = parting[k - 1] if k else next((text for text in parting if text), "")
            return {"kind": "differ", "reason": f"{_PARTED}: the first {told}" if told else _PARTED}
        if first is not None and all(self._shared(k, name) for name in inputs):
            return {"kind": "cut", "reason": _ASKED}
        return None

    def _shared(self, k: int, name: str) -> bool:
        """Whether a node of model k is in the trunk, in a stem, or the same for every input."""
        in_front = self.back[k].get(name) in self.shared or name in self.trunk.alignment.stem(k)
        return in_front or name not in self.trunk.labellings[k].dynamic


def _carried(trunk: Trunk, k: int, name: str) -> set[int]:
    """Numbers, in model k, of the trunk's spaces of which its node's value has features."""
    found: set[int] = set()
    for labels in trunk.labellings[k].fields.get(name, ()):
        found |= set(trunk.spaces[k].layout(labels).space.unique().tolist())
    return found - {-1}

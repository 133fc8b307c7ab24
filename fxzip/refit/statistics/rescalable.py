"""Calls whose outputs can be rescaled feature by feature: where statistics are refitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from ...analysis.rules import varying
from ...partition.alignment import attribute
from ...rewriting.zip_plan import ZipPlan


@dataclass(frozen=True)
class Layer:
    """A call whose output can be rescaled feature by feature."""

    part: str  # "trunk" or "head K"
    name: str  # node in model 0, or in the head's own model
    twins: Mapping[int, str]  # model -> its node
    axis: int
    weight: str  # target in the zipped module

    @property
    def key(self) -> tuple[str, str]:
        return self.part, self.name


def trunk_layers(plan: ZipPlan) -> list[Layer]:
    """Calls that write merged features with parameters of their own, and with no BatchNorm behind to rescale them."""
    trunk = plan.trunk
    label, program = trunk.labellings[0], trunk.alignment.programs[0]
    users: dict[str, int] = {}
    for node in trunk.nodes:
        for param in label.touches[node]:
            users[param] = users.get(param, 0) + 1
    found: dict[str, Layer] = {}
    for node in program.module.graph.nodes:
        if node.name not in set(trunk.nodes) or node.op != "call_module":
            continue
        module = attribute(program.module, str(node.target))
        fields = label.fields.get(node.name, ())
        params = label.touches[node.name]
        if len(fields) != 1 or len(varying(fields[0])) != 1 or any(users[p] > 1 for p in params):
            continue
        if not bool((trunk.spaces[0].layout(fields[0]).space >= 0).all()) or not _writes(plan, node, fields[0]):
            continue
        (axis,) = varying(fields[0])
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        weight = getattr(module, "weight", None)
        linear = isinstance(weight, Tensor) and weight.ndim > 1 and list(dict(module.named_children())) == []
        if linear and not isinstance(module, nn.Embedding) and f"{node.target}.weight" in params:
            found[node.name] = _layer(plan, node, axis)
        elif norm and isinstance(weight, Tensor):
            found.pop(node.all_input_nodes[0].name, None)
            found[node.name] = _layer(plan, node, axis)
    return list(found.values())


def _writes(plan: ZipPlan, node: fx.Node, labels: Tensor) -> bool:
    """Whether the weight of a module call has one entry (or row) per feature of what the call returns."""
    spaces = plan.trunk.spaces[0]
    weight = spaces.labelling.params.get(f"{node.target}.weight")
    mine = spaces.klass[labels.reshape(-1)]
    runs = [run.reshape(-1) for run in weight.fields[:2]] if weight is not None else []
    return any(len(run) == len(mine) and bool((spaces.klass[run] == mine).all()) for run in runs)


def _layer(plan: ZipPlan, node: fx.Node, axis: int) -> Layer:
    twins = plan.trunk.alignment.pairs[node.name]
    return Layer("trunk", node.name, dict(enumerate(twins)), axis, f"trunk.{node.target}.weight")


def head_layers(plan: ZipPlan) -> list[Layer]:
    """The BatchNorms of the heads that are called once."""
    found = []
    for k, program in enumerate(plan.trunk.alignment.programs):
        own = set(plan.trunk.head_nodes(k))
        calls = [n for n in program.module.graph.nodes if n.name in own and n.op == "call_module"]
        for node in calls:
            module = attribute(program.module, str(node.target))
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(module.weight, Tensor)
            if norm and sum(attribute(program.module, str(n.target)) is module for n in calls) == 1:
                found.append(Layer(f"head {k}", node.name, {k: node.name}, 1, f"head_{k}.{node.target}.weight"))
    return found

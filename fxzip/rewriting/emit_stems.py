"""Emit what lies in front of the trunk: each model's own stem, and a merge node for every value that enters.

Targets are `stem_K.PATH`, with the paths of the models. Without `start` there is nothing of this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx, nn

from ..analysis.random_trial import tensors_of
from ..analysis.rules import varying
from ..errors import CutError
from ..ops import merge
from ..tracing import Program, guards_at_entry, require
from ..tracing.provenance import Provenance, mark
from .merged_parameters import PlaceMap, merged_layout
from .parts import Tensors, held_by, parts
from .zip_plan import ZipPlan


def copied_node(
    graph: fx.Graph, node: fx.Node, prefix: str, env: dict[str, fx.Node], part: str, writes: bool
) -> fx.Node:
    """Append a copy of a node that finds its parameters under `prefix` and its inputs in `env`."""
    new = graph.node_copy(node, lambda n: env[n.name])
    if node.op in ("call_module", "get_attr"):
        new.target = f"{prefix}.{node.target}"
    new.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
    mark(new, Provenance(part, (node.name,), writes))
    return new


def _new(env: dict[str, fx.Node], node: fx.Node) -> fx.Node:
    return env[node.name]


def emit_guards(graph: fx.Graph, programs: Sequence[Program], inputs: Sequence[fx.Node]) -> None:
    """Append what all models take for granted of their arguments and of their sizes, each thing once."""
    made: dict[str, fx.Node] = {}
    for program in programs:
        given = [node for node in program.module.graph.nodes if node.op == "placeholder"]
        env = {node.name: new for node, new in zip(given, inputs, strict=True)}
        for guard, above in guards_at_entry(program.module, program.shapes).items():
            for node in (*above, guard):
                args = fx.node.map_arg((node.args, node.kwargs), partial(_new, env))
                key = repr((node.target, *args)) if node.target is not require else repr((node.target, args[0][:2]))
                if key not in made:
                    made[key] = copied_node(graph, node, "", env, "trunk", False)
                    mark(made[key], Provenance("trunk", (f"guard of {node.name}",)))  # it stands for no node of a model
                env[node.name] = made[key]


def emit_stems(
    graph: fx.Graph, root: nn.Module, plan: ZipPlan, inputs: Sequence[fx.Node], tensors: Tensors | None = None
) -> list[dict[str, fx.Node]]:
    """What each model computes on its own, from the inputs that all have in common. Out: nodes by name, per model."""
    return [_stem(graph, root, plan, k, inputs, tensors) for k in range(len(plan.trunk.spaces))]


def _stem(
    graph: fx.Graph, root: nn.Module, plan: ZipPlan, k: int, inputs: Sequence[fx.Node], tensors: Tensors | None
) -> dict[str, fx.Node]:
    program = plan.trunk.alignment.programs[k]
    own = plan.trunk.alignment.stem(k)
    nodes = list(program.module.graph.nodes)
    needed = own | plan.trunk.alignment.stems[k].reads
    read = {name for node in needed for name in plan.trunk.labellings[k].touches[node]}
    values = tensors[k] if tensors else tensors_of(program)
    root.add_module(f"stem_{k}", parts(program.module, values, held_by(program.module, read, needed)))
    given = dict(zip([node.name for node in nodes if node.op == "placeholder"], inputs, strict=True))
    env: dict[str, fx.Node] = {}
    for node in nodes:
        writes = node.name in program.mutators
        if node.op == "placeholder":
            env[node.name] = given[node.name]
            if own & program.mutators and node.name in program.shapes:  # another stem reads the input too
                env[node.name] = graph.call_method("clone", (given[node.name],))
                mark(env[node.name], Provenance(f"stem {k}", (node.name,)))
        elif node.name in needed and node.op != "output":
            env[node.name] = copied_node(graph, node, f"stem_{k}", env, f"stem {k}", writes)
    return env


def emit_entries(
    graph: fx.Graph, root: nn.Module, plan: ZipPlan, stems: Sequence[dict[str, fx.Node]]
) -> dict[str, fx.Node]:
    """x* = Σ_k M_k x_k for every value that enters the trunk, by its name in model 0.

    Raises:
        CutError: features of an entry lie along several runs of axes.
    """
    alignment = plan.trunk.alignment
    return {
        twins[0]: _merged(graph, root, plan, twins, [stems[k][twin] for k, twin in enumerate(twins)])
        for twins in alignment.entries
    }


def _merged(graph: fx.Graph, root: nn.Module, plan: ZipPlan, twins: Sequence[str], values: list[fx.Node]) -> fx.Node:
    trunk = plan.trunk
    programs = trunk.alignment.programs
    node = next(n for n in programs[0].module.graph.nodes if n.name == twins[0])
    stem, dynamic = trunk.alignment.stem(0), trunk.labellings[0].dynamic
    common = len(set(values)) == 1 and values[0].op == "placeholder"
    if common or not any(u.name in dynamic and u.name not in stem for u in node.users):
        return values[0]  # an input of all models, or read for its size only
    runs = [trunk.labellings[k].fields.get(twin, ()) for k, twin in enumerate(twins)]
    axes = sorted({tuple(sorted(varying(run))) for own in runs for run in own})
    if len(axes) > 1:
        raise CutError(
            f"Features that are merged at `start` must lie along one run of axes; those of `{twins[0]}` lie along "
            f"{' and along '.join(map(str, axes))}. Choose another place."
        )
    along = axes[0] if axes else ()
    sizes = [tuple(trunk.labellings[k].program.shapes[twin][a] for a in along) for k, twin in enumerate(twins)]
    like = next((p for p in programs[0].module.parameters() if p.is_floating_point()), torch.zeros((), device="cpu"))
    rows, columns, weights, height = _entry_matrix(plan, runs, sizes)
    if height != math.prod(sizes[0]) and len(along) > 1:
        raise CutError(f"Features of `{twins[0]}` lie along axes {along} together; their number cannot change.")
    wanted = sizes[0] if height == math.prod(sizes[0]) else (height,)
    tables = []
    for name, table in (("rows", rows), ("columns", columns), ("weights", weights.to(like.dtype))):
        root.register_buffer(f"merge_{twins[0]}_{name}", table.to(like.device))
        tables.append(graph.get_attr(f"merge_{twins[0]}_{name}"))
    result = graph.call_function(merge, (tuple(values), *tables, along, wanted))
    for made in (*tables, result):
        mark(made, Provenance("merge", tuple(twins)))
    return result


def _entry_matrix(
    plan: ZipPlan, runs: Sequence[Sequence[Tensor]], sizes: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows, columns (counted through all models) and weights of M, and its height; places without a feature are
    averaged."""
    trunk = plan.trunk
    labels = [
        own[0] if own else torch.zeros(math.prod(n), dtype=torch.int64, device="cpu")
        for own, n in zip(runs, sizes, strict=True)
    ]
    layouts = [spaces.layout(own) for spaces, own in zip(trunk.spaces, labels, strict=True)]
    merged = merged_layout(trunk.spaces[0], labels[0], plan.merges)
    here = [int(s) for s in merged.space.unique() if s >= 0]
    rows, columns, weights, start = [], [], [], 0
    for k, layout in enumerate(layouts):
        matrices = {(s, s): plan.merges[s].M(k) for s in here}
        places = PlaceMap.between(layout, merged, matrices)
        plain = merged.space[places.rows] < 0
        rows.append(places.rows)
        columns.append(places.columns + start)
        weights.append(torch.where(plain, places.weights / len(layouts), places.weights))
        start += places.width
    return torch.cat(rows), torch.cat(columns), torch.cat(weights), len(merged.space)

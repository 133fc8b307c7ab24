"""All models in one module and nothing merged: the upper bound of every zip, at the price of all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from ..analysis.flops import count_flops
from ..compiler.arguments import models_and_sample, tasks_of
from ..compiler.session import with_task_names
from ..rewriting.emit import forget_buffers
from ..rewriting.emit_stems import copied_node
from ..rewriting.module import ZippedModule, reuse_memory
from ..rewriting.node_facts import node_facts
from ..rewriting.report import Report, costs, described_inputs, tracing_facts, uncounted
from ..tracing import Program, plain_context
from ..tracing.joint_inputs import trace_all
from ..tracing.option_values import checked
from ..tracing.provenance import mark, provenance_of


@plain_context()
@checked
def side_by_side(models: Sequence[nn.Module] | Mapping[str, nn.Module], sample_input: Any) -> ZippedModule:
    """The models behind one interface, that of `compile_zip`: a tuple with each model's output, or a dict where they
    have the names of their tasks, `.single(i)`, `.report`. The models need not have anything in common but the input.

    >>> import torch
    >>> a, b = nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> x = torch.randn(5, 4)
    >>> both = side_by_side([a, b], x)
    >>> bool((both(x)[1] == b(x)).all())
    True

    Args:
        models: two or more, in a list, or by the names of their tasks.
        sample_input: a tensor, or a tuple or dict of tensors, that every model takes; or `fxzip.PerModel` of an input
            for each model. The result then takes the inputs of all models, one after another.

    Raises:
        InputError, TraceError: see `fxzip.errors`.
    """
    networks, call = models_and_sample((models, sample_input), "side_by_side", own_inputs=True)
    programs = tuple(trace_all(networks, call))
    graph, root = fx.Graph(), nn.Module()
    inputs: dict[int | str, fx.Node] = {}
    outputs = []
    for k, program in enumerate(programs):
        root.add_module(f"head_{k}", program.module)
        outputs.append(_head(graph, program, k, inputs))
    graph.output(tuple(outputs))
    _placeholders_first(graph)
    graph.lint()
    result = ZippedModule(root, graph)
    result.eval()
    forget_buffers(result, programs)
    reuse_memory(result)
    result.meta["fxzip_report"] = _report(result, programs)
    return with_task_names(result, tasks_of(models))


def _head(graph: fx.Graph, program: Program, k: int, inputs: dict[int | str, fx.Node]) -> Any:
    """Append one model; returns its output. `inputs`: the placeholders so far, by position or keyword of the call."""
    env: dict[str, Any] = {}
    place = 0
    for node in program.module.graph.nodes:
        if node.op == "output":
            return fx.node.map_arg(node.args[0], lambda n: env[n.name])
        if node.op == "placeholder":
            key = place if place < len(program.call.args) else str(node.target)
            place += 1
            if isinstance(key, str) and key not in program.call.kwargs:
                env[node.name] = node.args[0]  # models may have different default values
                continue
            if key not in inputs:
                inputs[key] = copied_node(graph, node, "", env, "trunk", False)
            env[node.name] = inputs[key]
            if program.mutators and node.name in program.shapes:
                env[node.name] = _own_memory(graph, inputs[key], k)
        else:
            env[node.name] = copied_node(graph, node, f"head_{k}", env, f"head {k}", node.name in program.mutators)
    raise AssertionError("a graph ends with an output node")


def _own_memory(graph: fx.Graph, value: fx.Node, k: int) -> fx.Node:
    """A copy of an input, for a model that writes in place: the next model reads the input too."""
    clone = graph.call_method("clone", (value,))
    mark(clone, replace(provenance_of(value), part=f"head {k}"))
    return clone


def _placeholders_first(graph: fx.Graph) -> None:
    """Keyword inputs that only a later model knows come after the nodes of the first: move them to the front, those
    with a default value last."""
    given = sorted((n for n in graph.nodes if n.op == "placeholder"), key=lambda n: bool(n.args))
    for node in reversed(given):
        first = next(iter(graph.nodes))
        if node is not first:
            first.prepend(node)


def _report(result: ZippedModule, programs: tuple[Program, ...]) -> Report:
    cut: Mapping[str, Any] = {"after": [], "modules": [], "parting": [], "ends": {}}
    counted = count_flops(result, programs[0].sample)
    spent = costs(result, programs, counted)
    values = {
        "models": len(programs), "method": "side by side", "refit": None, "data": "no data needed",
        "self_check": [None] * len(programs), "notes": ["nothing is merged", *uncounted(spent)], "cut": cut,
        "spaces": [], **spent, "inputs": described_inputs(result, programs[0].sample), "unmerges": [], "barriers": [],
        "probed": [],
        "tracing": [tracing_facts(program) for program in programs],
        "nodes": node_facts(result, counted),
    }  # fmt: skip
    return Report(values)

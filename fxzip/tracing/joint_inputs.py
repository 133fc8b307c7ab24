"""Models with inputs of their own: every program is given the inputs of all models, and reads its own.

That way a batch is one call to all of them, and no stage behind the tracing needs to know.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from torch import fx, nn

from ..errors import InputError
from . import Program, trace
from .calls import Call, JointCall, batch_size


def trace_all(networks: Sequence[nn.Module], call: Call, others: Sequence[Call] = ()) -> list[Program]:
    """Every model as a program that takes `call`; where that is joint, each model is traced with its part. `others` are
    calls of other shapes.

    >>> import torch
    >>> call = JointCall.of([Call((torch.ones(2, 3),), {}), Call((torch.ones(2, 4),), {})])
    >>> a, b = trace_all([nn.Linear(3, 1), nn.Linear(4, 1)], call)
    >>> a.module(*call.args).shape, b.module(*call.args).shape
    (torch.Size([2, 1]), torch.Size([2, 1]))
    """
    programs = _traced(networks, call, others)
    if len({batch_size(program.call) for program in programs}) > 1:  # some take a single input only
        programs = _traced(networks, call, others, as_given=True)
    if not isinstance(call, JointCall):
        return programs
    return with_all_inputs(programs, JointCall.of(program.call for program in programs))


def _traced(
    networks: Sequence[nn.Module], call: Call, others: Sequence[Call], *, as_given: bool = False
) -> list[Program]:
    """Each model with its part of the call."""
    parts = call.parts if isinstance(call, JointCall) else (call,) * len(networks)
    programs: list[Program] = []
    for k, (model, part) in enumerate(zip(networks, parts, strict=True)):
        try:
            own = [_part(other, k) for other in others]
            programs.append(trace(model, part, name=f"model {k}", others=own, as_given=as_given))
        except InputError as error:
            if not programs or parts[0] is not part or error.__cause__ is None:  # the model itself raised nothing
                raise
            raise InputError(
                f"{error} Those in front of it do take this one: for models with inputs of their own give one for "
                "each, `sample_input=fxzip.PerModel(...)`, and say with `start` where the trunk begins."
            ) from error.__cause__
    return programs


def _part(call: Call, k: int) -> Call:
    return call.parts[k] if isinstance(call, JointCall) else call


def with_all_inputs(programs: Sequence[Program], call: JointCall) -> list[Program]:
    """The programs, each traced with its own part of the call, as programs that take all of the call.

    In: a program per part. Out: programs with a placeholder for every argument of `call`, in that order; on it each
    gives what it gave on its part.

    >>> import torch
    >>> from fxzip.tracing.calls import as_call
    >>> call = JointCall.of([as_call(torch.ones(2, 3)), as_call(torch.ones(2, 4))])
    >>> programs = [trace(nn.Linear(n, 1), part) for n, part in zip((3, 4), call.parts)]
    >>> [node.name for node in with_all_inputs(programs, call)[1].module.graph.nodes if node.op == "placeholder"]
    ['input_of_0', 'input_1']
    """
    return [_widened(programs, call, k) for k in range(len(programs))]


def _widened(programs: Sequence[Program], call: JointCall, k: int) -> Program:
    own = programs[k]
    graph = copy.deepcopy(own.module.graph)
    mine = _placeholders(graph, call.parts[k])
    shapes, axes = dict(own.shapes), dict(own.batch_axes)
    front = next(iter(graph.nodes))
    order: list[fx.Node] = []
    for j, (program, part) in enumerate(zip(programs, call.parts, strict=True)):
        for place, theirs in enumerate(_placeholders(program.module.graph, part)):
            if j == k:
                order.append(mine[place])
                continue
            with graph.inserting_before(front):
                order.append(graph.placeholder(f"{theirs.target}_of_{j}"))
            if theirs.name in program.shapes:
                shapes[order[-1].name] = program.shapes[theirs.name]
                axes[order[-1].name] = program.batch_axes.get(theirs.name, ())
    for node in reversed(order):
        first = next(iter(graph.nodes))
        if node is not first:
            first.prepend(node)
    graph.lint()
    module = fx.GraphModule(own.module, graph, "GraphModule")
    sample = Call(JointCall.of(program.sample for program in programs).args, {})
    return replace(own, module=module, call=Call(call.args, {}), sample=sample, batch_axes=axes, shapes=shapes)


def _placeholders(graph: fx.Graph, part: Call) -> list[fx.Node]:
    """The placeholders of a program in the order of its part of a joint call."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    by_name = {str(node.target): node for node in nodes}
    return [*nodes[: len(part.args)], *(by_name[key] for key in part.kwargs)]

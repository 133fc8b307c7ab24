"""Emit the zipped network: model 0's trunk with merged parameters, then each model's own head.

Targets are `trunk.PATH` and `head_K.PATH`, with the paths of the models. On an edge from the trunk to head k an
`unmerge` node (a gather) gives the head its own features, unless the plan folded it into the head's weights. Nodes of
the result say in `node.meta["fxzip"]` what part they belong to and which nodes they stand for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .align import attribute
from .analysis.spaces import Layout
from .basis import change_param, merged_param
from .plan import ZipPlan, head_nodes
from .rules import varying
from .tracing import Program


def unmerge(x: Tensor, index: Tensor, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Gather features along `axes`, seen as one run: the features of one model out of the merged ones.

    >>> unmerge(torch.tensor([[1.0, 2.0]]), torch.tensor([1, 1, 0]), (1,), (3,))
    tensor([[2., 2., 1.]])
    """
    if len(axes) == 1:
        return x.index_select(axes[0], index)
    ends = tuple(range(x.ndim - len(axes), x.ndim))
    moved = x.movedim(axes, ends)
    flat = moved.flatten(-len(axes)).index_select(-1, index)
    return flat.unflatten(-1, sizes).movedim(ends, axes)


def mix(x: Tensor, matrix: Tensor, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Features of one model as linear combinations of merged ones: `matrix` is [features of the model, merged]."""
    ends = tuple(range(x.ndim - len(axes), x.ndim))
    moved = x.movedim(axes, ends).flatten(-len(axes))
    return (moved @ matrix.to(x.dtype).T).unflatten(-1, sizes).movedim(ends, axes)


class ZippedModule(fx.GraphModule):
    """A multi-task network: an ordinary `torch.fx.GraphModule` that returns a tuple with each model's output."""

    @property
    def report(self) -> Any:
        """What was shared, what was not and why."""
        return self.meta.get("fxzip_report")

    def single(self, i: int) -> fx.GraphModule:
        """The network of task `i` alone: trunk and head i, the other heads removed.

        Raises:
            IndexError: there is no head i.
        """
        graph = copy.deepcopy(self.graph)
        output = next(node for node in graph.nodes if node.op == "output")
        heads = output.args[0]
        assert isinstance(heads, (tuple, list))
        if not -len(heads) <= i < len(heads):
            raise IndexError(f"`single` takes the number of a head, 0 to {len(heads) - 1}; found {i}.")
        output.args = (heads[i],)
        for node in reversed(list(graph.nodes)):
            part = node.meta.get("fxzip", {}).get("part", "trunk")
            if not node.users and node.op not in ("output", "placeholder") and part != f"head {i % len(heads)}":
                if part == "trunk" and node.meta.get("fxzip", {}).get("writes"):
                    continue
                graph.erase_node(node)
        return fx.GraphModule(copy.deepcopy(_holder(self)), graph)


def _holder(module: nn.Module) -> nn.Module:
    """A plain module with the same children, parameters and buffers."""
    holder = nn.Module()
    for name, child in module.named_children():
        holder.add_module(name, child)
    for name, param in module.named_parameters(recurse=False):
        holder.register_parameter(name, param)
    for name, buffer in module.named_buffers(recurse=False):
        holder.register_buffer(name, buffer)
    holder.train(module.training)
    return holder


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer a new value, in its own dtype; where it is shared it stays shared."""
    own = attribute(module, name)
    with torch.no_grad():
        if own.shape == value.shape:
            own.copy_(value)
        else:
            own.data = value.to(own.dtype)


def trunk_module(plan: ZipPlan) -> fx.GraphModule:
    """Model 0's graph module with merged parameters wherever a node of the trunk reads one."""
    trunk = plan.trunk
    programs = trunk.alignment.programs
    module = copy.deepcopy(programs[0].module)
    tensors = [{**dict(p.module.named_parameters()), **dict(p.module.named_buffers())} for p in programs]
    names = sorted({param for node in trunk.nodes for param in trunk.labellings[0].touches[node]})
    for name in names:
        twins = trunk.alignment.params[name]
        values = [tensors[k][twin] for k, twin in enumerate(twins)]
        _set(module, name, merged_param(twins, values, trunk.spaces, trunk.partners, plan.merges))
    return module


def head_module(plan: ZipPlan, k: int) -> fx.GraphModule:
    """Model k's graph module with the unmerge folded into what its head sums over."""
    trunk = plan.trunk
    program, spaces = trunk.alignment.programs[k], trunk.spaces[k]
    module = copy.deepcopy(program.module)
    touched = {param for node in head_nodes(trunk, k) for param in trunk.labellings[k].touches[node]}
    for name in sorted(touched & set(spaces.labelling.params)):
        labels = spaces.labelling.params[name]
        for place, run in enumerate(labels.fields):
            known = plan.reach[k][run.reshape(-1)].clamp(min=0)
            layout = spaces.layout(known)
            folded = {s for s in plan.folded[k] if bool((layout.space == trunk.partners[k][s]).any())}
            if folded:
                _set(module, name, _fold(plan, k, attribute(module, name), labels.groups, place, run, layout, folded))
    return module


def _fold(
    plan: ZipPlan, k: int, value: Tensor, groups: int, place: int, run: Tensor, layout: Layout, folded: set[int]
) -> Tensor:
    """W U_k along one axis; layout and merged width agree with model k's own (see `plan._foldable`)."""
    from .basis import change_axis

    partners = plan.trunk.partners[k]
    matrices = {s: plan.merges[s].U(k).T for s in sorted(folded)}
    axis = next(a for a, n in enumerate(run.shape) if n > 1)
    mapping = {own: s for s, own in enumerate(partners)}
    target = Layout(
        torch.tensor([mapping.get(int(s), -1) for s in layout.space]), layout.feature, layout.occurrence
    )
    del groups, place
    return change_axis(value.double(), axis, layout, target, matrices, partners)


class _Emitter:
    """Writes the new graph: the trunk, then head after head."""

    def __init__(self, plan: ZipPlan) -> None:
        self.plan = plan
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.env: dict[str, fx.Node] = {}
        self.persistent: set[str] = set()

    def _copy(self, node: fx.Node, program: Program, prefix: str, env: Mapping[str, fx.Node], part: str) -> fx.Node:
        new = self.graph.node_copy(node, lambda n: env[n.name])
        if node.op in ("call_module", "get_attr"):
            new.target = f"{prefix}.{node.target}"
        new.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        new.meta["fxzip"] = {"part": part, "from": [node.name], "writes": node.name in program.mutators}
        return new

    def trunk(self) -> None:
        trunk = self.plan.trunk
        program = trunk.alignment.programs[0]
        self.root.add_module("trunk", trunk_module(self.plan))
        shared = set(trunk.nodes)
        for node in program.module.graph.nodes:
            if node.op == "placeholder" and node.name not in shared:
                shared.add(node.name)
            if node.name in shared:
                new = self._copy(node, program, "trunk", self.env, "trunk")
                new.meta["fxzip"]["from"] = list(trunk.alignment.pairs.get(node.name, (node.name,)))
                self.env[node.name] = new

    def head(self, k: int) -> Any:
        trunk = self.plan.trunk
        program = trunk.alignment.programs[k]
        self.root.add_module(f"head_{k}", head_module(self.plan, k))
        own = set(head_nodes(trunk, k))
        back = {twin: name for name, twin in trunk.names(k).items()}
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        copies = bool(own & program.mutators)
        env: dict[str, fx.Node] = {}
        part = f"head {k}"
        order = list(program.module.graph.nodes)
        placeholders = [n for n in order if n.op == "placeholder"]
        for node in order:
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda n: env[n.name])
            if node.op == "placeholder":
                env[node.name] = inputs[placeholders.index(node)]
            elif node.name in own:
                env[node.name] = self._copy(node, program, f"head_{k}", env, part)
            elif any(user.name in own for user in node.users):
                static = node.name not in trunk.labellings[k].dynamic and node.name in program.shapes
                if static:
                    env[node.name] = self._static(node, program, k, env)
                else:
                    env[node.name] = self._handed(node, k, self.env[back[node.name]], copies)
        raise AssertionError("a graph ends with an output node")

    def _static(self, node: fx.Node, program: Program, k: int, env: dict[str, fx.Node]) -> fx.Node:
        """What does not depend on the input (a parameter, say) is the head's own, with all it is computed from."""
        for source in node.all_input_nodes:
            if source.name not in env:
                env[source.name] = self._static(source, program, k, env)
        return self._copy(node, program, f"head_{k}", env, f"head {k}")

    def _handed(self, node: fx.Node, k: int, merged: fx.Node, copies: bool) -> fx.Node:
        """A value of the trunk as head k sees it: unmerged where that was not folded."""
        trunk, plan = self.plan.trunk, self.plan
        part = {"part": f"head {k}", "from": [node.name], "writes": False}
        name = next(n for n, twin in trunk.names(k).items() if twin == node.name)
        value = merged
        for labels, target in zip(
            trunk.labellings[k].fields.get(node.name, ()), trunk.labellings[0].fields.get(name, ()), strict=False
        ):
            axes = tuple(sorted(varying(labels)))
            sizes = tuple(labels.shape[a] for a in axes)
            matrix = self._matrix(k, trunk.spaces[k].layout(labels), trunk.spaces[0].layout(target))
            if matrix is None:
                continue
            index = matrix if matrix.ndim == 1 else None
            held = f"unmerge_{k}_{node.name}_{'_'.join(map(str, axes))}"
            self.root.register_buffer(held, matrix)
            table = self.graph.get_attr(held)
            table.meta["fxzip"] = part
            value = self.graph.call_function(unmerge if index is not None else mix, (value, table, axes, sizes))
            value.meta["fxzip"] = {**part, "unmerge": True}
        if value is merged and copies and node.name in trunk.alignment.programs[k].shapes:
            value = self.graph.call_method("clone", (merged,))
            value.meta["fxzip"] = part
        del plan
        return value

    def _matrix(self, k: int, own: Layout, target: Layout) -> Tensor | None:
        """How places of model 0's run become places of model k's: a gather index, a matrix, or None if unchanged."""
        trunk, merges = self.plan.trunk, self.plan.merges
        numbers = {mine: s for s, mine in enumerate(trunk.partners[k])}
        result = torch.zeros(len(own.space), len(target.space))
        where = {
            (int(s), int(f), int(o)): place
            for place, (s, f, o) in enumerate(zip(target.space, target.feature, target.occurrence, strict=True))
            if s >= 0
        }
        changed = False
        for place, (mine, feature, times) in enumerate(zip(own.space, own.feature, own.occurrence, strict=True)):
            s = numbers.get(int(mine), -1)
            if s < 0 or s in self.plan.folded[k]:
                result[place, min(place, len(target.space) - 1)] = 1
                continue
            changed = True
            for j, weight in _row(merges[s].U(k)[int(feature)]):
                result[place, where[s, j, int(times)]] = weight
        if not changed:
            return None
        gather = bool((result.count_nonzero(1) == 1).all()) and bool((result.max(1).values == 1).all())
        return result.argmax(1) if gather else result


def _row(row: Tensor) -> list[tuple[int, float]]:
    return [(int(j), float(row[j])) for j in row.nonzero().flatten()]


def rewrite(plan: ZipPlan) -> ZippedModule:
    """Emit the zipped network of a plan. In: K programs and a plan; out: one module; nothing is modified."""
    emitter = _Emitter(plan)
    emitter.trunk()
    outputs = tuple(emitter.head(k) for k in range(len(plan.trunk.spaces)))
    emitter.graph.output(outputs)
    emitter.graph.lint()
    result = ZippedModule(emitter.root, emitter.graph)
    result.eval()
    _forget_buffers(result, plan)
    return result


def _forget_buffers(result: ZippedModule, plan: ZipPlan) -> None:
    """Buffers that were not in a model's state dict are not in the result's."""
    programs = plan.trunk.alignment.programs
    for name, _ in list(result.named_buffers()):
        part, _, path = name.partition(".")
        program = programs[0] if part == "trunk" else programs[int(part[5:])] if part.startswith("head_") else None
        if program is not None and path not in program.persistent:
            owner = attribute(result, name.rpartition(".")[0])
            owner._non_persistent_buffers_set.add(name.rpartition(".")[2])

"""Emit the zipped network: model 0's trunk with merged parameters, then each model's own head.

Targets are `trunk.PATH` and `head_K.PATH`, with the paths of the models. On an edge from the trunk to head k an
`unmerge` node (a gather) gives the head its own features, unless the plan folded it into the head's weights. Nodes of
the result say by their `Provenance` what part they belong to and which nodes they stand for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from ..analysis.random_trial import tensors_of
from ..analysis.resizing import resized
from ..ops import mix, unmerge
from ..partition.alignment import attribute
from ..partition.region import Trunk
from ..tracing import Program, guards_at_entry
from ..tracing.provenance import Provenance, mark, provenance_of
from .emit_stems import copied_node, emit_entries, emit_guards, emit_stems
from .handing import steps
from .merged_parameters import PlaceMap, merged_param
from .module import ZippedModule, set_tensor
from .module_settings import adopt_sizes
from .parts import Tensors, held_by, parts
from .zip_plan import ZipPlan, head_params


def trunk_module(plan: ZipPlan, tensors: Tensors | None = None) -> nn.Module:
    """Model 0's modules with merged parameters wherever a node of the trunk reads one.

    `tensors`: what to take for the models' parameters and buffers; None: those that they have.
    """
    trunk = plan.trunk
    programs = trunk.alignment.programs
    tensors = tensors or [tensors_of(program) for program in programs]
    read = {param for node in trunk.nodes for param in trunk.labellings[0].touches[node]}
    module = parts(programs[0].module, tensors[0], held_by(programs[0].module, (), trunk.nodes) - read)
    combined = {} if plan.combination is None else plan.combination.tensors(trunk, tensors)
    for name in sorted(read):
        twins = trunk.alignment.params[name]
        values = [tensors[k][twin] for k, twin in enumerate(twins)]
        if name in combined:
            set_tensor(module, name, combined[name])
        else:
            set_tensor(module, name, merged_param(twins, values, trunk.spaces, plan.merges))
    adopt_sizes(module)
    return module


def head_module(plan: ZipPlan, k: int, tensors: Tensors | None = None) -> nn.Module:
    """Model k's modules with the unmerge folded into the parameters that meet the features in its head.

    Where the head keeps fewer features, that is done to the module that does.
    """
    own = plan.heads.get(k)
    if own is not None:
        return _folded(trunk_module(own), plan, k)
    program = plan.trunk.alignment.programs[k]
    kept = held_by(program.module, head_params(plan.trunk, k), _head_calls(plan.trunk, k))
    return _folded(parts(program.module, tensors[k] if tensors else tensors_of(program), kept), plan, k)


def _head_calls(trunk: Trunk, k: int) -> set[str]:
    """The nodes of head k, and those of the trunk that it may run itself because they do not depend on the input."""
    nodes = trunk.alignment.programs[k].module.graph.nodes
    return {*trunk.head_nodes(k), *(node.name for node in nodes if node.name not in trunk.labellings[k].dynamic)}


def _folded(module: nn.Module, plan: ZipPlan, k: int) -> nn.Module:
    """The unmerge folded into model k's modules, in place."""
    trunk = plan.trunk
    spaces = trunk.spaces[k]
    matrices = {(s, s): plan.merges[s].entries[1][k].T for s in sorted(plan.folded[k])}
    sizes = {s: plan.merges[s].size for s in plan.folded[k]}
    for name in sorted(head_params(trunk, k) & set(spaces.labelling.params)):
        labels = spaces.labelling.params[name]
        for axis, run in labels.runs():
            layout = spaces.layout(plan.reach[k][run].clamp(min=0))
            held = {pair: matrix for pair, matrix in matrices.items() if bool((layout.space == pair[0]).any())}
            if held:
                assert labels.groups == 1  # blocks have an order of their own, which is given back instead
                kernel = labels.kernel(attribute(module, name).detach())
                folded = PlaceMap.between(layout, resized(layout, sizes), held).apply(kernel, axis)
                set_tensor(module, name, labels.natural(folded))
    adopt_sizes(module)
    return module


class _Emitter:
    """Writes the new graph: the trunk, then head after head."""

    def __init__(self, plan: ZipPlan, tensors: Tensors | None) -> None:
        self.plan, self.tensors = plan, tensors
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.env: dict[str, fx.Node] = {}
        self.stems: list[dict[str, fx.Node]] = []
        programs = plan.trunk.alignment.programs
        self.guards = [guards_at_entry(program.module, program.shapes) for program in programs]

    def trunk(self) -> None:
        trunk = self.plan.trunk
        program = trunk.alignment.programs[0]
        self.root.add_module("trunk", trunk_module(self.plan, self.tensors))
        shared = set(trunk.nodes)
        inputs = []
        for node in program.module.graph.nodes:
            if node.op == "placeholder":
                inputs.append(copied_node(self.graph, node, "", self.env, "trunk", False))
                mark(inputs[-1], Provenance("trunk", tuple(trunk.alignment.pairs.get(node.name, (node.name,)))))
                self.env[node.name] = inputs[-1]
        emit_guards(self.graph, trunk.alignment.programs, inputs)
        if trunk.alignment.stems:
            self.stems = emit_stems(self.graph, self.root, self.plan, inputs, self.tensors)
            self.env |= emit_entries(self.graph, self.root, self.plan, self.stems)
        for node in program.module.graph.nodes:
            if node.op != "placeholder" and node.name in shared and node not in self.guards[0]:
                new = copied_node(self.graph, node, "trunk", self.env, "trunk", node.name in program.mutators)
                sources = tuple(trunk.alignment.pairs.get(node.name, (node.name,)))
                mark(new, replace(provenance_of(new), sources=sources))
                self.env[node.name] = new

    def head(self, k: int) -> Any:
        self.root.add_module(f"head_{k}", head_module(self.plan, k, self.tensors))
        return _Head(self, k).emit()


class _Head:
    """Writes one head."""

    def __init__(self, emitter: _Emitter, k: int) -> None:
        self.emitter, self.k = emitter, k
        self.graph, self.plan, self.trunk = emitter.graph, emitter.plan, emitter.plan.trunk
        self.program = self.trunk.alignment.programs[k]
        self.own = set(self.trunk.head_nodes(k))
        self.back = {twin: name for name, twin in self.trunk.names(k).items()}
        self.written = self.program.memory.written_by(self.own)
        self.env: dict[str, fx.Node] = {}

    def emit(self) -> Any:
        """Append the head's nodes; returns the output, made of nodes of the new graph."""
        order = list(self.program.module.graph.nodes)
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        given = dict(zip([node.name for node in order if node.op == "placeholder"], inputs, strict=True))
        for node in order:
            if node.op == "output":
                for source in node.all_input_nodes:
                    self._value(source, given)
                return fx.node.map_arg(node.args[0], lambda n: self.env[n.name])
            if node.name in self.own and node.name not in given and node not in self.emitter.guards[self.k]:
                for source in node.all_input_nodes:
                    self._value(source, given)
                self._copy(node)
        raise AssertionError("a graph ends with an output node")

    def _copy(self, node: fx.Node) -> fx.Node:
        writes = node.name in self.program.mutators
        self.env[node.name] = copied_node(self.graph, node, f"head_{self.k}", self.env, f"head {self.k}", writes)
        return self.env[node.name]

    def _value(self, node: fx.Node, given: dict[str, fx.Node]) -> None:
        """Make a value available to the head.

        What does not depend on the input (a parameter, say) and what is no tensor (a size, the parts of a split) the
        head computes itself; other values of the trunk are handed over. Where the head writes into the memory of a
        value, it gets one copy of what that is a view of, and takes its own views.
        """
        if node.name in self.env:
            return
        source = self._seen_through(node)
        if source is not None and node.name in self.program.mutators:
            self._value(source, given)
            self.env[node.name] = self.env[source.name]
        elif source is not None:
            for other in node.all_input_nodes:
                self._value(other, given)
            self._copy(node)
        elif node.name in given:
            self.env[node.name] = self._own_memory(node, given[node.name])
        elif node.name in self.trunk.alignment.stem(self.k) and node.name in self.emitter.stems[self.k]:
            self.env[node.name] = self._own_memory(node, self.emitter.stems[self.k][node.name])
        elif node.name in self.trunk.labellings[self.k].dynamic and node.name in self.program.shapes:
            self.env[node.name] = self._handed(node)
        else:
            for other in node.all_input_nodes:
                self._value(other, given)
            self._copy(node)

    def _seen_through(self, node: fx.Node) -> fx.Node | None:
        """Of a value in front of the head that lies in memory which the head writes: the input that it is a view of,
        or that it is; None if there is none.

        Parts of what a call made anew are no views of anything.
        """
        values = self.program.memory.values
        mine = values.get(node.name, frozenset()) & self.written if node.name not in self.own else frozenset()
        for source in node.all_input_nodes if mine else ():
            shared = mine & values[source.name]
            made = source.name not in self.program.shapes and not any(
                shared & values[before.name] for before in source.all_input_nodes
            )
            if shared and not made:
                return source
        return None

    def _own_memory(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """A copy of a tensor if the head writes in place there: another head may read it too."""
        memory = self.program.memory.values.get(node.name, frozenset())
        if node.name not in self.program.shapes or not memory & self.written:
            return value
        clone = self.graph.call_method("clone", (value,))
        mark(clone, replace(provenance_of(value), part=f"head {self.k}", writes=False))
        return clone

    def _handed(self, node: fx.Node) -> fx.Node:
        """A value of the trunk as head k sees it: unmerged where that was not folded."""
        name = self.back[node.name]
        part = Provenance(f"head {self.k}", (node.name,))
        value = merged = self.emitter.env[name]
        device = next((p.device for p in self.program.module.parameters()), None)
        for step in steps(self.plan, self.k, node.name, name):
            held = f"unmerge_{self.k}_{node.name}_{'_'.join(map(str, step.axes))}"
            while hasattr(self.emitter.root, held):  # `a_1` along axis 2, and `a` along 1 and 2
                held += "_"
            self.emitter.root.register_buffer(held, step.table.to(device))
            table = self.graph.get_attr(held)
            mark(table, part)
            if step.split is not None:
                value = self.graph.call_method("unflatten", (value, *step.split))
                mark(value, part)
            function = unmerge if step.table.ndim == 1 else mix
            value = self.graph.call_function(function, (value, table, step.axes, step.sizes))
            mark(value, replace(part, unmerges=True))
            if step.split is not None:
                value = self.graph.call_method("flatten", (value, step.split[0], step.split[0] + 1))
                mark(value, part)
        return self._own_memory(node, value) if value is merged else value


def rewrite(plan: ZipPlan, tensors: Tensors | None = None) -> ZippedModule:
    """Emit the zipped network of a plan. In: K programs and a plan; out: one module; nothing is modified.

    `tensors`: what to take for the models' parameters and buffers; None: those that they have.
    """
    emitter = _Emitter(plan, tensors)
    emitter.trunk()
    emitter.graph.output(tuple(emitter.head(k) for k in range(len(plan.trunk.spaces))))
    emitter.graph.lint()
    result = ZippedModule(emitter.root, emitter.graph)
    result.eval()
    forget_buffers(result, plan.trunk.alignment.programs)
    return result


def forget_buffers(result: ZippedModule, programs: Sequence[Program]) -> None:
    """Buffers that were not in a model's state dict are not in the result's. In place."""
    for name, _ in list(result.named_buffers()):
        part, _, path = name.partition(".")
        own = part.startswith(("head_", "stem_"))
        program = programs[0] if part == "trunk" else programs[int(part[5:])] if own else None
        if program is not None and path not in program.persistent:
            owner = attribute(result, name.rpartition(".")[0])
            owner._non_persistent_buffers_set.add(name.rpartition(".")[2])

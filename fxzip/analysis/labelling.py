"""Push labels through the traced graph: one run on the sample, every ATen call looked up in the rule table.

The result is raw: labels before union, constraints per fx node. Constraints belong to the node that states them, so a
later stage can solve for any part of the graph, a trunk for instance, by leaving out what the other nodes say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from ..tracing import InParts, Program, flat_inputs, is_number, quiet_execution
from ..tracing.containers import flatten, leaves
from .dispatch import LabelMode
from .label_state import Barrier, Entry, Probed, Site, State
from .parameter_labels import ParamLabels
from .rules import RULES, AxisLabels, Constraints, Rule
from .rules.axis_labels import along
from .rules.constraint_store import ACROSS
from .unread import unread

__all__ = ["Barrier", "Labelling", "ParamLabels", "Probed", "Site", "label", "place_of"]


@dataclass(frozen=True, eq=False)
class Labelling:
    """What one run says about labels; see the module docstring."""

    program: Program
    size: int
    params: Mapping[str, ParamLabels]
    constraints: Mapping[str, Constraints]
    fields: Mapping[str, AxisLabels]
    touches: Mapping[str, frozenset[str]]  # node -> parameters and buffers its calls read
    dynamic: frozenset[str]  # nodes whose value depends on the input, or that write what does
    seen: Mapping[str, tuple[Tensor, ...]]  # node -> every distinct field inside it
    sites: tuple[Site, ...]
    barriers: tuple[Barrier, ...]
    probed: tuple[Probed, ...] = ()
    rewritten: Mapping[str, Mapping[str, AxisLabels]] = field(
        default_factory=dict
    )  # writer -> node -> its fields from then
    discrete: frozenset[str] = frozenset()  # nodes that give a tensor of booleans or integers
    unread: frozenset[str] = frozenset()  # nodes of whose values nobody reads more than the shape

    def fields_after(self, node: str, done: Collection[str]) -> AxisLabels:
        """The fields of a node's value once the calls in `done` have written into its memory."""
        found = self.fields.get(node, ())
        for writer, values in self.rewritten.items():
            if writer in done:
                found = values.get(node, found)
        return found


class _Run(fx.Interpreter):
    """Runs the graph node by node and files what each node's calls said."""

    def __init__(self, program: Program, state: State) -> None:
        super().__init__(program.module, garbage_collect_values=True)
        self.state = state
        self.memory, self.mutators, self.unread = program.memory, program.mutators, unread(program)
        self.holders: Counter[int] = Counter()  # in how many live values a tensor is, by id
        self.constraints: dict[str, Constraints] = {}
        self.fields: dict[str, AxisLabels] = {}
        self.touches: dict[str, frozenset[str]] = {}
        self.seen: dict[str, tuple[Tensor, ...]] = {}
        self.dynamic: set[str] = set()
        self.discrete: set[str] = set()
        self.numbers: set[fx.Node] = set()  # what depends on numbers among the arguments
        self.rewritten: dict[str, dict[str, AxisLabels]] = {}

    def run_node(self, n: fx.Node) -> Any:
        state = self.state
        state.node, state.calls, state.touches, state.store.constraints, state.seen = (
            n.name,
            0,
            set(),
            Constraints(),
            {},
        )
        state.made = []
        state.where = place_of(n)
        if n.op == "output":
            for tensor in leaves(self.map_nodes_to_values(n.args, n)):
                entry = state.entry(tensor)
                entry.used()
                for labels in entry.fields:
                    if entry.static:
                        state.store.pin(labels, "the model returns parameters with it")
                    else:
                        state.store.pin(labels, "it is the model's output", "output")
        # a write such as `out[mask] = value` returns nothing, and does what depends on what it is given
        given = leaves(self.map_nodes_to_values((n.args, n.kwargs), n)) if n.name in self.mutators else []
        moving = any(not state.entry(t).static for t in given)
        value = super().run_node(n)
        if n.op == "placeholder":
            for tensor in leaves(value):
                state.file(Entry(tensor, (), False, False))
        used = n.name not in self.unread  # else what it does to features matters to nobody
        self.constraints[n.name] = state.store.constraints if used else Constraints()
        self.touches[n.name] = frozenset(state.touches if used else ())
        self.seen[n.name] = tuple(state.seen.values() if used else ())
        if isinstance(value, Tensor) and used:
            state.entry(value).used()
            self.fields[n.name] = state.entry(value).fields
            if not value.is_floating_point() and not value.is_complex():
                self.discrete.add(n.name)
        if self._reads_numbers(n, value):
            self.numbers.add(n)
            for tensor in leaves(value):
                entry = state.entry(tensor)
                entry.static, entry.known, entry.uniform = False, False, frozenset()
        if moving or any(not state.entry(t).static for t in leaves(value)):
            self.dynamic.add(n.name)
        if n.name in self.memory.writes:
            self._relabel(n)
        self._forget(n, value)
        return value

    def _reads_numbers(self, n: fx.Node, value: Any) -> bool:
        """Whether a value is another one for another number among the arguments, although no tensor went into it."""
        if n.op == "placeholder":
            return bool(flatten(value, is_number)[0])
        return n.op != "output" and any(source in self.numbers for source in n.all_input_nodes)

    def _relabel(self, writer: fx.Node) -> None:
        """What older values hold now that a call has written in place."""
        memory = self.memory
        own = self.rewritten[writer.name] = {}
        for node, value in self.env.items():
            if isinstance(value, Tensor) and memory.writes[writer.name] & memory.values.get(node.name, frozenset()):
                entry = self.state.entry(value)
                own[node.name] = entry.fields
                if not entry.static and node.op != "get_attr":  # of its state each model has its own
                    self.dynamic.add(node.name)

    def _forget(self, n: fx.Node, value: Any) -> None:
        """Drop what only the calls inside the node needed, and values that no later node reads, so that memory is that
        of the plain forward pass."""
        entries, holders = self.state.entries, self.holders
        holders.update(id(t) for t in leaves(value))
        freed = [self.env[node] for node in self.user_to_last_uses.get(n, ())]
        dead = [id(t) for t in leaves(freed)]
        holders.subtract(dead)
        for key in [*self.state.made, *dead]:
            if holders[key] <= 0:
                entries.pop(key, None)
                del holders[key]


_OURS = re.compile(r"[/\\](torch|fxzip)[/\\]")  # files whose lines say nothing about the model


def place_of(node: fx.Node) -> str:
    """How messages name a node: its name, module path and source line when known."""
    parts = [f"node `{node.name}`"]
    if node.op == "call_module":
        parts.append(f"module `{node.target}`")
    trace = node.meta.get("stack_trace") or node.stack_trace
    if trace:
        lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
        lines = [line for line in lines if not _OURS.search(line)]
        if lines:
            file, line = lines[-1].split(",")[:2]
            name = file.split("/")[-1].strip('" ')
            parts.append(f"{name}:{line.split()[-1]}")
    return ", ".join(parts)


def label(program: Program, rules: Mapping[str, Rule] | None = None) -> Labelling:
    """Run `program` once on its sample and collect what every call says about labels. `rules`: None for `RULES`.

    Every axis of every parameter (and of every floating buffer in the state dict) starts with labels of its own. Where
    calls meet a parameter block by block (one weight per head), or lay several axes of it along one, it is run again,
    with labels for each block, or for all places of these axes. Where calls make such places equal again, as those that
    sum over one of the axes do, each axis has its own.
    """
    lying: dict[str, tuple[int, ...]] = {}
    apart: set[str] = set()
    while True:
        labelling, state = _labelled(program, RULES if rules is None else rules, lying)
        pins = [pin for stated in labelling.constraints.values() for pin in stated.pins if pin.kind == "fixed"]
        apart |= state.made_equal()
        found = state.lying_free([pin.labels for pin in pins if not pin.reason.startswith(ACROSS)]) | lying
        wanted = {n: axes for n, axes in found.items() if len(axes) == 1 or n not in apart}
        if wanted.keys() == lying.keys():
            return labelling
        lying = wanted  # these have such labels from the start


def _labelled(
    program: Program, rules: Mapping[str, Rule], lying: Mapping[str, tuple[int, ...]]
) -> tuple[Labelling, State]:
    """The labels of one run, which begins with those of `ParamLabels.lying` for some parameters."""
    state = State(rules)
    tensors = dict(program.module.named_parameters())
    buffers = {
        name: value
        for name, value in program.module.named_buffers()
        if name in program.persistent and (value.is_floating_point() or value.is_complex())
    }
    for name, tensor in (*tensors.items(), *buffers.items()):
        if name in lying:
            labels = ParamLabels.lying(state.store, tensor.shape, lying[name])
        else:
            axes = enumerate(tensor.shape)
            labels = ParamLabels(tuple(along(state.store.fresh(n), a, tensor.ndim) for a, n in axes if n > 1))
        state.names[id(tensor)] = name
        state.params[name] = labels
        state.held[id(tensor)] = Entry(tensor, labels.fields, True, True)
    run = _Run(program, state)
    with quiet_execution(), LabelMode(state), InParts():
        run.run(*flat_inputs(program.module, program.call))
    labelling = Labelling(
        program, state.store.size, dict(state.params), run.constraints, run.fields, run.touches,
        frozenset(run.dynamic), run.seen, tuple(state.sites), tuple(state.barriers), tuple(state.probed),
        run.rewritten, frozenset(run.discrete), run.unread,
    )  # fmt: skip
    return labelling, state

"""Push labels through the traced graph: one run on the sample, every ATen call looked up in the rule table.

The result is raw: labels before union, facts per fx node. Constraints belong to the node that states them, so a later
stage can solve for any part of the graph, a trunk for instance, by leaving out what the other nodes say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import RuleError
from ..rules import Facts, Fields, Invocation, Ledger, Operand, Rule, elementwise, is_pointwise, varying
from ..rules.fields import along
from ..rules.probing import probe
from ..tracing import Program, flat_inputs, quiet_execution
from .writing import seen_through, window, write

_VALUES_COMPARED = 1 << 22  # constants above this size count as different everywhere


@dataclass(frozen=True, eq=False)
class ParamLabels:
    """Labels of one parameter or buffer: one field per labelled axis. `groups` > 1: a grouped kernel, whose second
    field varies with the group (see `rules.contraction.convolution`)."""

    fields: Fields
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Site:
    """A place where features can be watched: argument `arg` (-1: the result) of the `call`-th ATen call of a node."""

    node: str
    call: int
    arg: int
    labels: Tensor
    shape: torch.Size
    consumed: bool


@dataclass(frozen=True)
class Probed:
    """A call without a rule whose effect on labels was found out by trial (see `rules.probing`)."""

    node: str
    call: str
    reason: str


@dataclass(frozen=True)
class Barrier:
    """A call without a rule: features stop being shared here."""

    node: str
    call: str
    reason: str


@dataclass(frozen=True, eq=False)
class Labelling:
    """What one run says about labels; see the module docstring."""

    program: Program
    size: int
    params: Mapping[str, ParamLabels]
    facts: Mapping[str, Facts]
    fields: Mapping[str, Fields]
    touches: Mapping[str, frozenset[str]]  # node -> parameters and buffers its calls read
    dynamic: frozenset[str]  # nodes whose value depends on the input
    seen: Mapping[str, tuple[Tensor, ...]]  # node -> every distinct field inside it
    sites: tuple[Site, ...]
    barriers: tuple[Barrier, ...]
    probed: tuple[Probed, ...] = ()


@dataclass
class _Entry:
    """A live tensor: its fields, whether it is the same for every input, and whether parameters went into it."""

    tensor: Tensor
    fields: Fields
    static: bool
    learned: bool


@dataclass
class _State:
    program: Program
    rules: Mapping[str, Rule]
    ledger: Ledger = field(default_factory=Ledger)
    held: dict[int, _Entry] = field(default_factory=dict)  # parameters and buffers, by id
    entries: dict[int, _Entry] = field(default_factory=dict)  # what the run makes, by id
    names: dict[int, str] = field(default_factory=dict)
    params: dict[str, ParamLabels] = field(default_factory=dict)
    touches: set[str] = field(default_factory=set)
    seen: dict[int, Tensor] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    barriers: list[Barrier] = field(default_factory=list)
    probed: list[Probed] = field(default_factory=list)
    node: str = ""
    where: str = ""
    calls: int = 0

    def entry(self, tensor: Tensor) -> _Entry:
        found = self.held.get(id(tensor)) or self.entries.get(id(tensor))
        if found is None:
            found = self.entries[id(tensor)] = _Entry(tensor, (), True, False)
        return found

    def operand(self, tensor: Tensor) -> Operand:
        entry = self.entry(tensor)
        covered = frozenset(a for labels in entry.fields for a in varying(labels))
        axes = zip(tensor.shape, tensor.stride(), strict=True)
        loose = frozenset(a for a, (n, s) in enumerate(axes) if n > 1 and s and a not in covered)
        constant = entry.static and not entry.learned
        if constant and loose and tensor.numel() <= _VALUES_COMPARED:
            loose = frozenset(a for a in loose if not _same_along(tensor, a))
        return Operand(tensor, entry.fields, entry.static, loose)

    def restart(self, tensor: Tensor, fields: Any, groups: int) -> None:
        name = self.names.get(id(tensor))
        if name is not None and self.params[name].groups != groups:
            self.params[name] = ParamLabels(fields(), groups)
            self.entry(tensor).fields = self.params[name].fields


def _same_along(tensor: Tensor, axis: int) -> bool:
    return bool((tensor == tensor.narrow(axis, 0, 1)).all())


class _LabelMode(TorchDispatchMode):
    """Looks at every ATen call, applies its rule, and stores the result's fields."""

    def __init__(self, state: _State) -> None:
        super().__init__()
        self.state = state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        state = self.state
        name = func._schema.name.split("::")[-1]
        written = _written(func, args, kwargs)
        inputs = list(_tensors((args, kwargs)))
        for tensor in inputs:
            if id(tensor) in state.names:
                state.touches.add(state.names[id(tensor)])
        before = {id(t): state.operand(t) for t in inputs} if written else {}
        out = func(*args, **kwargs)
        if written and name.endswith("_"):
            name = name.rstrip("_")
        call = Invocation(
            name, func, tuple(args), kwargs, out, state.ledger,
            lambda t: before.get(id(t)) or state.operand(t), state.restart,
        )  # fmt: skip
        dynamic = any(not state.entry(t).static for t in inputs)
        labelled = any(state.entry(t).fields for t in inputs)
        result = _apply(state, call) if labelled else None
        if written:
            _write(state, call, written, result, dynamic)
        else:
            learned = any(state.entry(t).learned for t in inputs)
            _store(state, out, result, not dynamic, learned)
        if dynamic:
            _note_sites(state, call, inputs)
        state.calls += 1
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that the call writes in place."""
    result: list[Tensor] = []
    if not func._schema.is_mutable:
        return result
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            result += list(_tensors(value))
    return result


def _apply(state: _State, call: Invocation) -> Fields | list[Fields] | None:
    """The fields of the result; a call without a rule pins all it touches."""
    rule = state.rules.get(call.name)
    if rule is None and is_pointwise(call.func):
        rule = elementwise.elementwise
    if rule is not None:
        result = rule(call)
    else:
        result = None if _written(call.func, call.args, call.kwargs) else probe(call)
        if result is not None:
            state.probed.append(
                Probed(state.node, call.name, f"`{call.name}` ({state.where}) was probed on random data")
            )
    _check_fields(state, call, result)
    if result is None:
        reason = f"`{call.name}` ({state.where}) has no rule"
        state.barriers.append(Barrier(state.node, call.name, reason))
        for operand in call.operands():
            for labels in operand.fields:
                state.ledger.pin(labels, reason, "barrier")
    return result


def _check_fields(state: _State, call: Invocation, result: Any) -> None:
    """A rule gives one tuple of fields for a tensor, a list of tuples for several; sizes 1 or the tensor's."""
    pairs = zip(call.out, result, strict=False) if isinstance(result, list) else [(call.out, result or ())]
    for tensor, fields in pairs:
        for labels in fields if isinstance(tensor, Tensor) else ():
            if labels.ndim != tensor.ndim or any(
                a not in (1, b) for a, b in zip(labels.shape, tensor.shape, strict=True)
            ):
                raise RuleError(
                    f"The rule of `{call.name}` must give fields with the axes of the result, each of size 1 or the "
                    f"result's, {tuple(tensor.shape)}; found {tuple(labels.shape)} at {state.where}."
                )


def _store(state: _State, out: Any, result: Fields | list[Fields] | None, static: bool, learned: bool) -> None:
    if isinstance(out, Tensor):
        given = result if isinstance(result, tuple) else ()
        for labels in given:
            if not varying(labels):
                state.ledger.pin(labels, f"it is taken out alone ({state.where})")
        fields = tuple(labels for labels in given if varying(labels))
        state.seen.update((id(f), f) for f in fields)
        state.entries[id(out)] = _Entry(out, fields, static, learned)
    elif isinstance(out, (list, tuple)):
        for place, item in enumerate(out):
            part = result[place] if isinstance(result, list) and place < len(result) else None
            if isinstance(item, (Tensor, list, tuple)):
                _store(state, item, part, static, learned)


def _write(state: _State, call: Invocation, written: list[Tensor], result: Any, dynamic: bool) -> None:
    """In-place calls: label the whole memory anew, and what other tensors see of it."""
    for tensor in written:
        storage = tensor.untyped_storage()._cdata
        entries = [e for e in _entries(state) if e.tensor.untyped_storage()._cdata == storage]
        entries.sort(key=lambda e: -e.tensor.numel())
        base, where = next((e, w) for e in entries if (w := window(tensor, e.tensor)) or e.tensor is tensor)
        value = _value_written(state, call, tensor, result, dynamic)
        labelled = any(e.fields for e in entries) or value.fields
        for entry in entries:
            entry.learned = entry.learned or any(state.entry(t).learned for t in call.tensors())
        if labelled and where is not None:
            before = call.operand(tensor) if base.tensor is tensor else state.operand(base.tensor)
            base.fields = write(state.ledger, before, value, where, f"`{call.name}_` ({state.where})")
            views = {id(e): seen_through(e.tensor, base.tensor, base.fields) for e in entries if e is not base}
        else:
            views = {id(e): bool(labelled) for e in entries if e is not base}
        if (id(base.tensor) in state.names and labelled) or any(view is True for view in views.values()):
            _refuse(state, call, [*value.fields, *(f for e in entries for f in e.fields)])
            views = {id(e): () for e in entries}
        for entry in entries:
            view = views.get(id(entry), False)
            entry.fields = view if isinstance(view, tuple) else entry.fields
            entry.static = entry.static and (not dynamic or (view is False and entry is not base))
        state.seen.update((id(f), f) for f in base.fields)


def _value_written(state: _State, call: Invocation, tensor: Tensor, result: Any, dynamic: bool) -> Operand:
    ndim = tensor.ndim
    if call.name == "copy":
        value = call.operand(call.args[1])
        return value.place(range(ndim - value.ndim, ndim), ndim)
    if call.name in ("fill", "zero"):
        return Operand(tensor, (), True, frozenset())
    fields: Fields = result if isinstance(result, tuple) else ()
    covered = frozenset(a for labels in fields for a in varying(labels))
    return Operand(tensor, fields, not dynamic, frozenset(a for a, n in enumerate(tensor.shape) if n > 1) - covered)


def _entries(state: _State) -> Iterator[_Entry]:
    yield from state.held.values()
    yield from state.entries.values()


def _refuse(state: _State, call: Invocation, labels: list[Tensor]) -> None:
    reason = f"`{call.name}_` ({state.where}) writes it into a part of another tensor"
    state.barriers.append(Barrier(state.node, call.name + "_", reason))
    for run in labels:
        state.ledger.pin(run, reason, "barrier")


def _note_sites(state: _State, call: Invocation, inputs: list[Tensor]) -> None:
    """Remember where features go into a parameter's sum, and where they come out of one."""
    if call.name not in ("mm", "addmm", "bmm", "baddbmm", "convolution", "addmv", "mv"):
        return
    values = [(place, t) for place, t in enumerate(call.args) if isinstance(t, Tensor)]
    moving = [(place, t) for place, t in values if not state.entry(t).static]
    for place, tensor in [*moving, (-1, call.out)]:
        for labels in state.entry(tensor).fields:
            consumed = place >= 0 and len(moving) == 1
            state.sites.append(Site(state.node, state.calls, place, labels, tensor.shape, consumed))


class _Run(fx.Interpreter):
    """Runs the graph node by node and files what each node's calls said."""

    def __init__(self, state: _State) -> None:
        super().__init__(state.program.module, garbage_collect_values=True)
        self.state = state
        self.facts: dict[str, Facts] = {}
        self.fields: dict[str, Fields] = {}
        self.touches: dict[str, frozenset[str]] = {}
        self.seen: dict[str, tuple[Tensor, ...]] = {}
        self.dynamic: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        state = self.state
        state.node, state.calls, state.touches, state.ledger.facts, state.seen = n.name, 0, set(), Facts(), {}
        state.where = place_of(n)
        if n.op == "output":
            for tensor in _tensors(_values(self.map_nodes_to_values(n.args, n))):
                for labels in state.entry(tensor).fields:
                    state.ledger.pin(labels, "it is the model's output", "output")
        value = super().run_node(n)
        if n.op == "placeholder":
            for tensor in _tensors(_values(value)):
                state.entries[id(tensor)] = _Entry(tensor, (), False, False)
        self.facts[n.name] = state.ledger.facts
        self.touches[n.name] = frozenset(state.touches)
        self.seen[n.name] = tuple(state.seen.values())
        if isinstance(value, Tensor):
            self.fields[n.name] = state.entry(value).fields
        if any(not state.entry(t).static for t in _tensors(_values(value))):
            self.dynamic.add(n.name)
        self._forget(value)
        return value

    def _forget(self, value: Any) -> None:
        """Drop what only the calls inside the node needed, so that memory is that of the plain forward pass."""
        alive = {id(t) for t in _tensors([_values(v) for v in (*self.env.values(), value)])}
        self.state.entries = {key: entry for key, entry in self.state.entries.items() if key in alive}


def _values(value: Any) -> Any:
    """Nested values as lists, whatever containers (dataclasses of outputs too) they come in."""
    leaves, _ = torch.utils._pytree.tree_flatten(value)
    return leaves


def place_of(node: fx.Node) -> str:
    """How messages name a node: its name, module path and source line when known."""
    parts = [f"node `{node.name}`"]
    if node.op == "call_module":
        parts.append(f"module `{node.target}`")
    trace = node.meta.get("stack_trace") or node.stack_trace
    if trace:
        lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
        if lines:
            file, line = lines[-1].split(",")[:2]
            name = file.split("/")[-1].strip('" ')
            parts.append(f"{name}:{line.split()[-1]}")
    return ", ".join(parts)


@contextmanager
def _decomposed() -> Iterator[None]:
    """Attention as its matrix products, so that a handful of rules see it all."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def label(program: Program, rules: Mapping[str, Rule]) -> Labelling:
    """Run `program` once on its sample and collect what every call says about labels.

    Every axis of every parameter (and of every floating buffer in the state dict) starts with labels of its own.
    """
    state = _State(program, rules)
    tensors = dict(program.module.named_parameters())
    buffers = {k: v for k, v in program.module.named_buffers() if k in program.persistent and v.is_floating_point()}
    for name, tensor in (*tensors.items(), *buffers.items()):
        fields = tuple(along(state.ledger.fresh(n), a, tensor.ndim) for a, n in enumerate(tensor.shape) if n > 1)
        state.names[id(tensor)] = name
        state.params[name] = ParamLabels(fields)
        state.held[id(tensor)] = _Entry(tensor, fields, True, True)
    run = _Run(state)
    with quiet_execution(), _decomposed(), _LabelMode(state):
        run.run(*flat_inputs(program.module, program.call))
    return Labelling(
        program, state.ledger.size, dict(state.params), run.facts, run.fields, run.touches,
        frozenset(run.dynamic), run.seen, tuple(state.sites), tuple(state.barriers), tuple(state.probed),
    )  # fmt: skip

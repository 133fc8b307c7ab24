"""Which computations several models have in common: value numbering modulo weights.

Two nodes are the same computation if they make the same call with the same constants on the same inputs; weights,
widths and names do not matter. Nodes of one key are paired in the order in which they occur. A parameter may stand
for one parameter of each other model only, so ties must agree as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..tracing import Program, require
from .dependencies import dependencies, versions
from .parting import parted, settings
from .stems import Stem


@dataclass(frozen=True, eq=False)
class Alignment:
    """Pairs of nodes that compute the same thing in all models.

    Attributes:
        programs: the K models.
        pairs: node name in model 0 -> its K node names.
        params: parameter or buffer name in model 0 -> its K names.
        parting: for each model after the first, where it parts from the first, in words; "" if it never does.
        stems: what each model computes on its own before the trunk begins; empty if it begins at the input.
    """

    programs: tuple[Program, ...]
    pairs: Mapping[str, tuple[str, ...]]
    params: Mapping[str, tuple[str, ...]]
    parting: tuple[str, ...]
    stems: tuple[Stem, ...] = ()

    def stem(self, k: int) -> frozenset[str]:
        """Names of the nodes that model k computes on its own before the trunk begins."""
        return self.stems[k].nodes if self.stems else frozenset()

    @property
    def entries(self) -> list[tuple[str, ...]]:
        """The values that enter the trunk from the stems: their K node names, each."""
        return list(zip(*(stem.entries for stem in self.stems), strict=True))

    def entering(self, k: int) -> dict[str, int]:
        """Node of model k -> number of the entry."""
        return {twins[k]: number for number, twins in enumerate(self.entries)}


@dataclass
class _Names:
    """Stable numbers for the tensors of one model: by identity, in the order in which the graph meets them."""

    module: fx.GraphModule
    names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers()):
            self.names.setdefault(id(tensor), name)


def _configuration(module: nn.Module) -> Hashable:
    """What a leaf module computes, modulo weights and widths: class and settings that are not sizes of its tensors."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    children = tuple((name, _configuration(child)) for name, child in module.named_children())
    own = tuple((name, t.ndim) for name, t in tensors if "." not in name)
    return type(module).__qualname__, settings(module), own, children


def attribute(module: nn.Module, target: str) -> Any:
    """The attribute at a dotted path.

    >>> attribute(nn.Sequential(nn.Linear(2, 3)), "0.weight").shape
    torch.Size([3, 2])
    """
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


@dataclass(frozen=True)
class _Numbers:
    """Value numbers of one program's nodes, and what was written into their memory when a node reads them."""

    known: dict[fx.Node, int]
    nodes: Mapping[str, fx.Node]
    written: Mapping[str, Mapping[str, tuple[str, ...]]]

    @classmethod
    def of(cls, program: Program, known: dict[fx.Node, int]) -> _Numbers:
        return cls(known, {node.name: node for node in program.module.graph.nodes}, versions(program))

    def value(self, node: fx.Node, reader: fx.Node, place: int) -> Hashable:
        """What `reader` sees; an unpaired input, or one that an unpaired call has written into, equals nothing."""
        writers = self.written.get(reader.name, {}).get(node.name, ())
        return tuple(self.known.get(n, -1 - place) for n in (node, *(self.nodes[name] for name in writers)))


def _key(node: fx.Node, module: fx.GraphModule, numbers: _Numbers, place: int) -> Hashable:
    def constant(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return "node", numbers.value(value, node, place)
        if isinstance(value, (tuple, list)):
            return tuple(constant(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, constant(v)) for k, v in value.items())
        if isinstance(value, slice):
            return "slice", constant(value.start), constant(value.stop), constant(value.step)
        return repr(value)

    if node.target is require:  # wherever in the code it is
        return require, constant(node.args[:2])
    what: Hashable = node.op, str(node.target) if node.op == "call_method" else node.target
    if node.op == "placeholder":
        what = node.op, place
    elif node.op == "call_module":
        what = node.op, _configuration(attribute(module, str(node.target)))
    elif node.op == "get_attr":
        value = attribute(module, str(node.target))
        what = (node.op, value.ndim, str(value.dtype)) if isinstance(value, Tensor) else (node.op, repr(value))
    return what, constant(node.args), constant(node.kwargs)


def _tensors(node: fx.Node, names: _Names) -> list[tuple[str, Tensor]]:
    """Parameters and buffers that a node holds, in order, by their canonical names."""
    if node.op == "call_module":
        held = attribute(names.module, str(node.target))
        return [(names.names[id(t)], t) for t in (*held.parameters(), *held.buffers())]
    if node.op == "get_attr":
        value = attribute(names.module, str(node.target))
        return [(names.names[id(value)], value)] if isinstance(value, Tensor) and id(value) in names.names else []
    return []


def align(programs: Sequence[Program], stems: tuple[Stem, ...] = ()) -> Alignment:
    """Pair the nodes of all programs with those of the first; with `stems`, those behind them.

    >>> from fxzip.tracing import trace
    >>> a, b = (trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.ones(2, 3)) for _ in range(2))
    >>> len(align([a, b]).pairs)
    3
    """
    first = programs[0]
    none = Stem(frozenset(), ())
    maps = [
        _pair(first, other, *((stems[0], stems[k]) if stems else (none, none)))
        for k, other in enumerate(programs[1:], 1)
    ]
    own_stem = stems[0] if stems else none
    whole = {n.name for n in first.module.graph.nodes if n.name not in own_stem.nodes}
    common = set.intersection(*({*m[0]} for m in maps)) if maps else whole
    names = [n.name for n in first.module.graph.nodes if n.op != "output" and n.name in common]
    pairs = _closed(programs, {name: (name, *(m[0][name] for m in maps)) for name in names}, stems)
    own = {
        name
        for node in first.module.graph.nodes
        if node.name in pairs
        for name, _ in _tensors(node, _Names(first.module))
    }
    params = {name: (name, *(m[1][name] for m in maps)) for name in sorted(own)}
    return Alignment(tuple(programs), pairs, params, tuple(m[2] for m in maps), stems)


def _closed(
    programs: Sequence[Program], pairs: Mapping[str, tuple[str, ...]], stems: Sequence[Stem]
) -> dict[str, tuple[str, ...]]:
    """The pairs of which in every program all that must come before is paired, or in the stem."""
    graphs = [dependencies(program) for program in programs]
    kept = dict(pairs)
    inside = [{twins[k] for twins in kept.values()} for k in range(len(programs))]
    for own, stem in zip(inside, stems, strict=False):
        own |= stem.nodes
    before = 0
    while len(kept) != before:
        before = len(kept)
        for name, twins in list(kept.items()):
            places = list(zip(inside, graphs, twins, strict=True))
            if not all(own.issuperset(graph.predecessors(twin)) for own, graph, twin in places):
                del kept[name]
                for own, twin in zip(inside, twins, strict=True):
                    own.discard(twin)
    return kept


def _pair(
    first: Program, other: Program, left_stem: Stem, right_stem: Stem
) -> tuple[dict[str, str], dict[str, str], str]:
    """Pairs of nodes and of parameters, and where the two programs part. What enters from the stems is paired."""
    numbers = _Numbers.of(first, _entry_numbers(first, left_stem))
    waiting: dict[Hashable, list[fx.Node]] = defaultdict(list)
    nodes = [n for n in first.module.graph.nodes if n.op != "output" and n.name not in left_stem.nodes]
    for place, node in enumerate(nodes):
        numbers.known[node] = place
        waiting[_key(node, first.module, numbers, place)].append(node)
    theirs = _Numbers.of(other, _entry_numbers(other, right_stem))
    pairs: dict[str, str] = {}
    params: dict[str, str] = {}
    back: dict[str, str] = {}
    left, right = _Names(first.module), _Names(other.module)
    rest: fx.Node | None = None
    rights = [n for n in other.module.graph.nodes if n.op != "output" and n.name not in right_stem.nodes]
    asked = _asked(nodes) | _asked(rights)
    for place, node in enumerate(rights):
        queue = waiting.get(_key(node, other.module, theirs, place), [])
        if queue and _same_tensors(queue[0], node, (left, right), first, params, back):
            twin = queue.pop(0)
            theirs.known[node] = numbers.known[twin]
            pairs[twin.name] = node.name
        elif rest is None and node not in asked:
            rest = node
    lone = next((n for n in nodes if n.name not in pairs and n not in asked), None)
    if rest is None and lone is None:
        return pairs, params, ""
    ours, own = (_tensors(n, at) if n else [] for n, at in ((lone, left), (rest, right)))
    constants = [
        (a, b) for (name, a), (_, b) in zip(ours, own, strict=False) if lone and _is_constant(lone, name, a, first)
    ]
    return pairs, params, parted(first, lone, other, rest, constants)


def _asked(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Checks of sizes and numbers, and what is computed for these alone."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if node.target is require or (node.users and found.issuperset(node.users)):
            found.add(node)
    return found


def _entry_numbers(program: Program, stem: Stem) -> dict[fx.Node, int]:
    """Value numbers of what enters from the stem: the same for the same entry of all programs."""
    nodes = {node.name: node for node in program.module.graph.nodes}
    return {nodes[name]: -(1 << 40) - place for place, name in enumerate(stem.entries)}


def _same_tensors(
    twin: fx.Node, node: fx.Node, names: tuple[_Names, _Names], first: Program,
    params: dict[str, str], back: dict[str, str],
) -> bool:  # fmt: skip
    """Whether the tensors of two nodes can stand for each other; records them if so. `names`: of both models."""
    ours, theirs = _tensors(twin, names[0]), _tensors(node, names[1])
    if len(ours) != len(theirs):
        return False
    for (name, tensor), (other, value) in zip(ours, theirs, strict=True):
        if params.get(name, other) != other or back.get(other, name) != name or tensor.ndim != value.ndim:
            return False
        if _is_constant(twin, name, tensor, first) and not same_values(tensor, value):
            return False
    for (name, _), (other, _) in zip(ours, theirs, strict=True):
        params[name], back[other] = other, name
    return True


def _is_constant(node: fx.Node, name: str, tensor: Tensor, program: Program) -> bool:
    """Whether a tensor that a node holds is no weight: a buffer outside the `state_dict`, or integers or booleans.

    A single integer inside a leaf module, which counts batches there, is neither.
    """
    if name not in program.persistent and not isinstance(tensor, nn.Parameter):
        return True
    counts = node.op == "call_module" and tensor.ndim == 0
    return not (tensor.is_floating_point() or tensor.is_complex()) and not counts


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit, sparse ones too, on whatever devices.

    >>> same_values(torch.eye(2).to_sparse(), torch.eye(2).to_sparse())
    True
    """
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    first, other = (t if t.layout == torch.strided else t.to_dense() for t in (a, b.to(a.device)))
    return bool(torch.equal(first, other))

"""Scalars as features: what has no features of its own, and meets features one by one, is given theirs.

A gate `alpha * h` with one learned alpha, or a PReLU with one slope, is the same function as one with a vector of equal
entries. Two scalars cannot be matched, two vectors can: they are merged along the features of h. The same holds for
any learned constant that is broadcast along the features it meets, a weight for each position, say.

    alpha h  =  (alpha 1) ⊙ h            PReLU(h) = relu(h) - (a 1) ⊙ relu(-h)

In: traced models and what is known of their labels. Out: programs that compute the same; only where models differ.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..analysis.labelling import Labelling
from ..analysis.rules import Constraints, varying
from ..tracing import Program, quiet_execution
from ..tracing.aliasing import sharing
from .masks import masked_weights
from .own import heads_begin, weights_behind

_MEET = frozenset(
    [
        operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, torch.add, torch.sub, torch.mul,
        torch.div, torch.pow, torch.maximum, torch.minimum, "add", "sub", "mul", "div", "pow", "__add__", "__mul__",
    ]
)  # fmt: skip
_SLOPED = frozenset([torch.prelu, nn.functional.prelu, "prelu"])
_LARGEST = 1 << 22  # elements of what is lifted


def lifted(labelling: Labelling, differ: Collection[str], *, weights: bool = False) -> Program | None:
    """The program with every learned constant of `differ` lifted that meets features and has none; None: there is none.

    Args:
        differ: parameters and buffers in which the models do not agree.
        weights: weights that are computed from parameters become parameters, too (see `computed_weights`), where the
            models agree as well: features may be merged within one network.
    """
    program = labelling.program
    behind = {name: names & set(differ) for name, names in weights_behind(labelling).items()}
    places = [place for node in program.module.graph.nodes for place in _places(labelling, node, behind)]
    if weights:
        alike = [n for n in computed_weights(labelling, labelling.params.keys()) if not behind[n]]
        found = [*computed_weights(labelling, differ), *alike]
        places += [_Place(name, name, "", tuple(program.shapes[name])) for name in found]
    if not places:
        return None
    module = fx.GraphModule(program.module, copy.deepcopy(program.module.graph), "GraphModule").eval()
    nodes = {node.name: node for node in module.graph.nodes}
    values = _values(program, {place.constant for place in places})
    for number, place in enumerate(places):
        name = f"lifted_{number}"
        value = values[place.constant] if place.constant else _slope(program, place)
        module.register_parameter(name, nn.Parameter(_expanded(value, place)))
        if not place.source:
            _replace_all(module.graph, nodes[place.node], name)
            continue
        _replace(module.graph, nodes[place.node], name, place)
    _drop_unread(module.graph, labelling)
    module.graph.lint()
    module.recompile()
    whole = {place.node for place in places if not place.source}
    computed = {node.name: _needed([node]) for node in program.module.graph.nodes if node.name in whole}
    masked = masked_weights(program, computed)
    names = frozenset(f"lifted_{number}" for number, place in enumerate(places) if place.node in masked)
    memory = sharing(module, program.call, program.mutators) if program.mutators else program.memory
    shapes = {**program.shapes, **_new_shapes(module, program.shapes)}
    return replace(program, module=module, shapes=shapes, memory=memory, masked=names)


def computed_weights(labelling: Labelling, differ: Collection[str]) -> list[str]:
    """Nodes that compute a weight from parameters in which the models differ, element by element or by normalising
    them, for a call that sums over features.

    As a function of parameters the weight could be merged within one network, or fitted, only if the function is
    linear; as a parameter it can. The last sums, which are the heads' own, keep what they have; so do products of
    parameters, which are weights of features that no input meets.
    """
    program, constraints, behind = labelling.program, labelling.constraints, weights_behind(labelling)
    own = heads_begin(labelling, differ)
    sizes = {name: t.numel() for name, t in (*program.module.named_parameters(), *program.module.named_buffers())}
    plain: set[str] = set()  # static nodes that no sum lies behind
    found = []
    for node in program.module.graph.nodes:
        if node.name in labelling.dynamic or node.op in ("placeholder", "output") or node.name not in program.shapes:
            continue
        if constraints[node.name].consumed or not plain.issuperset(source.name for source in node.all_input_nodes):
            continue
        plain.add(node.name)
        if node.op == "get_attr" or not behind[node.name] & set(differ) or node.name in labelling.discrete:
            continue
        labels = [field.reshape(-1) for field in labelling.fields.get(node.name, ())]
        readers = [user for user in node.users if user.name in labelling.dynamic]
        summing = [user for user in readers if user.name not in own and _sums_over(constraints[user.name], labels)]
        small = program.shapes[node.name].numel() <= sum(sizes.get(name, 0) for name in behind[node.name])
        if summing and small and not _is_view(node, program):
            found.append(node.name)
    return found


def _sums_over(said: Constraints, labels: Sequence[Tensor]) -> bool:
    """Whether a node sums over features of these fields."""
    return any(bool(torch.isin(field, consumed).any()) for field in labels for consumed in said.consumed)


def _is_view(node: fx.Node, program: Program) -> bool:
    """Whether a node only moves what it reads: there is nothing to compute."""
    sources = [source for source in node.all_input_nodes if source.name in program.shapes]
    if len(sources) != 1:
        return False
    held = _values(program, {node.name, sources[0].name})
    storages = [held[name].untyped_storage().data_ptr() for name in (node.name, sources[0].name)]
    return storages[0] == storages[1] and (sources[0].op == "get_attr" or _is_view(sources[0], program))


def _replace_all(graph: fx.Graph, node: fx.Node, name: str) -> None:
    """Read the parameter wherever the node was read."""
    with graph.inserting_before(node):
        held = graph.get_attr(name)
    held.meta = dict(node.meta)
    node.replace_all_uses_with(held)


def _drop_unread(graph: fx.Graph, labelling: Labelling) -> None:
    """Erase what computed the constants, from parameters, and has lost its readers. Guards never had any."""
    read = {node.name for node in labelling.program.module.graph.nodes if node.users}
    for node in reversed(graph.nodes):
        still = node.name in read and node.name not in labelling.dynamic
        if still and not node.users and node.op != "placeholder" and node.name not in labelling.program.mutators:
            graph.erase_node(node)


@dataclass(frozen=True)
class _Place:
    """Where a constant meets features.

    Attributes:
        node: the call.
        constant: node whose value is lifted; "": the slope of a PReLU that the call holds.
        source: node with the features.
        shape: of what is lifted, broadcast against the features: theirs along their axes, else the constant's.
        slope: the constant is the slope below zero.
    """

    node: str
    constant: str
    source: str
    shape: tuple[int, ...]
    slope: bool = False


def _places(labelling: Labelling, node: fx.Node, behind: Mapping[str, set[str]]) -> list[_Place]:
    """The place where a constant meets features in this call, if there is one."""
    program = labelling.program
    if not behind[node.name] and not any(behind[source.name] for source in node.all_input_nodes):
        return []
    if node.op == "call_module":
        held = operator.attrgetter(str(node.target))(program.module)
        if not isinstance(held, nn.PReLU) or held.weight.numel() > 1:
            return []
        [source] = node.all_input_nodes
        return [_Place(node.name, "", source.name, s, True) for s in _shapes(labelling, source.name, ())]
    slope = node.target in _SLOPED
    if (not slope and node.target not in _MEET) or len(node.args) < 2:
        return []
    pair = [value for value in node.args[:2] if isinstance(value, fx.Node)]
    moving = [value.name for value in pair if value.name in labelling.dynamic]
    still = [value for value in pair if value.name not in labelling.dynamic and behind[value.name]]
    if len(moving) != 1 or len(still) != 1 or still[0].name not in program.shapes:
        return []
    if any(source.op == "placeholder" for source in _needed(still)):  # as long as the input is, say: no constant
        return []
    given = program.shapes[still[0].name]
    if slope and given.numel() > 1:
        return []
    return [
        _Place(node.name, still[0].name, moving[0], shape, slope)
        for shape in _shapes(labelling, moving[0], () if slope else tuple(given))
    ]


def _shapes(labelling: Labelling, source: str, constant: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shape to lift to, none if the value has no features or the constant varies along them."""
    whole = labelling.program.shapes.get(source)
    fields = labelling.fields.get(source, ())
    if whole is None or not fields or len(constant) > len(whole):
        return []
    axes = varying(max(fields, key=lambda labels: labels.numel()))
    shape = [1] * (len(whole) - len(constant)) + list(constant)
    if any(shape[axis] != 1 for axis in axes):
        return []
    shape = [whole[axis] if axis in axes else size for axis, size in enumerate(shape)]
    return [tuple(shape)] if torch.Size(shape).numel() <= _LARGEST else []


def _expanded(value: Tensor, place: _Place) -> Tensor:
    value = value.detach().reshape(()) if place.slope else value.detach()
    return value.reshape([1] * (len(place.shape) - value.ndim) + list(value.shape)).expand(place.shape).clone()


def _slope(program: Program, place: _Place) -> Tensor:
    node = next(n for n in program.module.graph.nodes if n.name == place.node)
    weight: Tensor = operator.attrgetter(str(node.target))(program.module).weight
    return weight


def _values(program: Program, wanted: set[str]) -> Mapping[str, Tensor]:
    """Values of nodes that do not depend on the input."""
    run = fx.Interpreter(program.module)
    env: dict[fx.Node, Any] = {}
    needed = _needed([node for node in program.module.graph.nodes if node.name in wanted])
    with quiet_execution():
        for node in program.module.graph.nodes:
            if node in needed:
                run.env = env
                env[node] = run.run_node(node)
    return {node.name: value for node, value in env.items() if node.name in wanted}


def _needed(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes, with all that is computed for them."""
    needed: set[fx.Node] = set()
    waiting = [*nodes]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    return needed


def _replace(graph: fx.Graph, node: fx.Node, name: str, place: _Place) -> None:
    """Read what was lifted in the place of the constant."""
    with graph.inserting_before(node):
        held = graph.get_attr(name)
        held.meta = dict(node.meta)
        if not place.slope:
            constant = next(source for source in node.all_input_nodes if source.name == place.constant)
            node.replace_input_with(constant, held)
            return
        source = next(source for source in node.all_input_nodes if source.name == place.source)
        below = graph.call_function(torch.relu, (graph.call_function(torch.neg, (source,)),))
        above = graph.call_function(torch.relu, (source,))
        result = graph.call_function(torch.sub, (above, graph.call_function(torch.mul, (below, held))))
    for new in (*below.all_input_nodes, below, above, *result.all_input_nodes, result):
        new.meta = new.meta or dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _new_shapes(module: fx.GraphModule, known: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Shapes of the nodes that are new: those of what they read."""
    result: dict[str, torch.Size] = {}
    for node in module.graph.nodes:
        if node.name in known:
            continue
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(module)
            if isinstance(value, Tensor):
                result[node.name] = value.shape
        elif node.op == "call_function":
            sizes = [result.get(source.name) or known.get(source.name) for source in node.all_input_nodes]
            if sizes and all(size is not None for size in sizes):
                with suppress(RuntimeError):  # no call that broadcasts
                    result[node.name] = torch.broadcast_shapes(*(size for size in sizes if size is not None))
    return result

"""What is each model's own, decided by dataflow: where heads begin, and what cannot be matched.

A zip shares a computation only if each model gets its own result back. Three things stand against that:

* *What a model returns.* On every path to an output the last call that sums over features with weights belongs to the
  head, whatever lies behind it, however many outputs there are.
* *What was never matched.* A tensor of the trunk may be averaged only along features that a feature space holds and a
  method has matched: features whose order is fixed, a single feature, a scalar, a kernel over positions are not.
* *What cannot be told apart.* A value without features, the mean over all of them say, is one function for all models:
  nothing behind the trunk may read it.

Where models agree to the bit in all that a node depends on, nothing is averaged, and nothing of this holds.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from ..analysis.labelling import Labelling
from ..analysis.rules import Constraints, varying
from ..analysis.spaces import FeatureSpaces
from .alignment import Alignment, same_values
from .dependencies import dependencies


def differing(alignment: Alignment) -> frozenset[str]:
    """Names in model 0 of the aligned parameters and buffers that are not the same in all models, to the bit.

    Integers are left out: those that matter have been compared when the nodes were paired.
    """
    tensors = [{**dict(p.module.named_parameters()), **dict(p.module.named_buffers())} for p in alignment.programs]
    return frozenset(
        name
        for name, twins in alignment.params.items()
        if (first := tensors[0][name]).is_floating_point() or first.is_complex()
        if not all(same_values(first, tensors[k][twin]) for k, twin in enumerate(twins))
    )


def weights_behind(labelling: Labelling) -> dict[str, set[str]]:
    """For each node the parameters and buffers that it reads, itself or through what does not depend on the input."""
    module = labelling.program.module
    names = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    result: dict[str, set[str]] = {}
    other = labelling.dynamic | labelling.unread
    for node in module.graph.nodes:
        static = [source.name for source in node.all_input_nodes if source.name not in other]
        result[node.name] = set(labelling.touches[node.name]).union(*(result[name] for name in static))
        if node.op == "get_attr":
            held = names.get(id(operator.attrgetter(str(node.target))(module)))
            result[node.name] |= set() if held is None else {held}
    return result


def agreeing(alignment: Alignment, labelling: Labelling, differ: Collection[str]) -> set[str]:
    """Nodes of model 0 whose values are the same in all models, to the bit: nothing that differs goes into them."""
    result: set[str] = set()
    entries, graph, behind = alignment.entering(0), dependencies(labelling.program), weights_behind(labelling)
    for node in labelling.program.module.graph.nodes:
        if node.name not in alignment.pairs or node.name in entries or behind[node.name] & set(differ):
            continue
        if result.issuperset(graph.predecessors(node.name)):
            result.add(node.name)
    return result


def heads_begin(labelling: Labelling, differ: Collection[str] | None) -> set[str]:
    """Nodes that sum over features with weights and from which an output is reached without another such node.

    `differ`: parameters in which the models do not agree. A sum with others does not count, so that what goes into a
    fixed code of the outputs (bins of a distribution, a basis) is each model's own, unless there is no one layer that
    writes what it reads (see `_one_layer`). None: all sums count.
    """
    weights = weights_behind(labelling)
    sums = {name for name, constraints in labelling.constraints.items() if constraints.sums}
    if differ is None:
        return _last(labelling, sums, {_output(labelling)})
    own = {name for name in sums if weights[name] & set(differ)}
    agreeing_heads = _last(labelling, sums, {_output(labelling)}) - own
    own |= {name for name in agreeing_heads if not _one_layer(labelling, sums, _last(labelling, own, {name}))}
    return _last(labelling, own, {_output(labelling)})


def _one_layer(labelling: Labelling, sums: set[str], begin: set[str]) -> bool:
    """Whether heads that begin with these sums are one layer deep, with something in front of them to share: what a
    residual network adds up is written by all its blocks."""
    graph = dependencies(labelling.program)
    front = set().union(*(nx.ancestors(graph, name) for name in begin))
    return not begin or (not front & begin and bool(front & sums))


def _output(labelling: Labelling) -> str:
    """The node that returns."""
    return labelling.program.module.graph.output_node().name


def _last(labelling: Labelling, sums: set[str], readers_of: set[str]) -> set[str]:
    """Those of the sums from which one of the nodes is reached without another such sum."""
    program = labelling.program
    graph = dependencies(program)
    exposed = set(readers_of)
    for node in reversed(program.module.graph.nodes):
        if node.name not in labelling.dynamic:
            continue
        readers = {user.name for user in node.users}
        if node.name in program.mutators:  # who sees the memory afterwards reads what was written
            readers |= set(graph.successors(node.name))
        if readers & exposed - sums:
            exposed.add(node.name)
    return exposed & sums


def unmatched_labels(constraints: Sequence[Constraints], spaces: FeatureSpaces) -> Tensor:
    """Labels of features that weights write and that no space with a choice holds, sorted."""
    written = [labels for stated in constraints for how, labels in stated.touched if how == "written"]
    if not written:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    labels: Tensor = torch.cat(written).unique()
    return labels[~_matched(spaces)[spaces.klass[labels]]]


def _matched(spaces: FeatureSpaces) -> Tensor:
    """For each class whether it lies in a space of several features."""
    several = torch.tensor([space.size > 1 for space in spaces.spaces] + [False], device="cpu")
    return several[spaces.space_of]


def unmatched_params(names: Collection[str], spaces: FeatureSpaces) -> set[str]:
    """Those of the parameters that no matched space is written along."""
    matched = _matched(spaces)
    result = set()
    for name in names:
        labels = spaces.labelling.params.get(name)
        runs = [] if labels is None else [
            run for place, run in enumerate(labels.fields) if (name, place) not in spaces.consumed
        ]  # fmt: skip
        if not any(bool(matched[spaces.klass[run[run > 0]]].any()) for run in runs):
            result.add(name)
    return result


def other_lengths(name: str, shapes: Sequence[torch.Size], spaces: FeatureSpaces) -> bool:
    """Whether the shapes of a parameter differ along an axis without features of a space: a vocabulary, a table of
    positions."""
    axes = {axis for shape in shapes[1:] for axis, n in enumerate(shape) if n != shapes[0][axis]}
    labels = spaces.labelling.params.get(name)
    for run in () if labels is None else labels.fields:
        if bool((spaces.space_of[spaces.klass[run[run > 0]]] >= 0).all()):
            axes -= varying(run)
    return bool(axes)


def read_along_features(name: str, spaces: FeatureSpaces) -> bool:
    """Whether a parameter from which a weight is computed is summed over along all its axes, matched features among
    them: the last layer of a network that gives weights for a given input."""
    runs = list(enumerate(spaces.labelling.params[name].fields)) if name in spaces.labelling.params else []
    if len(runs) < 2 or any((name, place) not in spaces.consumed for place, _ in runs):
        return False
    matched = _matched(spaces)
    return any(bool(matched[spaces.klass[run[run > 0]]].any()) for _, run in runs)


def pins_on(constraints: Constraints, spaces: FeatureSpaces, labels: Tensor) -> str:
    """The reason of the first pin of a node on one of these features; "" if there is none."""
    classes = spaces.klass[labels].unique()
    for pin in constraints.pins:
        if bool(torch.isin(spaces.klass[pin.labels], classes).any()):
            return pin.reason
    return ""


def names_of(labelling: Labelling, spaces: FeatureSpaces, labels: Tensor) -> list[str]:
    """The parameters that hold one of these features."""
    classes = np.unique(spaces.klass[labels].numpy())
    return [
        name
        for name, own in labelling.params.items()
        if any(np.isin(spaces.klass[run[run > 0]].numpy(), classes).any() for run in own.fields)
    ]


def carries_features(labelling: Labelling, spaces: FeatureSpaces, node: str) -> bool:
    """Whether a value has several features of a space, or several blocks of such, which can be given back to each
    model."""
    matched = _matched(spaces) | (spaces.tie_of >= 0)
    return any(bool(matched[spaces.klass[run[run > 0]]].any()) for run in labelling.fields.get(node, ()))


def fixed_places(labelling: Labelling, spaces: FeatureSpaces) -> dict[str, str]:
    """Where one model keeps features in an order of its own, so that those of two models cannot be matched: the node
    that says so, with the reason."""
    output = labelling.program.module.graph.output_node().name
    nodes = {name: constraints for name, constraints in labelling.constraints.items() if name != output}
    left = unmatched_labels(list(labelling.constraints.values()), spaces)
    found = {
        name: next(iter(constraints.refusals), "") or pins_on(constraints, spaces, left)
        for name, constraints in nodes.items()
    }
    return {name: reason for name, reason in found.items() if reason}

"""Where the trunk ends: the largest part of the common graph, from the inputs on, that may and shall be shared.

Three things end it: the programs part; the user says so (`until`); or sharing would not be sound. The latter is
decided by what the nodes of the trunk say of labels, and by nothing that the heads do: a cut before a call without a
rule makes the features in front of it free.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, fx

from .align import Alignment
from .analysis.graph import dependencies
from .analysis.labelling import Labelling
from .analysis.spaces import FeatureSpaces, solve
from .errors import AlignError, CutError
from .naming import cut_names, named
from .rules import varying


@dataclass(frozen=True, eq=False)
class Trunk:
    """The part that is computed once.

    Attributes:
        alignment: which nodes of the models are the same.
        labellings: labels of each model.
        nodes: names of the trunk's nodes in model 0, in order.
        spaces: feature spaces of each model's trunk; space s of model 0 is space `partners[k][s]` of model k.
        partners: per model, space numbers.
        ends: why the trunk goes no further: node name in model 0 -> reason.
    """

    alignment: Alignment
    labellings: tuple[Labelling, ...]
    nodes: tuple[str, ...]
    spaces: tuple[FeatureSpaces, ...]
    partners: tuple[tuple[int, ...], ...]
    ends: Mapping[str, str]

    def names(self, k: int) -> dict[str, str]:
        """Node name in model 0 -> node name in model k, over the trunk."""
        return {name: self.alignment.pairs[name][k] for name in self.nodes}

    def sizes(self, space: int) -> tuple[int, ...]:
        """How many features each model has in a space of model 0."""
        return tuple(own.spaces[self.partners[k][space]].size for k, own in enumerate(self.spaces))


def find_trunk(
    alignment: Alignment, labellings: Sequence[Labelling], *, until: str | float | None = None,
    flops: Mapping[str, int] | None = None, pinned: Sequence[dict[int, str]] | None = None, whole: bool = False,
) -> Trunk:  # fmt: skip
    """Choose the trunk. `until`: a node name, a module path, a fraction of `flops` (per node of model 0), or None.

    `whole`: the trunk goes on to the outputs, past calls without a rule too. That is the basis in which networks are
    relabelled and interpolated; for sharing it would not do.

    Raises:
        AlignError: nothing can be shared.
        CutError: `until` names nothing, or something that the models do not share.
    """
    graph, order = shareable(alignment)
    pinned = pinned or [{} for _ in labellings]
    ends = {} if whole else _unsound(alignment, labellings, pinned, until_given=isinstance(until, str))
    shared = {name for name in alignment.pairs if name not in ends}
    names = _closed(graph, order, shared)
    _check_entries(alignment, labellings)
    if isinstance(until, str):
        wanted = before(graph, _behind_the_start(alignment, order, until))
        missing = [node for node in order if node.name in wanted and node.name not in names]
        if missing:
            raise CutError(_beyond(until, missing[0], alignment, ends, names))
        names = wanted
    elif until is not None:
        names = _fraction(graph, order, names, float(until), flops or {})
    names = _unpacked(graph, order, names, shared)
    dynamic = [n for n in order if n.name in names and n.op != "placeholder" and n.name in labellings[0].dynamic]
    if not any(labellings[0].touches[n.name] for n in dynamic):
        raise AlignError(_nothing(alignment, order, ends, names))
    spaces = tuple(
        solve(label, {alignment.pairs[name][k] for name in names} | (_output(label) if whole else set()),
              pinned=pinned[k], entering=alignment.entering(k))
        for k, label in enumerate(labellings)
    )  # fmt: skip
    nodes = tuple(n.name for n in order if n.name in names)
    return Trunk(alignment, tuple(labellings), nodes, spaces, _partners(alignment, spaces), ends)


def _output(label: Labelling) -> set[str]:
    """The node that returns: it pins what the model returns."""
    return {label.program.module.graph.output_node().name}


def shareable(alignment: Alignment) -> tuple[nx.DiGraph, list[fx.Node]]:
    """What model 0 computes behind its stem: the graph of dependencies, and the nodes in order."""
    program = alignment.programs[0]
    graph = dependencies(program)
    stem = alignment.stem(0)
    graph.remove_nodes_from(stem)
    return graph, [node for node in program.module.graph.nodes if node.op != "output" and node.name not in stem]


def _behind_the_start(alignment: Alignment, order: Sequence[fx.Node], until: str) -> list[fx.Node]:
    """The nodes that `until` names, none of which may lie in the stem."""
    stem = alignment.stem(0)
    nodes = named([n for n in alignment.programs[0].module.graph.nodes if n.op != "output"], until)
    found = [node for node in nodes if node.name not in stem]
    if not found:
        raise CutError(
            f"`until` must lie behind `start`; {until!r} lies in front of it. The first names behind it are "
            f"{', '.join(repr(name) for name in cut_names(order)[:3])}."
        )
    return found


def _unsound(
    alignment: Alignment, labellings: Sequence[Labelling], pinned: Sequence[dict[int, str]], *, until_given: bool
) -> dict[str, str]:
    """Nodes of model 0 that cannot be shared, whatever the user wants, with the reasons."""
    ends: dict[str, str] = {}
    whole = [solve(label, pinned=pins) for label, pins in zip(labellings, pinned, strict=True)]
    barriers = [{barrier.node: barrier.reason for barrier in reversed(label.barriers)} for label in labellings]
    for name, twins in alignment.pairs.items():
        reason = _different_shapes(labellings, twins)
        for k, twin in enumerate(twins):
            shapes = {label.program.shapes.get(own) for label, own in zip(labellings, twins, strict=True)}
            free = until_given and len(shapes) == 1
            output = "" if free else _writes_output(labellings[k], whole[k], twin)
            reason = reason or barriers[k].get(twin, "") or output
        if reason:
            ends[name] = reason
    return ends


def _check_entries(alignment: Alignment, labellings: Sequence[Labelling]) -> None:
    """What enters the trunk from the stems must look alike, but for the number of features."""
    for twins in alignment.entries:
        reason = _different_shapes(labellings, twins)
        if reason:
            raise CutError(
                f"Values that are merged at `start` must look alike in all models, but for their features; of "
                f"`{twins[0]}` {reason}. Choose another place, or another size of the sample input."
            )


def _different_shapes(labellings: Sequence[Labelling], twins: tuple[str, ...]) -> str:
    """Widths may differ along labelled axes of inner features; nothing else may."""
    shapes = [label.program.shapes.get(twin) for label, twin in zip(labellings, twins, strict=True)]
    for k, shape in enumerate(shapes[1:], 1):
        if shape is None or shapes[0] is None or shape == shapes[0]:
            continue
        fields = labellings[k].fields.get(twins[k], ())
        free = {axis for labels in fields for axis in varying(labels)}
        static = twins[k] not in labellings[k].dynamic
        if len(shape) != len(shapes[0]) or any(
            a != b and axis not in free and not static for axis, (a, b) in enumerate(zip(shapes[0], shape, strict=True))
        ):
            return f"its shapes differ: {tuple(shapes[0])} and {tuple(shape)}"
    return ""


def _writes_output(label: Labelling, spaces: FeatureSpaces, node: str) -> str:
    """Whether a node's parameters write features that the model returns: that is where heads begin."""
    for param in label.touches[node]:
        for place, labels in enumerate(label.params[param].fields):
            if (param, place) not in spaces.consumed:
                pin = spaces.pin_of(labels)
                if pin is not None and pin[1] == "output":
                    return "it writes features that the model returns"
    return ""


def _closed(graph: nx.DiGraph, order: Sequence[fx.Node], allowed: Collection[str]) -> set[str]:
    """The allowed nodes of which all that must come before is in the result too."""
    result: set[str] = set()
    for node in order:
        if node.name in allowed and result.issuperset(graph.predecessors(node.name)):
            result.add(node.name)
    return result


def before(graph: nx.DiGraph, targets: Sequence[fx.Node]) -> set[str]:
    """Names of the targets, of all they are computed from, and of the inputs."""
    inputs = {name for name, node in graph.nodes(data="node") if node.op == "placeholder"}
    return inputs.union({node.name for node in targets}, *(nx.ancestors(graph, node.name) for node in targets))


def _unpacked(graph: nx.DiGraph, order: Sequence[fx.Node], names: set[str], shared: Collection[str]) -> set[str]:
    """Items that are taken out of a tuple belong to the node that returns the tuple."""
    items = {n.name for n in order if n.op == "call_function" and n.target is operator.getitem and n.name in shared}
    return _closed(graph, order, names | {name for name in items if names.issuperset(graph.predecessors(name))})


def _fraction(
    graph: nx.DiGraph, order: Sequence[fx.Node], names: set[str], share: float, flops: Mapping[str, int]
) -> set[str]:
    """The sharable nodes in order, up to the first whose FLOPs would make it more than a share of all FLOPs."""
    if not 0 < share <= 1:
        raise CutError(f"`until` as a fraction of the FLOPs must lie in (0, 1]; found {share}.")
    budget = share * sum(flops.values())
    kept: set[str] = set()
    for node in order:
        cost = flops.get(node.name, 0) if node.name in names else 0
        if cost > budget:
            break
        budget -= cost
        kept.add(node.name)
    return _closed(graph, order, kept & names)


def _beyond(until: str, node: fx.Node, alignment: Alignment, ends: Mapping[str, str], names: set[str]) -> str:
    parting = next((text for text in alignment.parting if text), "")
    reason = ends.get(node.name) or (
        f"the models part: the first {parting}" if parting else "what it needs is not shared"
    )
    last = [name for name in cut_names(list(node.graph.nodes)) if name in names]
    hint = f" The trunk can reach up to {last[-1]!r}." if last else ""
    needs = f"{until!r} needs node `{node.name}`, which is not shared"
    return f"`until` must lie in what the models share; {needs}: {reason}.{hint}"


def _nothing(alignment: Alignment, order: Sequence[fx.Node], ends: Mapping[str, str], names: set[str]) -> str:
    first = next((n for n in order if n.name not in names), None)
    parting = next((text for text in alignment.parting if text), "")
    if first is not None and first.name in ends:
        why = f"node `{first.name}` ends the trunk: {ends[first.name]}"
    elif parting:
        why = f"they part at the first node: the first {parting}"
    else:
        why = "no node with parameters lies before the cut"
    place = "`start`" if alignment.stems else "the input"
    return f"`compile_zip` needs models that agree from {place} on; {why}."


def _partners(alignment: Alignment, spaces: Sequence[FeatureSpaces]) -> tuple[tuple[int, ...], ...]:
    """Pair the spaces of all models by the parameters on which they occur."""
    signatures = [
        _signatures(own, {twins[k]: name for name, twins in alignment.params.items()}, alignment.entering(k))
        for k, own in enumerate(spaces)
    ]
    result = []
    for k, own in enumerate(signatures):
        places = {signature: number for number, signature in enumerate(own)}
        if set(places) != set(signatures[0]) or len(places) != len(own):
            raise AlignError(
                f"Models that are zipped must have the same feature spaces in the trunk; model 0 has "
                f"{len(signatures[0])}, model {k} has {len(own)}. Choose an earlier cut with `until`."
            )
        result.append(tuple(places[signature] for signature in signatures[0]))
    return tuple(result)


def _signatures(spaces: FeatureSpaces, names: Mapping[str, str], entering: Mapping[str, int]) -> list[tuple]:
    """Per space: on which parameters, in which field, how often each feature occurs, and in how many blocks.

    Values that enter from the stem (`entering`: their nodes and numbers) count as parameters.
    """
    found: list[dict[tuple[str, int], int]] = [{} for _ in spaces.spaces]

    def count(labels: Tensor, name: str, place: int) -> None:
        layout = spaces.layout(labels)
        for number in torch.unique(layout.space[layout.space >= 0]).tolist():
            here = layout.space == number
            found[number][name, place] = int(layout.occurrence[here].max()) + 1

    for param, twin in names.items():
        if param not in spaces.labelling.params:
            continue
        for place, labels in enumerate(spaces.labelling.params[param].fields):
            count(labels, twin, place)
    for node, entry in entering.items():
        for labels in spaces.labelling.fields.get(node, ()):
            count(labels, f"entry {entry}", min(varying(labels)))
    return [
        (
            space.legality,
            None if space.blocks is None else len(space.blocks),
            tuple(sorted(places.items())),
            _nth(spaces, number),
        )
        for number, (space, places) in enumerate(zip(spaces.spaces, found, strict=True))
    ]


def _nth(spaces: FeatureSpaces, number: int) -> int:
    """Spaces on the same parameters (parts of one axis) are told apart by their order."""
    return sum(1 for other in spaces.spaces[:number] if other.name == spaces.spaces[number].name)

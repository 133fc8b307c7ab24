"""`start`: what each model computes on its own before the trunk begins.

The nodes that `start` names, and all that depends on them, may be shared; what else depends on the input is the model's
stem. Values of the stem that are read behind the start are its entries: there the features of all models are merged,
x* = Σ_k M_k x_k. The stems may have nothing in common but the number of entries and what they look like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from ..analysis.labelling import Labelling
from ..errors import CutError
from .dependencies import dependencies
from .node_names import named


@dataclass(frozen=True)
class Stem:
    """The part of one program in front of the start.

    Attributes:
        nodes: names of its nodes, inputs included.
        entries: those that are read behind the start, in the order in which they are read first.
        reads: nodes behind the start that do not depend on the input, and that the stem reads too: tied weights.
    """

    nodes: frozenset[str]
    entries: tuple[str, ...]
    reads: frozenset[str] = frozenset()


def find_stems(labellings: Sequence[Labelling], start: str | Sequence[str]) -> tuple[Stem, ...]:
    """The stem of each model. `start`: a module path or node name of all models, or one for each.

    Raises:
        CutError: a model has no such node, a stem is empty, the numbers of entries differ, or an entry is no tensor.
    """
    given = [start] if isinstance(start, str) else start
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) and name for name in given):
        raise CutError(f"`start` must be a name, or a list with one for each model; found {start!r:.80}.")
    names = [start] * len(labellings) if isinstance(start, str) else list(start)
    if len(names) != len(labellings):
        raise CutError(
            f"`start` must be one name, or one for each of the {len(labellings)} models; found {len(names)} names."
        )
    stems = tuple(_stem(label, name, k) for k, (label, name) in enumerate(zip(labellings, names, strict=True)))
    counts = [len(stem.entries) for stem in stems]
    if len(set(counts)) > 1:
        raise CutError(
            f"As many values must enter the trunk at `start` in each model; found {counts}. Choose a place that one "
            "tensor alone crosses, such as the end of a stage."
        )
    return stems


def _stem(label: Labelling, start: str, k: int) -> Stem:
    order = [node for node in label.program.module.graph.nodes if node.op != "output"]
    first = {node.name for node in named(order, start, what="start", of="the first model" if not k else f"model {k}")}
    graph = dependencies(label.program)
    shared = first.union(*(nx.descendants(graph, name) for name in first))
    fixed = {node.name for node in order} - shared - label.dynamic
    waiting = sorted(shared)
    while waiting:  # weights and sizes that only the shared part needs
        sources = {name for name in graph.predecessors(waiting.pop()) if name in fixed}
        fixed -= sources
        shared |= sources
        waiting += sorted(sources)
    entries: dict[str, None] = {}
    for node in order:
        if node.name in shared:
            entries |= {s.name: None for s in node.all_input_nodes if s.name not in shared}
    outside = frozenset(node.name for node in order if node.name not in shared)
    for name in entries:
        if name not in label.program.shapes:
            raise CutError(
                f"`start` must lie where tensors are handed on; {start!r} reads node `{name}` of model {k}, which is "
                "none. Start behind it, where its parts are used."
            )
    if not any(label.touches[name] for name in outside):
        raise CutError(
            f"`start` must leave each model layers of its own in front; in front of {start!r} model {k} has none with "
            "parameters. Start behind its first layer, or leave `start` out to share from the input on."
        )
    waiting, reads = sorted(outside), set[str]()
    while waiting:
        sources = {name for name in graph.predecessors(waiting.pop()) if name in shared} - reads
        reads |= sources
        waiting += sorted(sources)
    return Stem(outside, tuple(entries), frozenset(reads))

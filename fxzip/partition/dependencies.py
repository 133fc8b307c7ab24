"""Graphs that answer questions about a program.

`dependencies` is the program itself: which node needs which. `relations` is the graph over feature spaces, parameters
and nodes: who writes, reads and carries the features of a space, and which spaces move blockwise together.
"""

from __future__ import annotations

import networkx as nx
from torch import Tensor

from ..analysis.spaces import FeatureSpaces
from ..tracing import Program


def dependencies(program: Program) -> nx.DiGraph:
    """Node names, with an edge from each node to those that must come after it.

    That is who uses its value, and around a call that writes in place: who saw the memory before, through whatever
    view of it, and who sees it after. So a set of nodes that is closed under `nx.ancestors` computes what it computes
    in the whole program.

    >>> import torch
    >>> from torch import nn
    >>> from fxzip.tracing import trace
    >>> graph = dependencies(trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.ones(2, 2)))
    >>> sorted(nx.ancestors(graph, "_1"))
    ['_0', 'input_1']
    """
    graph = nx.DiGraph()
    order = list(program.module.graph.nodes)
    for node in order:
        graph.add_node(node.name, node=node)
        for source in node.all_input_nodes:
            graph.add_edge(source.name, node.name)
    place = {node.name: number for number, node in enumerate(order)}
    for writer, written in program.memory.writes.items():
        for name, seen in program.memory.sees.items():
            if name != writer and seen & written:
                graph.add_edge(*((name, writer) if place[name] < place[writer] else (writer, name)))
    return graph


def versions(program: Program) -> dict[str, dict[str, tuple[str, ...]]]:
    """For every node, by the name of an input that was written into before: the calls that wrote there, in order."""
    memory = program.memory
    writers: dict[int, list[str]] = {}
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for node in program.module.graph.nodes if memory.writes else ():
        own = {}
        for source in node.all_input_nodes:
            before = {name: None for m in sorted(memory.values.get(source.name, ())) for name in writers.get(m, ())}
            if before:
                own[source.name] = tuple(before)
        found[node.name] = own
        for m in memory.writes.get(node.name, ()):
            writers.setdefault(m, []).append(node.name)
    return found


def _spaces(found: FeatureSpaces, labels: Tensor) -> list[int]:
    space = found.layout(labels).space
    return [int(number) for number in space[space >= 0].unique()]


def relations(found: FeatureSpaces) -> nx.MultiDiGraph:
    """Feature spaces, parameters and nodes of one model, and what they have to do with one another.

    Vertices are ("space", number), ("parameter", name) and ("node", name). Edges have a `kind`: a parameter "writes" a
    space, a space is "read" by a parameter that sums over it, and "carried" by the nodes whose value holds it; a node
    "uses" a parameter; spaces of one tie group are "tied", both ways.
    """
    graph = nx.MultiDiGraph()
    labelling = found.labelling
    for number, space in enumerate(found.spaces):
        graph.add_node(("space", number), name=space.name, size=space.size, legality=space.legality)
        for other in range(number):
            if space.tie is not None and found.spaces[other].tie == space.tie:
                graph.add_edge(("space", number), ("space", other), kind="tied")
                graph.add_edge(("space", other), ("space", number), kind="tied")
    for name, labels in labelling.params.items():
        for place, run in enumerate(labels.fields):
            for number in _spaces(found, run):
                if (name, place) in found.consumed:
                    graph.add_edge(("space", number), ("parameter", name), kind="read")
                else:
                    graph.add_edge(("parameter", name), ("space", number), kind="writes")
    for node, fields in labelling.fields.items():
        for number in sorted({number for run in fields for number in _spaces(found, run)}):
            graph.add_edge(("space", number), ("node", node), kind="carried")
    for node, params in labelling.touches.items():
        graph.add_edges_from([(("node", node), ("parameter", name), {"kind": "uses"}) for name in sorted(params)])
    return graph

"""The order of calls where some are one."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from torch import fx

from .twins import Twins


def in_order(graph: fx.Graph, groups: Sequence[Twins]) -> list[fx.Node]:
    """The nodes of a graph, of each group the first only; each behind all that it, or another of its group, reads.

    As near to the order of the graph as may be.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    first = {node: group[0] for group in groups for node in group}
    needs = {node: set[fx.Node]() for node in graph.nodes if first.get(node, node) is node}
    for node in graph.nodes:
        own = first.get(node, node)
        needs[own] |= {first.get(source, source) for source in node.all_input_nodes}
    users: dict[fx.Node, list[fx.Node]] = {node: [] for node in needs}
    for node, sources in needs.items():
        for source in sources:
            users[source].append(node)
    left = {node: len(sources) for node, sources in needs.items()}
    ready = [order[node] for node, count in left.items() if not count]
    heapq.heapify(ready)
    nodes, found = list(graph.nodes), []
    while ready:
        found.append(nodes[heapq.heappop(ready)])
        for user in users[found[-1]]:
            left[user] -= 1
            if not left[user]:
                heapq.heappush(ready, order[user])
    return found

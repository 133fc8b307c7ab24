"""Where a trunk may end: cuts in a row, each sharing what the one before shares and more.

The trunk of a cut is a node with all it is computed from. Of all chains of trunks, each inside the next and of more
FLOPs, the one with the most cuts is taken; a cut that one tensor alone crosses counts ten times one that several cross,
as in the middle of a residual block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx

from ..analysis.labelling import Labelling
from .alignment import Alignment
from .node_names import module_path, named
from .own import agreeing, differing
from .region import Trunk
from .trunk_search import before, shareable

_CROSSED = 0.1  # weight of a cut that several tensors cross
_Entry = tuple[int, float, int, fx.Node]  # FLOPs of the trunk, weight, its nodes as bits, where it ends


@dataclass(frozen=True)
class Cut:
    """A place where the trunk may end.

    Attributes:
        until: what `compile_zip` takes as `until`; None: at the heads; 0: at the inputs.
        cost: what the zip costs relative to the first model alone, without unmerging.
        crossing: how many tensors the trunk hands over.
    """

    until: str | float | None
    cost: float
    crossing: int

    @classmethod
    def of(cls, until: str | float | None) -> Cut:
        """A cut that the user names; nothing is known of what it costs."""
        return cls(until, float("nan"), 0)

    def __str__(self) -> str:
        if self.until is None:
            return "the full trunk"
        return repr(self.until) if self.until else "no trunk"


def nothing_shared(flops: Sequence[Mapping[str, int]]) -> Cut:
    """The cut at the inputs: each model computes everything on its own. In: FLOPs of every node of every model."""
    each = [sum(own.values()) for own in flops]
    return Cut(0.0, sum(each) / (each[0] or 1), 0)


def find_cuts(
    full: Trunk, flops: Sequence[Mapping[str, int]], *, limit: int = 32,
    spent: Sequence[Mapping[str, float]] | None = None,
) -> list[Cut]:  # fmt: skip
    """Cuts from the cheapest to the dearest trunk; the last is the full trunk.

    Args:
        full: the trunk that goes as far as sharing can.
        flops: of each node of each model; cuts lie evenly over them.
        limit: cuts at most.
        spent: what each node of each model costs, in any currency; None: the FLOPs.
    """
    costs = flops if spent is None else spent
    graph, order = shareable(full.alignment)
    bits = {node.name: 1 << place for place, node in enumerate(order)}
    sets: dict[str, int] = {}
    found: list[_Entry] = []
    inside = set(full.nodes)
    for node in order:
        sets[node.name] = bits[node.name]
        for source in graph.predecessors(node.name):
            sets[node.name] |= sets.get(source, 0)
        if _possible(full, node, inside):
            members = [other for other in order if bits[other.name] & sets[node.name]]
            total = sum(flops[0].get(other.name, 0) for other in members)
            weight = 1.0 if _crossing(full, members) == 1 else _CROSSED
            found.append((total, weight, sets[node.name], node))
    total = sum(flops[0].get(name, 0) for name in full.nodes)
    chain = _thinned([entry for entry in _chain(found) if entry[0] < total], limit - 1)
    cuts = [cut for entry in chain if (cut := _cut(full, graph, order, entry[3], costs)) is not None]
    members = [node for node in order if node.name in inside]
    return [*cuts, Cut(None, _cost(full, inside, costs), _crossing(full, members))]


@dataclass(frozen=True)
class SharedLayers:
    """What the models have in common to the bit.

    Attributes:
        until: where it ends, as `compile_zip` takes it.
        nodes: of model 0.
    """

    until: str
    nodes: frozenset[str]


def shared_layers(alignment: Alignment, labelling: Labelling) -> SharedLayers | None:
    """The last place up to which the models agree in all parameters.

    None where they differ in the first layer already, or nowhere. In: the alignment, and labels of model 0.
    """
    differ = differing(alignment)
    if not differ or alignment.stems:
        return None

    same = agreeing(alignment, labelling, differ)
    graph, order = shareable(alignment)
    weighted = {name for name in same if labelling.touches[name]}
    best: tuple[int, fx.Node] | None = None
    for node in order:
        if node.name not in same or node.name not in labelling.dynamic or node.name not in labelling.program.shapes:
            continue
        number = len(before(graph, [node]) & weighted)
        if number and (best is None or number >= best[0]):
            best = number, node
    name = None if best is None else _name(graph, order, best[1])
    return None if best is None or name is None else SharedLayers(name, frozenset(before(graph, [best[1]])))


def _possible(full: Trunk, node: fx.Node, inside: set[str]) -> bool:
    """Whether a trunk can end at this node: it is a tensor in the full trunk that depends on the input."""
    label = full.labellings[0]
    return (
        node.name in inside
        and node.op != "placeholder"
        and node.name in label.dynamic
        and node.name in label.program.shapes
    )


def _crossing(full: Trunk, members: Sequence[fx.Node]) -> int:
    """How many values of the trunk others read, inputs aside."""
    names = {node.name for node in members}
    dynamic = full.labellings[0].dynamic
    return sum(
        node.op != "placeholder" and node.name in dynamic and any(user.name not in names for user in node.users)
        for node in members
    )


def _chain(found: list[_Entry]) -> list[_Entry]:
    """The heaviest chain of nested sets of strictly increasing FLOPs. O(n²) in the number of different FLOPs."""
    best: dict[int, _Entry] = {}
    for entry in found:  # of cuts at the same price the cleanest, and then the last
        if entry[0] > 0 and (entry[0] not in best or entry[1] >= best[entry[0]][1]):
            best[entry[0]] = entry
    entries = [best[spent] for spent in sorted(best)]
    weights: list[float] = []
    links: list[int] = []
    for i, (_, weight, members, _) in enumerate(entries):
        earlier = [j for j in range(i) if entries[j][2] & ~members == 0]
        link = max(earlier, key=lambda j: weights[j], default=-1)
        weights.append(weight + (weights[link] if link >= 0 else 0.0))
        links.append(link)
    place = max(range(len(entries)), key=lambda i: weights[i], default=-1)
    result = []
    while place >= 0:
        result.append(entries[place])
        place = links[place]
    return result[::-1]


def _cut(
    full: Trunk, graph: nx.DiGraph, order: Sequence[fx.Node], node: fx.Node, costs: Sequence[Mapping[str, float]]
) -> Cut | None:
    """The cut behind a node; None if it has no name."""
    name = _name(graph, order, node)
    if name is None:
        return None
    wanted = before(graph, [node])
    members = [other for other in order if other.name in wanted]
    return Cut(name, _cost(full, wanted, costs), _crossing(full, members))


def _name(graph: nx.DiGraph, order: Sequence[fx.Node], node: fx.Node) -> str | None:
    """The shortest name that `until` takes for the place behind a node; None if there is none."""
    wanted = before(graph, [node])
    parts = module_path(node).split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    for name in [*(n for n in names if n), node.name]:
        known = name == node.name or any(module_path(n) == name or module_path(n).startswith(name + ".") for n in order)
        if known and before(graph, named(order, name)) == wanted:
            return name
    return None


def _cost(full: Trunk, names: set[str], costs: Sequence[Mapping[str, float]]) -> float:
    """What trunk and heads cost relative to model 0."""
    spent = sum(costs[0].get(name, 0) for name in names)
    for k, own in enumerate(costs):
        twins = full.names(k)
        spent += sum(own.values()) - sum(own.get(twins[name], 0) for name in names if name in twins)
    return spent / (sum(costs[0].values()) or 1)


def _thinned(chain: list[_Entry], limit: int) -> list[_Entry]:
    """At most `limit` of them, evenly over the FLOPs; those that one tensor crosses first."""
    if len(chain) > limit:
        clean = [entry for entry in chain if entry[1] == 1.0]
        chain = clean if len(clean) >= limit else chain
    if len(chain) <= limit:
        return chain
    first, last = chain[0][0], chain[-1][0]
    targets = [first + (last - first) * i / max(limit - 1, 1) for i in range(limit)]
    near = {min(range(len(chain)), key=lambda j: abs(chain[j][0] - target)) for target in targets}
    return [chain[place] for place in sorted(near)]

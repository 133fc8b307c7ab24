"""The search for the nodes of a trunk: closed under what they are computed from, matched, and given back at the end."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
from torch import fx

from ..analysis.labelling import Labelling
from ..analysis.rules import varying
from ..analysis.spaces import FeatureSpaces, solve
from ..errors import AlignError, CutError
from .alignment import Alignment
from .dependencies import dependencies
from .node_names import cut_names, named
from .own import heads_begin, weights_behind
from .pairing import pair_spaces
from .refusals import beyond, nothing_shared, too_early
from .region import Trunk
from .stems import find_stems
from .unmatched import Common

_LAST_SUM = "what it computes from features by its weights goes into what the model returns"
_WRITES_OUTPUT = "it writes features that the model returns"
_ALIKE = "it carries no features that could be given back to each model"
RETURNED = frozenset([_LAST_SUM, _WRITES_OUTPUT])
"""Of the reasons why a trunk ends those that say where heads begin."""
_PACKED = "it gives several values in one, of which heads cannot be given their own"
_DISCRETE = "it gives booleans or integers that go by features, of which heads cannot be given their own"
_STORES = "it writes into a parameter or buffer, of which each model has its own"


@dataclass(frozen=True, eq=False)
class TrunkSearch:
    """Finds the nodes of a trunk; `graph` and `order` are those of model 0 behind its stem."""

    alignment: Alignment
    labellings: tuple[Labelling, ...]
    graph: nx.DiGraph
    order: Sequence[fx.Node]
    common: Common

    @cached_property
    def returned(self) -> set[str]:
        """Nodes of model 0 that belong to the head of some model."""
        result: set[str] = set()
        for k, label in enumerate(self.labellings):
            agree = {twins[k] for name, twins in self.alignment.params.items() if name not in self.common.differ}
            begin = heads_begin(label, set(label.params) - agree)
            result |= {name for name, twins in self.alignment.pairs.items() if twins[k] in begin}
        return result

    def whole(self) -> Trunk:
        """The models up to what they return, whatever lies between."""
        names = self._unpacked(self.closed(self.alignment.pairs.keys()))
        self._not_empty(names, {})
        return self._trunk(names, self.common.solved(names, outputs=True), {})

    def apart(self) -> Trunk:
        """Nothing but the inputs: each model computes everything on its own.

        Raises:
            CutError: the models begin with stems; what leaves these is shared.
        """
        if self.alignment.stems:
            raise CutError(
                "`until=0` shares nothing, but features behind `start` are merged. Leave `start` out, or share more."
            )
        names = self.closed(before(self.graph, []) & self.alignment.pairs.keys())
        return self._trunk(names, self.common.solved(names), {})

    def deepest(self, names: set[str], ends: dict[str, str]) -> Trunk:
        """The largest trunk within `names` in which all is matched, and whose values can be given back."""
        unmatched: dict[str, str] = {}
        names = self._unpacked(names)
        while True:
            self._not_empty(names, ends | unmatched)
            spaces = self.common.solved(names)
            found = self.common.unmatched(names, spaces)
            unmatched |= found
            kept: dict[str, str] = {}  # values that no model could be given back
            if not found:
                kept = dict.fromkeys(self.common.in_order(self.common.alike(names, spaces)), _ALIKE)
                kept |= dict.fromkeys(self.common.in_order(self.common.discrete(names, spaces)), _DISCRETE)
                kept |= dict.fromkeys(self.common.in_order(self.common.packed(names)), _PACKED)
            if not found and not kept:
                needed = self._needed(names)
                spaces = spaces if needed == names else self.common.solved(needed)
                return self._trunk(needed, spaces, ends, unmatched=unmatched)
            ends = {**ends, **kept}
            names = self.closed(names - found.keys() - kept.keys())

    def up_to(self, until: str) -> Trunk:
        """The trunk that the user asks for.

        Raises:
            CutError: something in it cannot be shared.
        """
        ends = self.unsound(until_given=True)
        names = self.closed(self.alignment.pairs.keys() - ends.keys())
        wanted = before(self.graph, _behind_the_start(self.alignment, self.order, until))
        missing = [node for node in self.order if node.name in wanted and node.name not in names]
        if missing:
            raise CutError(beyond(until, missing[0], self.alignment, ends, names))
        wanted = self._unpacked(wanted, names)
        self._not_empty(wanted, ends, until=until)
        spaces = self.common.solved(wanted)
        found = self.common.unmatched(wanted, spaces)
        found = {name: reason for name, reason in found.items() if name not in self.returned}  # that was asked for
        if found:
            first = next(node for node in self.order if node.name in found)
            raise CutError(beyond(until, first, self.alignment, found, self.closed(wanted - found.keys())))
        packed = self.common.in_order(self.common.packed(wanted))
        if packed:
            raise CutError(
                f"`until` must end at values that each model can be given back; at {until!r} node `{packed[0]}` hands "
                "over several values in one. Choose the node in front of it, or one behind what reads it."
            )
        discrete = self.common.in_order(self.common.discrete(wanted, spaces))
        if discrete:
            raise CutError(
                f"`until` must end at values that each model can be given back; at {until!r} node `{discrete[0]}` "
                "hands over booleans or integers that go by features. Choose the node in front of it, or one behind "
                "what reads it."
            )
        alike = self.common.in_order(self.common.alike(wanted, spaces))
        returned = self.common.in_order(self.returned & wanted)
        needed = self._needed(wanted)
        if needed != wanted:
            wanted, spaces = needed, self.common.solved(needed)
        return self._trunk(wanted, spaces, ends, alike=alike, returned=returned)

    def unsound(self, *, until_given: bool = False) -> dict[str, str]:
        """Nodes of model 0 that cannot be shared, or with no cut asked for should not be, with the reasons."""
        ends: dict[str, str] = {}
        whole = [solve(label, pinned=pins) for label, pins in zip(self.labellings, self.common.pinned, strict=True)]
        barriers = [{b.node: b.reason for b in reversed(label.barriers)} for label in self.labellings]
        for name, twins in self.alignment.pairs.items():
            reason = different_shapes(self.labellings, twins)
            shapes = {label.program.shapes.get(own) for label, own in zip(self.labellings, twins, strict=True)}
            free = name in self.common.same or (until_given and len(shapes) == 1)
            for k, twin in enumerate(twins):
                output = "" if free else _writes_output(self.labellings[k], whole[k], twin)
                stored = _STORES if self.labellings[k].program.memory.writes_state(twin) else ""
                reason = reason or barriers[k].get(twin, "") or output or stored
            if not reason and not until_given and name in self.returned:
                reason = _LAST_SUM
            if reason:
                ends[name] = reason
        return ends

    def closed(self, allowed: Collection[str]) -> set[str]:
        """The allowed nodes of which all that must come before is in the result too."""
        result: set[str] = set()
        for node in self.order:
            if node.name in allowed and result.issuperset(self.graph.predecessors(node.name)):
                result.add(node.name)
        return result

    def _unpacked(self, names: set[str], shared: Collection[str] | None = None) -> set[str]:
        """Items that are taken out of a tuple, and out of tuples in it, belong to the node that returns the tuple."""
        shared = self.alignment.pairs if shared is None else shared
        tensors = self.labellings[0].program.shapes
        items = {
            n.name
            for n in self.order
            if n.target is operator.getitem and n.name in shared and tensors.keys().isdisjoint({str(n.args[0])})
        }
        return self.closed(names | items)

    def _needed(self, names: set[str]) -> set[str]:
        """Without nodes that depend on no input and that only heads need: a table of classes, the norm of a weight.
        Heads compute that themselves, of their own parameters, and it says nothing of the features of the trunk."""
        dynamic = self.labellings[0].dynamic
        needed = before(self.graph, [node for node in self.order if node.name in names & dynamic])
        odd = names - needed - self.common.same
        packed = self.common.packed(names - odd)  # heads would read these only to ask how many items there are
        odd = odd.difference(*(nx.descendants(self.graph.subgraph(odd | packed), name) for name in packed))
        return self.closed(names - odd) if odd else names

    def _not_empty(self, names: set[str], ends: Mapping[str, str], *, until: str | None = None) -> None:
        """Raise unless something with weights is shared; with what to do instead, which is looked for."""
        label = self.labellings[0]
        dynamic = [n for n in self.order if n.name in names and n.op != "placeholder" and n.name in label.dynamic]
        behind = weights_behind(label)
        if not any(behind[n.name] for n in dynamic):
            if until is None:
                way_out = self._way_out(ends)
            else:
                free = self.closed(self.alignment.pairs.keys() - self.unsound(until_given=True).keys()) & label.dynamic
                way_out = too_early(until, self.order, names, {name for name in free if behind[name]})
            raise AlignError(nothing_shared(self.alignment, self.order, ends, names) + way_out)

    def _way_out(self, ends: Mapping[str, str]) -> str:
        """What to do where by default nothing can be shared."""
        label = self.labellings[0]
        found: list[tuple[int, str]] = []
        for name in reversed([name for name in cut_names(self.order) if "." not in name]) if ends else ():
            with suppress(AlignError, CutError):
                trunk = self.up_to(name)
                if not trunk.alike:
                    found.append((len(trunk.returned), name))
                    if not trunk.returned:
                        break
        if found:
            name = min(found, key=lambda pair: pair[0])[1]
            return (
                f" Say where the trunk ends: `until={name!r}` shares up to there, and gives each head its own "
                "features back."
            )
        sums = [node for node in self.order if label.constraints[node.name].sums]
        readers = [user.name for node in sums[:1] for user in node.users]
        parts = bool(ends) or any(self.alignment.parting)
        own = self.returned.union(*(nx.descendants(self.graph, name) for name in self.returned))
        weights = readers and any(label.touches[name] for name in nx.descendants(self.graph, readers[0]) - own)
        if parts and weights and not self.alignment.stems and self._may_start(readers[0]):
            return f" Let each model compute on its own what is in front: `start={readers[0]!r}` begins to share there."
        return " Run them side by side, with nothing shared: `until=0`." if not self.alignment.stems else ""

    def _may_start(self, name: str) -> bool:
        """Whether all models have a place of this name where values that look alike enter a trunk."""
        with suppress(CutError):
            entries = [stem.entries for stem in find_stems(self.labellings, name)]
            return not any(different_shapes(self.labellings, twins) for twins in zip(*entries, strict=True))
        return False

    def _trunk(
        self, names: set[str], spaces: tuple[FeatureSpaces, ...], ends: Mapping[str, str], *,
        unmatched: Mapping[str, str] | None = None, alike: tuple[str, ...] = (), returned: tuple[str, ...] = (),
    ) -> Trunk:  # fmt: skip
        unmatched = unmatched or {}
        return Trunk(
            self.alignment, self.labellings, self.common.in_order(names), pair_spaces(self.alignment, spaces),
            {**ends, **unmatched}, unmatched, alike, returned,
        )  # fmt: skip


def shareable(alignment: Alignment) -> tuple[nx.DiGraph, list[fx.Node]]:
    """What model 0 computes behind its stem: the graph of dependencies, and the nodes in order.

    Where models write in place, what one of them has to compute first the trunk has to compute first.
    """
    program = alignment.programs[0]
    graph = dependencies(program)
    for k, other in enumerate(alignment.programs[1:], 1):
        back = {twins[k]: name for name, twins in alignment.pairs.items()}
        edges = dependencies(other).edges if other.memory.writes else ()
        graph.add_edges_from((back[a], back[b]) for a, b in edges if a in back and b in back)
    stem = alignment.stem(0)
    graph.remove_nodes_from(stem)
    return graph, [node for node in program.module.graph.nodes if node.op != "output" and node.name not in stem]


def before(graph: nx.DiGraph, targets: Sequence[fx.Node]) -> set[str]:
    """Names of the targets, of all they are computed from, and of the inputs."""
    inputs = {name for name, node in graph.nodes(data="node") if node.op == "placeholder"}
    return inputs.union({node.name for node in targets}, *(nx.ancestors(graph, node.name) for node in targets))


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


def different_shapes(labellings: Sequence[Labelling], twins: tuple[str, ...]) -> str:
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
                    return _WRITES_OUTPUT
    return ""

"""What in the common graph could be shared only by averaging unmatched features, or by giving all heads one value."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from ..analysis.labelling import Labelling
from ..analysis.spaces import FeatureSpaces, solve
from .alignment import Alignment
from .own import (
    agreeing,
    carries_features,
    differing,
    names_of,
    other_lengths,
    pins_on,
    read_along_features,
    unmatched_labels,
    unmatched_params,
)


@dataclass(frozen=True, eq=False)
class Common:
    """The graph that the models have in common, behind their stems, and what in it is the same to the bit.

    Attributes:
        pinned: per model, labels that have to be left alone, with the reasons.
        order: nodes of model 0, in order.
        by_position: what cannot be matched may be averaged place by place.
    """

    alignment: Alignment
    labellings: tuple[Labelling, ...]
    pinned: tuple[dict[int, str], ...]
    order: tuple[fx.Node, ...]
    by_position: bool = False

    @cached_property
    def differ(self) -> frozenset[str]:
        """Parameters of model 0 in which the models do not agree to the bit."""
        return differing(self.alignment)

    @cached_property
    def same(self) -> set[str]:
        """Nodes of model 0 whose values are the same in all models, to the bit."""
        return agreeing(self.alignment, self.labellings[0], self.differ)

    def in_order(self, names: Collection[str]) -> tuple[str, ...]:
        return tuple(node.name for node in self.order if node.name in names)

    def solved(self, names: Iterable[str], *, outputs: bool = False) -> tuple[FeatureSpaces, ...]:
        """The feature spaces of each model; with `outputs`, what the models return keeps its order."""
        return tuple(
            solve(
                label,
                {self.alignment.pairs[name][k] for name in names} | (_output(label) if outputs else set()),
                pinned=self.pinned[k],
                entering=self.alignment.entering(k),
            )
            for k, label in enumerate(self.labellings)
        )

    def _of_other_lengths(self, names: set[str], spaces: Sequence[FeatureSpaces]) -> dict[str, str]:
        """Nodes that read a table which has another length in another model."""
        first, params = self.labellings[0], self.alignment.params
        tensors = [
            {**dict(p.module.named_parameters()), **dict(p.module.named_buffers())} for p in self.alignment.programs
        ]
        found: dict[str, str] = {}
        for name in self.in_order(self._read(names)):
            for param in sorted(first.touches[name] & params.keys()):
                shapes = [held[twin].shape for held, twin in zip(tensors, params[param], strict=True)]
                if len(set(shapes)) > 1 and other_lengths(param, shapes, spaces[0]):
                    sizes = " and ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
                    found.setdefault(name, f"`{param}` has other lengths in other models: {sizes}")
        return found

    def _read(self, names: set[str]) -> set[str]:
        """Those of the nodes that depend on the input, and what they read of the rest."""
        result: set[str] = set()
        for node in reversed(self.order):
            if node.name in names and (node.name in self.labellings[0].dynamic or node.name in result):
                result |= {node.name, *(source.name for source in node.all_input_nodes if source.name in names)}
        return result

    def unmatched(self, names: set[str], spaces: Sequence[FeatureSpaces]) -> dict[str, str]:
        """Nodes that would be averaged place by place, or that fix the order of features, with the reasons."""
        if self.by_position:
            return self._of_other_lengths(names, spaces)
        own = self.in_order(self._read(names) - self.same)
        found: dict[str, str] = {}
        loose = False
        for k, label in enumerate(self.labellings):
            constraints = {name: label.constraints[self.alignment.pairs[name][k]] for name in own}
            left = unmatched_labels(list(constraints.values()), spaces[k])
            loose = loose or left.numel() > 0
            for name, said in constraints.items():
                reason = next(iter(said.refusals), "") or (pins_on(said, spaces[k], left) if left.numel() else "")
                if reason:
                    found.setdefault(name, reason)
        if found or loose:  # what else cannot be matched may be so for this reason alone
            return found or self._first_without_choice(own)
        tables = self._of_other_lengths(names, spaces)
        if tables:
            return tables
        first = self.labellings[0]
        read = {param for name in own for param in first.touches[name]} & self.differ
        bare = unmatched_params(read, spaces[0])
        still = bare - {param for name in own if name in first.dynamic for param in first.touches[name]}
        bare -= {param for param in still if read_along_features(param, spaces[0])}
        for name in own:
            if first.touches[name] & bare:
                param = min(first.touches[name] & bare)
                found.setdefault(name, f"the models differ in `{param}`, which has no features that could be matched")
        return found

    def _first_without_choice(self, own: Sequence[str]) -> dict[str, str]:
        """The node, with the reason, with which features get into the trunk, or a constraint on them, that leaves
        nothing to match: found by halving, for what says so may be several nodes together."""

        def left(count: int) -> tuple[list[str], str]:
            names = set(own[:count]) | self.same
            for k, found in enumerate(self.solved(names)):
                label = self.labellings[k]
                constraints = [label.constraints[self.alignment.pairs[name][k]] for name in own[:count]]
                labels = unmatched_labels(constraints, found)
                if labels.numel():
                    return names_of(label, found, labels), (found.pin_of(labels) or ("",))[0]
            return [], ""

        low, high = 0, len(own)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if left(middle)[0] else (middle, high)
        names, why = left(high)
        why = why or "they may not change places with one another"
        return {own[high - 1]: f"features of `{names[0] if names else own[high - 1]}` cannot be matched: {why}"}

    def discrete(self, names: set[str], spaces: Sequence[FeatureSpaces]) -> set[str]:
        """Values that something behind the trunk reads, booleans or integers that go by features: of a weighted mean of
        features each model's own cannot be told."""
        label = self.labellings[0]
        result: set[str] = set()
        if self.by_position:
            return result
        for node in self.order:
            if node.name in names & label.discrete - self.same and node.name in label.dynamic:
                readers = {u.name for u in node.users if u.op == "output" or u.name in label.dynamic}
                if not names.issuperset(readers) and carries_features(label, spaces[0], node.name):
                    result.add(node.name)
        return result

    def packed(self, names: set[str]) -> set[str]:
        """Tuples and the like with tensors in them that something behind the trunk reads as they are, such as the state
        of an `nn.LSTM`: a head is given back its own features of tensors only."""
        label = self.labellings[0]
        inside = names & label.dynamic - self.same - label.program.shapes.keys()
        if self.by_position:  # what has the same place in all models is given back at that place
            return set()
        return {
            node.name
            for node in self.order
            if node.name in inside and node.op != "placeholder" and not names.issuperset(u.name for u in node.users)
        }

    def alike(self, names: set[str], spaces: Sequence[FeatureSpaces]) -> set[str]:
        """Values that something behind the trunk reads and that carry no features to be given back to each model."""
        label = self.labellings[0]
        result: set[str] = set()
        if self.by_position:  # what has the same place in all models is given back at that place
            return result
        for node in self.order:
            inside = node.name in names and node.name in label.dynamic and node.name in label.program.shapes
            if not inside or node.name in self.same or node.op == "placeholder":
                continue
            readers = {u.name for u in node.users if u.op == "output" or u.name in label.dynamic}
            twins = self.alignment.pairs[node.name]
            if not names.issuperset(readers) and not all(
                carries_features(own, spaces[k], twins[k]) for k, own in enumerate(self.labellings)
            ):
                result.add(node.name)
        return result


def _output(label: Labelling) -> set[str]:
    """The node that returns: it pins what the model returns."""
    return {label.program.module.graph.output_node().name}

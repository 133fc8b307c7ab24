"""The trunk: the part of the models that is computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ..analysis.labelling import Labelling
from ..analysis.spaces import FeatureSpaces
from .alignment import Alignment
from .masks import about_masks, differ_by_feature


@dataclass(frozen=True, eq=False)
class Trunk:
    """The part that is computed once.

    Attributes:
        alignment: which nodes of the models are the same.
        labellings: labels of each model.
        nodes: names of the trunk's nodes in model 0, in order.
        spaces: feature spaces of each model's trunk; spaces and tie groups have the same numbers in all of them.
        ends: why the trunk goes no further: node name in model 0 -> reason.
        unmatched: those of `ends` where features cannot be matched.
        alike: nodes whose values heads read though they have no features that could be given back to each model: all
            heads get the same one. There are some only where the user has asked for them with `until`.
        returned: nodes that by default belong to the heads, for what they compute is what the models return.
    """

    alignment: Alignment
    labellings: tuple[Labelling, ...]
    nodes: tuple[str, ...]
    spaces: tuple[FeatureSpaces, ...]
    ends: Mapping[str, str]
    unmatched: Mapping[str, str] = field(default_factory=dict)
    alike: tuple[str, ...] = ()
    returned: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What the user has asked for with `until` that would not be shared otherwise."""
        notes = []
        if self.returned:
            names = ", ".join(f"`{name}`" for name in self.returned)
            notes.append(
                f"`until` shares {names}, by which the models compute what they return: heads may be much alike"
            )
        if self.alike:
            names = ", ".join(f"`{name}`" for name in self.alike)
            notes.append(f"{names} carries no features of its own for each model: all heads read the same value")
        return notes + ([about_masks(self.masked)] if self.masked else [])

    @cached_property
    def masked(self) -> tuple[str, ...]:
        """Nodes that sum over features with masked weights, of which a merge does not keep the mask."""
        program, labelling, spaces = self.alignment.programs[0], self.labellings[0], self.spaces[0]
        tensors = dict(program.module.named_parameters())
        torn = {
            name
            for name in program.masked
            if name in labelling.params and differ_by_feature(tensors[name] == 0, labelling.params[name].fields, spaces)
        }
        nodes = {node.name: node for node in program.module.graph.nodes if node.name in self.nodes}
        read = {name: {str(source.target) for source in node.all_input_nodes} for name, node in nodes.items()}
        return tuple(name for name in self.nodes if read[name] & torn)

    def names(self, k: int) -> dict[str, str]:
        """Node name in model 0 -> node name in model k, over the trunk."""
        return {name: self.alignment.pairs[name][k] for name in self.nodes}

    def head_nodes(self, k: int) -> list[str]:
        """Names of model k's nodes behind the trunk, in order."""
        shared = set(self.names(k).values()) | self.alignment.stem(k)
        return [node.name for node in self.alignment.programs[k].module.graph.nodes if node.name not in shared]

    @cached_property
    def reach(self) -> tuple[torch.Tensor, ...]:
        """How far the trunk's features go in each head.

        For each label of model k the label of a trunk feature that its head makes it equal to; -1 where it makes it
        equal to several different ones, 0 where to none. Each int64 [labels of model k].
        """
        return tuple(_reach(self, k) for k in range(len(self.spaces)))

    def sizes(self, space: int) -> tuple[int, ...]:
        """How many features each model has in a space of model 0."""
        return tuple(own.spaces[space].size for own in self.spaces)


def _reach(trunk: Trunk, k: int) -> torch.Tensor:
    """The reach of the trunk's features in head k, as `Trunk.reach` has it."""
    labelling, spaces = trunk.labellings[k], trunk.spaces[k]
    pairs = [pairs.numpy() for name in trunk.head_nodes(k) for pairs in labelling.constraints[name].equal]
    klass = spaces.klass.numpy()
    edges = np.concatenate([np.zeros((2, 0), np.int64), *pairs], axis=1)
    own = np.stack([np.arange(len(klass)), _first_of(klass)])
    rows = np.concatenate([edges, own], axis=1)
    graph = coo_matrix((np.ones(rows.shape[1], bool), (rows[0], rows[1])), shape=(len(klass), len(klass)))
    wide = connected_components(graph, directed=False)[1]
    inside = (spaces.space_of[spaces.klass] >= 0).numpy()
    result = np.zeros(int(wide.max()) + 1, np.int64)
    for label in np.unique(_first_of(klass)[inside]).tolist():
        result[wide[label]] = label if result[wide[label]] == 0 else -1
    return torch.from_numpy(result[wide])


def _first_of(klass: NDArray[np.int64]) -> NDArray[np.int64]:
    """A representative label for the class of each label."""
    first = np.full(int(klass.max()) + 1, -1, np.int64)
    first[klass[::-1]] = np.arange(len(klass) - 1, -1, -1)
    result: NDArray[np.int64] = first[klass]
    return result

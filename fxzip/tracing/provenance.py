"""Where the nodes of a zipped network come from, as the graph itself keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Provenance:
    """Where a node of a zipped network comes from.

    >>> Provenance("trunk", ("conv1", "conv1")).as_data()
    {'part': 'trunk', 'from': ['conv1', 'conv1'], 'writes': False}

    Attributes:
        part: "trunk", "head K", "stem K", "merge" for what merges the values that enter the trunk, or "batched" for
            what all heads compute in one call.
        sources: the nodes that it stands for: of every model in the trunk and where heads are joined, else of the model
            that the part belongs to; none for what only the zip has.
        writes: whether it writes in place into memory that was there before it.
        unmerges: whether it gives a head its own features back.
    """

    part: str = "trunk"
    sources: tuple[str, ...] = ()
    writes: bool = False
    unmerges: bool = False

    def as_data(self) -> dict[str, Any]:
        """As files have it."""
        found = {"part": self.part, "from": list(self.sources), "writes": self.writes}
        return {**found, "unmerge": True} if self.unmerges else found

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Provenance:
        """From a file, of whatever format."""
        sources = tuple(data.get("from", ()))
        return cls(str(data.get("part", "trunk")), sources, bool(data.get("writes")), bool(data.get("unmerge")))


_KEY = "fxzip"  # among what a node knows of itself


def mark(node: fx.Node, provenance: Provenance) -> None:
    """Note where a node comes from. In place."""
    node.meta[_KEY] = provenance


def provenance_of(node: fx.Node) -> Provenance:
    """Where a node comes from; a node of which nothing is noted is one of the trunk that stands for none."""
    found: Provenance = node.meta.get(_KEY, Provenance())
    return found


def provenance_data(node: fx.Node) -> dict[str, Any]:
    """What a file keeps of it; empty where nothing is noted."""
    return provenance_of(node).as_data() if _KEY in node.meta else {}

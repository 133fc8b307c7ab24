"""What `fxzip.inspect` finds out about one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from torch import nn

from ..analysis import check, label
from ..analysis.checking import Check
from ..analysis.grouping import FeatureSpace
from ..analysis.labelling import Barrier, Labelling
from ..analysis.rules import Rule
from ..analysis.spaces import FeatureSpaces, solve
from ..partition.dependencies import relations
from ..partition.node_names import cut_names
from ..partition.own import fixed_places
from ..rewriting.pages import fragment
from ..tracing import check_model, plain_context, trace
from ..tracing.calls import as_call
from ..tracing.option_values import checked


@dataclass(frozen=True, eq=False)
class Inspection:
    """Spaces, ties, barriers and possible cuts of one model. `print` it.

    Attributes:
        spaces: the feature spaces.
        ties: groups of names of spaces whose blocks move together.
        barriers: calls without a rule.
        fixed: nodes in front of which the trunk of two models ends, since features keep an order of their own there,
            with the reasons.
        cuts: what `until` takes.
        rung: how the model was traced.
        error: relative error of the self-check (None: not run).
        notes: what the self-check could not see.
    """

    spaces: tuple[FeatureSpace, ...]
    ties: tuple[tuple[str, ...], ...]
    barriers: tuple[Barrier, ...]
    fixed: dict[str, str]
    cuts: tuple[str, ...]
    rung: str
    error: float | None
    found: FeatureSpaces = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def graph(self) -> nx.MultiDiGraph:
        """Spaces, parameters and nodes, and what they have to do with one another: see `analysis.graph.relations`."""
        return relations(self.found)

    @classmethod
    def of(cls, labelling: Labelling, checked: Check | None = None) -> Inspection:
        found = solve(labelling) if checked is None else checked.spaces
        error, notes = (None, ()) if checked is None else (checked.error, tuple(checked.notes))
        spaces = found.spaces
        numbers = sorted({space.tie for space in spaces if space.tie is not None})
        ties = tuple(tuple(space.name for space in spaces if space.tie == number) for number in numbers)
        cuts = tuple(cut_names(list(labelling.program.module.graph.nodes)))
        fixed = fixed_places(labelling, found)
        return cls(spaces, ties, labelling.barriers, fixed, cuts, labelling.program.rung, error, found, notes)

    def __str__(self) -> str:
        lines = [f"traced: {self.rung}; self-check: " + ("not run" if self.error is None else f"{self.error:.1e}")]
        lines.append(f"{'space':48}{'size':>6}  {'legality':14}{'blocks':>12}  reason")
        for space in self.spaces:
            blocks = "" if space.blocks is None else "x".join(map(str, space.blocks.shape))
            lines.append(f"{space.name[:48]:48}{space.size:>6}  {space.legality:14}{blocks:>12}  {space.reason}")
        lines += ["tied: " + ", ".join(names) for names in self.ties]
        lines += [f"barrier: {barrier.reason}" for barrier in self.barriers]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"fixed order: node `{name}`: {reason}" for name, reason in self.fixed.items()]
        lines.append("cuts: " + ", ".join(self.cuts))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What was found, as notebooks show it."""
        head = ["space", "size", "may be merged", "blocks", "reason"]
        rows = []
        for space in self.spaces:
            blocks = "" if space.blocks is None else " × ".join(map(str, space.blocks.shape))
            rows.append({"cells": [space.name, space.size, space.legality, blocks, space.reason], "error": None})
        checked = "not run" if self.error is None else f"{self.error:.1e}"
        notes = [f"traced: {self.rung}; self-check: {checked}"]
        notes += ["tied: " + ", ".join(names) for names in self.ties]
        notes += [f"barrier: {barrier.reason}" for barrier in self.barriers]
        notes += [f"fixed order: node {name}: {reason}" for name, reason in self.fixed.items()]
        notes += [f"note: {note}" for note in self.notes]
        return fragment("table.html", head=head, rows=rows, texts=len(head), notes=[*notes, f"{len(self.cuts)} cuts"])


@plain_context()
@checked
def inspect(
    model: nn.Module, sample_input: Any, *, verify: bool = True, rules: Mapping[str, Rule] | None = None
) -> Inspection:
    """Feature spaces, ties, barriers and possible cuts of one model; printable.

    >>> import torch, fxzip
    >>> from torch import nn
    >>> found = fxzip.inspect(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4))
    >>> [(space.name, space.size, space.legality) for space in found.spaces]
    [('0.weight', 8, 'free')]
    """
    program = trace(check_model(model), as_call(sample_input))
    labelling = label(program, rules)
    return Inspection.of(labelling, check(labelling) if verify else None)

"""The self-check of what is built: a zip of a model with a relabelled copy, through the very plan and rewrite.

Of two models of a trunk the first gets random parameters θ, the second π θ in the trunk and others in its head, π a
random legal relabelling of the trunk's spaces. The merges are those that π tells. Then the trunk of their zip must
compute what the first one's does, node by node, and each head what its own model's does. So that a mean is told from
either of its terms, the zip is made of (1 + ε) θ and (1 - ε) π θ, of which θ is the mean.

Whatever a rule, the alignment, the plan, the change of basis or the emitted graph has wrong shows here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis import random_relabelling, relabelled, relative_difference
from ..analysis.random_trial import Trial, cast, is_inexact, nudged, run_with, sane_values, tensors_of
from ..analysis.relabelling import Movement
from ..analysis.rules import AxisLabels
from ..analysis.sightings import Sightings, Watcher, tensor_difference, watched
from ..errors import FxzipError
from ..partition.region import Trunk
from ..rewriting.emit import rewrite
from ..rewriting.module import part_of, sources_of
from ..rewriting.zip_plan import ZipPlan, planned
from ..tracing import Program
from ..tracing.provenance import provenance_of
from .known_merges import averaged_params, merges_of, spaces_on, trunk_params

_SPREAD = 0.125  # ε; a power of two, so that (1 ± ε) θ and their mean are exact
_NOISE = 100.0  # what is off by less than so many times what rounding does is no evidence


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a zip: how far a value is off, relative to its magnitude; what it is; and the node of the
    trunk, in the first model, at which it shows first ("": it is none)."""

    moved: float
    what: str
    node: str = ""


@dataclass(frozen=True, eq=False)
class Shown:
    """What one run gave and what its nodes showed."""

    output: Any
    seen: Sightings


class Couple:
    """Two models of a trunk on random parameters, the second's relabelled, and what they show.

    Args:
        trunk: of the two models alone.
        trial: the first one's, watched.
        seed: of the relabelling, and of the second one's head.
    """

    def __init__(self, trunk: Trunk, trial: Trial, seed: int) -> None:
        self.trunk, self.trial = trunk, trial
        self.program = trunk.alignment.programs[1]
        self.perms = random_relabelling(trunk.spaces[1], torch.Generator().manual_seed(seed))
        self.watched = [watched(labelling) for labelling in trunk.labellings]
        own = {name: trunk.alignment.params[name][1] for name in trunk_params(trunk)}
        self.stem = {name for node in trunk.alignment.stem(0) for name in trunk.labellings[0].touches[node]}
        self.still = spaces_on(trunk.spaces[1], self.stem & own.keys())
        own |= {name: name for name in self.stem}  # the second model is the first then
        known = set(own.values()) if trial.random else set(tensors_of(self.program))
        values = sane_values(self.program, seed + 1, but=known)
        alike = {twin: trial.values[name] for name, twin in own.items() if is_inexact(trial.values[name])}
        self.values = {name: value.detach() for name, value in (values | alike).items()}
        self.averaged = averaged_params(trunk, trial, self.stem) if trial.random else {}
        self.graph = copy.deepcopy(self.program.module.graph)
        by_name = {node.name: node for node in self.graph.nodes}
        entering = {by_name[name]: name for name in trunk.alignment.entering(1)}
        self.marked = self._marked(self.graph, entering, {by_name[name] for name in trunk.alignment.stem(1)})

    def flaw(self, moving: Collection[int] | None = None) -> Flaw | None:
        """What is wrong if these spaces (by number in the first model; None: all) are relabelled; None if nothing.

        A stem computes what it did; what leaves it is relabelled. Spaces on what stem and trunk share stay.
        """
        numbers = {s for s in range(len(self.perms)) if moving is None or s in moving}
        numbers -= self.still
        perms = [perm if n in numbers else torch.arange(len(perm), device="cpu") for n, perm in enumerate(self.perms)]
        beside = {name: value for name, value in self.values.items() if name not in self.stem}
        values = self.values | relabelled(beside, self.trunk.spaces[1], perms)
        own = self._alone(values, perms)
        try:
            return self._astray(own, values, perms) or self._miszipped(own, values, perms)
        except FxzipError:
            raise
        except Exception as error:  # whatever a graph that was put together wrongly may raise
            said = (str(error).strip().splitlines() or [""])[0]
            return Flaw(math.inf, f"the zip raises {type(error).__name__}: {said[:160]}")

    def _alone(self, values: Mapping[str, Tensor], perms: Sequence[Tensor]) -> Shown:
        """The second model by itself. What enters its trunk from a stem is relabelled there."""
        return self._run(self.program, values, self.watched[1], self.graph, self.marked, perms)

    def _marked(
        self, graph: fx.Graph, entering: Mapping[fx.Node, str], stem: Collection[fx.Node]
    ) -> dict[str, AxisLabels]:
        """Put a node behind each value that enters the trunk from a stem, in place, that the stem does not read: there
        the value is relabelled. Their names, with the fields of the values.

        Args:
            graph: of the second model, or of a zip.
            entering: nodes, with the names that they have in the second model.
            stem: the nodes of its stem.
        """
        marked = {}
        for node, name in entering.items():
            with graph.inserting_after(node):
                mark = graph.call_function(_entered, (node,))
            for user in list(node.users):
                if user is not mark and user not in stem:
                    user.replace_input_with(node, mark)
            marked[mark.name] = self.trunk.labellings[1].fields.get(name, ())
        return marked

    def _run(
        self, program: Program, values: Mapping[str, Tensor], nodes: Mapping[str, AxisLabels], graph: fx.Graph,
        marked: Mapping[str, AxisLabels], perms: Sequence[Tensor],
    ) -> Shown:  # fmt: skip
        watcher, moves = Watcher(nodes), Movement(self.trunk.spaces[1], perms)

        def visit(node: fx.Node, value: Any) -> Any:
            return moves(value, marked[node.name]) if node.name in marked else watcher(node, value)

        output = run_with(program, values, self.trial.call, self.trial.dtype, visit, graph)
        return Shown(output, watcher.seen)

    def _judge(self, gap: float, noise: Any) -> bool:
        """Whether so much is evidence; `noise` tells what rounding does."""
        return gap > self.trial.tolerance and gap > _NOISE * noise()

    def _astray(self, own: Shown, values: Mapping[str, Tensor], perms: Sequence[Tensor]) -> Flaw | None:
        """The first node of the second model's trunk whose value is not where the relabelling takes the first's."""
        moves, fields = Movement(self.trunk.spaces[1], perms), self.trunk.labellings[1].fields
        again: list[Shown] = []

        def noise(name: str) -> float:
            again[:] = again or [self._alone(_shaken(values, self.trial.dtype), perms)]
            return tensor_difference(own.seen[name], again[0].seen[name])

        for name, twin in self.trunk.names(1).items():
            if name not in self.trial.seen or twin not in own.seen:
                continue
            gap = _gap(moves(self.trial.seen[name], fields.get(twin, ())), own.seen[twin])
            if self._judge(gap, lambda twin=twin: noise(twin)):
                return Flaw(gap, f"the value of node `{name}` moves by {gap:.1e}", name)
        return None

    def _miszipped(self, own: Shown, values: Mapping[str, Tensor], perms: Sequence[Tensor]) -> Flaw | None:
        """The first node or output of the zip that is not what it is in the model."""
        trunk = self.trunk
        plan = planned(trunk, merges_of(trunk, perms), trunk.reach)
        net = rewrite(plan, self._spread(values))
        stable = [_unwritten(p, nodes) for p, nodes in zip(trunk.alignment.programs, self.watched, strict=True)]
        places = {node.name: place for node in net.graph.nodes if (place := _place(node, stable)) is not None}
        stands = {name: self.watched[k][own_name] for name, (k, own_name, _) in places.items()}
        stem = {node for node in net.graph.nodes if part_of(node) == "stem 1"}
        entering = {node: sources_of(node)[0] for node in net.graph.nodes if node in stem}
        entering = {node: name for node, name in entering.items() if name in trunk.alignment.entering(1)}
        marked = self._marked(net.graph, entering, stem)
        program = replace(self.trial.program, module=net)
        held = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        found = self._run(program, held, stands, net.graph, marked, perms)
        again: list[Shown] = []

        def shaken() -> Shown:
            other = _shaken(held, self.trial.dtype)
            again[:] = again or [self._run(program, other, stands, net.graph, marked, perms)]
            return again[0]

        for name, value in found.seen.items():
            k, node, shared = places[name]
            expected = self._expected(plan, own, perms, k, node)
            gap = 0.0 if expected is None else _gap(expected, value)
            if self._judge(gap, lambda name=name, value=value: tensor_difference(value, shaken().seen[name])):
                where = "the trunk" if shared else f"head {k}"
                return Flaw(gap, f"the value of node `{node}` in {where} is off by {gap:.1e}", node if shared else "")
        for k, expected in enumerate((self.trial.expected, own.output)):
            gap = relative_difference(expected, found.output[k])
            if self._judge(gap, lambda k=k: relative_difference(found.output[k], shaken().output[k])):
                return Flaw(gap, f"the output of head {k} is off by {gap:.1e}")
        return None

    def _spread(self, values: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """The parameters of both models as they are zipped."""
        return [
            {**own, **{name: own[name] * factor for name in names}}
            for own, names, factor in (
                (self.trial.values, self.averaged, 1 + _SPREAD),
                (values, self.averaged.values(), 1 - _SPREAD),
            )
        ]

    def _expected(self, plan: ZipPlan, own: Shown, perms: Sequence[Tensor], k: int, node: str) -> Tensor | None:
        """What a node of the zip must show. Where an unmerge was folded into a head, the first model's order."""
        if k == 0:
            return self.trial.seen.get(node)
        value = own.seen.get(node)
        if value is None:
            return None
        back = [
            perm.argsort() if n in plan.folded[1] else torch.arange(len(perm), device="cpu")
            for n, perm in enumerate(perms)
        ]
        fields = [plan.reach[1][labels.clamp(min=0)] for labels in self.watched[1][node]]
        return Movement(self.trunk.spaces[1], back)(value, fields)


def _entered(value: Any) -> Any:
    """What enters a trunk; see `Couple._marked`."""
    return value


def _gap(expected: Tensor | None, found: Tensor) -> float:
    if expected is None or expected.shape != found.shape:
        return math.inf
    return tensor_difference(expected, found)


def _shaken(values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: nudged(cast(v, dtype), generator) for name, v in values.items()}


def _unwritten(program: Program, watched: Mapping[str, AxisLabels]) -> dict[str, AxisLabels]:
    """The nodes whose values do not depend on when they are looked at: nobody else writes into their memory."""
    memory = program.memory
    written = frozenset[int]().union(*memory.writes.values())
    return {
        name: fields
        for name, fields in watched.items()
        if name in memory.writes or not memory.values.get(name, frozenset()) & written
    }


def _place(node: fx.Node, watched: Sequence[Mapping[str, AxisLabels]]) -> tuple[int, str, bool] | None:
    """Which model's node a node of a zip stands for, and whether it is one of the trunk."""
    made = provenance_of(node)
    part, names = made.part, made.sources
    if part == "trunk" and names and names[0] in watched[0]:
        return 0, names[0], True
    if part.startswith("head ") and len(names) == 1 and not made.unmerges and node.op.startswith("call"):
        k = int(part[5:])
        return (k, names[0], False) if names[0] in watched[k] else None
    return None

"""What is lost if a call has a lower rank, for the choice of ranks.

The best rank-r approximation of what a call gives keeps the r leading principal components of it, and loses the
variance along the others: Σ_{i > r} λ_i / Σ λ_i of the eigenvalues λ of the covariance of its features, behind the
BatchNorm if one alone reads it. In the trunk those are the features of all models side by side, each model's scaled to
a variance of 1 in all, for the call has to tell all of them. It is the currency of `losses.py`: the share of the
variance of what a weight computes that is lost, here by that weight itself. (Zhang et al., arXiv 1505.06798, maximise
the product of the shares kept, which for small losses is the least sum.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..calibration.observer import observe_values
from ..matching.moments import Moments
from ..partition.alignment import Alignment, attribute
from ..partition.region import Trunk
from ..rewriting.factorised import LinearSize, linear_size, why_whole
from ..tracing import Program
from ..tracing.calls import Call
from .levers import TRUNK, Floats, Key

MEMORY = 2 << 30
"""Bytes of the statistics of calls that are taken in one pass over the data."""


@dataclass(frozen=True, eq=False)
class RankLosses:
    """What a call loses by its rank.

    Attributes:
        size: of the call, in the trunk that of the first model.
        losses: with rank 0, 1, ..., N, falling to 0.
    """

    size: LinearSize
    losses: Floats

    @property
    def step(self) -> int:
        """By how much a rank is lowered at a time."""
        return math.ceil(self.size.outputs / 32)


@dataclass(frozen=True, eq=False)
class CallOutputs:
    """What the data show of the calls that may be factorised.

    Attributes:
        sizes: for each model, by node.
        joint: of calls that all models make, moments of their outputs side by side, by node of model 0.
        own: for each model, of its other calls, by node.
        pairs: nodes of all models by that of model 0.
    """

    sizes: tuple[Mapping[str, LinearSize], ...]
    joint: Mapping[str, Moments]
    own: tuple[Mapping[str, Moments], ...]
    pairs: Mapping[str, Sequence[str]]

    @classmethod
    def observe(cls, alignment: Alignment, data: Callable[[], Iterable[Call]]) -> CallOutputs:
        """One pass over the data for the calls that all models make, and one for each model that makes others.

        `data`: gives all batches whenever it is called.
        """
        programs = alignment.programs
        sizes = tuple(_sizes(program) for program in programs)
        joint = {
            name: twins
            for name, twins in alignment.pairs.items()
            if all(twin in own for twin, own in zip(twins, sizes, strict=True))
        }
        found = _observed(programs, list(joint.values()), data)
        rest = []
        for k, program in enumerate(programs):
            paired = {twins[k] for twins in joint.values()}
            names = [name for name in sizes[k] if name not in paired]
            seen = _observed((program,), [(name,) for name in names], data) if names else []
            rest.append({name: own for name, own in zip(names, seen, strict=True) if own is not None})
        both = {name: own for name, own in zip(joint, found, strict=True) if own is not None}
        return cls(sizes, both, tuple(rest), joint)

    def losses(self, trunk: Trunk) -> dict[Key, RankLosses]:
        """Of all calls of a trunk and of the heads behind it."""
        found: dict[Key, RankLosses] = {}
        inside = set(trunk.nodes)
        for name, moments in self.joint.items():
            if name in inside:
                found[TRUNK, name] = RankLosses(self.sizes[0][name], _lost(moments))
        for k, own in enumerate(self.sizes):
            first = {twins[k]: name for name, twins in self.pairs.items()}
            for name in trunk.head_nodes(k):
                seen = self._alone(k, name, first) if name in own else None
                if seen is not None:
                    found[k, name] = RankLosses(own[name], _lost(seen))
        return found

    def _alone(self, k: int, name: str, first: Mapping[str, str]) -> Moments | None:
        """Moments of a call of model k."""
        both = self.joint.get(first.get(name, ""))
        if both is None:
            return self.own[k].get(name)
        start, end = both.offsets()[k : k + 2]
        mine = slice(start, end)
        return Moments(both.count, both.total[mine], both.outer[mine, mine], (end - start,))


def _sizes(program: Program) -> dict[str, LinearSize]:
    """Of the calls of a model that may be factorised and give a tensor."""
    net = program.module
    return {
        node.name: linear_size(net, node)
        for node in net.graph.nodes
        if not why_whole(net, node) and node.name in program.shapes
    }


def _observed(
    programs: Sequence[Program], calls: Sequence[Sequence[str]], data: Callable[[], Iterable[Call]]
) -> list[Moments | None]:
    """Moments of what calls give, one of every model each."""
    values = []
    for names in calls:
        linear_calls = [_node(program.module, name) for program, name in zip(programs, names, strict=True)]
        nodes = [_output(program.module, call) for program, call in zip(programs, linear_calls, strict=True)]
        linear = isinstance(attribute(programs[0].module, str(linear_calls[0].target)), nn.Linear)
        values.append(([node.name for node in nodes], -1 if linear else 1))
    found: list[Moments | None] = []
    for group in _within_memory(programs, values):
        found += observe_values(programs, group, data())
    return found


def _within_memory(
    programs: Sequence[Program], values: Sequence[tuple[Sequence[str], int]]
) -> Iterator[Sequence[tuple[Sequence[str], int]]]:
    """The values in groups whose statistics fit into `MEMORY`, in order; a pass over the data for each."""
    group: list[tuple[Sequence[str], int]] = []
    taken = 0
    for names, axis in values:
        features = sum(program.shapes[name][axis] for program, name in zip(programs, names, strict=True))
        if group and taken + 8 * features**2 > MEMORY:
            yield group
            group, taken = [], 0
        group.append((names, axis))
        taken += 8 * features**2
    if group:
        yield group


def _output(net: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node that gives what a call computes: the BatchNorm's behind it if that alone reads it."""
    behind = next(iter(node.users)) if len(node.users) == 1 else None
    if behind is not None and behind.op == "call_module" and isinstance(attribute(net, str(behind.target)), _BatchNorm):
        return behind
    return node


def _node(net: fx.GraphModule, name: str) -> fx.Node:
    found: fx.Node = next(node for node in net.graph.nodes if node.name == name)
    return found


def _lost(moments: Moments) -> Floats:
    """The variance that is lost by rank, each model's relative to its own in all."""
    covariance = moments.covariance
    offsets = moments.offsets()
    for start, end in pairwise(offsets):
        whole = covariance.diagonal()[start:end].sum().clamp(min=torch.finfo(torch.float64).tiny)
        covariance[start:end] /= whole.sqrt()
        covariance[:, start:end] /= whole.sqrt()
    values = torch.linalg.eigvalsh(covariance).clamp(min=0).flip(0).cpu().numpy()
    return np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])

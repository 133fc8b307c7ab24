"""Which calls become two calls, and of what rank: all by one factor, some by name, or by need within a budget.

A factor says what a call is to take: with 1.0 the rank is that at which two calls take what one does, with 0.5 half of
it. A call stays whole where two would save nothing. All by one factor leaves out the last calls in front of an output,
whose few features are what the network is for.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from ..errors import InputError
from ..rewriting.factorised import Factors, LinearSize, factorise, linear_size, why_whole
from ..rewriting.module import ZippedModule, part_of, sources_of
from .requests import WHOLE, Budget, NamedRanks, RankRequest

Call = tuple[str, str]
"""A call: the part of the zip that it is in, and its node in that part's first model."""


@dataclass(frozen=True)
class Ranks:
    """Ranks of the calls that become two; and for the report, why calls that were named do not.

    Attributes:
        kept: by call.
        notes: for the report.
    """

    kept: Mapping[Call, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def choose_ranks(merged: ZippedModule, request: RankRequest, needed: Mapping[Call, int]) -> Ranks:
    """The ranks of the calls of a zipped network, which is not fitted yet.

    Args:
        merged: the network, its calls as wide as they are going to be.
        request: what the user asks for.
        needed: under a budget the ranks that it leaves.

    Raises:
        InputError: a name is no call of trunk or heads.
    """
    if request == WHOLE:
        return Ranks()

    calls = {node: why_whole(merged, node) for node in merged.graph.nodes if _fitted(node)}
    sizes = {node: linear_size(merged, node) for node, why in calls.items() if not why}
    if isinstance(request, Budget):
        wanted = {node: rank for node in sizes if (rank := needed.get(_call(node))) is not None}
        return Ranks(_saving(wanted, sizes))
    if isinstance(request, NamedRanks):
        return _named(merged, request.shares, calls, sizes)

    last = _in_front_of_outputs(merged)
    wanted = {node: _rank(request.share, size) for node, size in sizes.items() if node not in last}
    return Ranks(_saving(wanted, sizes))


def _fitted(node: fx.Node) -> bool:
    """Whether a node is a call of trunk or heads: what is in front of the trunk is each model's own, as it was."""
    part = part_of(node)
    return node.op == "call_module" and bool(sources_of(node)) and (part == "trunk" or part.startswith("head "))


def _call(node: fx.Node) -> Call:
    return part_of(node), sources_of(node)[0]


def _rank(share: float, size: LinearSize) -> int:
    """The rank at which two calls take this share of what one does, rounded down; 1 at least."""
    return max(1, int(share * size.break_even + 1e-9))


def _saving(wanted: Mapping[fx.Node, int], sizes: Mapping[fx.Node, LinearSize]) -> dict[Call, int]:
    """Those that save something."""
    return {_call(node): rank for node, rank in wanted.items() if sizes[node].saves(rank)}


def _named(
    merged: ZippedModule, shares: Mapping[str, float], calls: Mapping[fx.Node, str], sizes: Mapping[fx.Node, LinearSize]
) -> Ranks:
    """By name: a module path or node name of the models, for trunk and heads alike, or a path of the zip."""
    names = {node: _names(node) for node in calls}
    wanted: dict[fx.Node, int] = {}
    notes = []
    for name, share in shares.items():
        found = [node for node, own in names.items() if name in own]
        if not found:
            known = sorted({own for node in sizes for own in names[node]})
            near = difflib.get_close_matches(name, known, n=3)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise InputError(
                f"`rank` must name calls of layers in trunk or heads, as module paths of the models; found {name!r}."
                f"{hint}"
            )
        for node in found:
            if share == 1:
                continue
            if calls[node]:
                notes.append(f"`{node.target}` stays one call: {calls[node]}")
            elif not sizes[node].saves(_rank(share, sizes[node])):
                notes.append(f"`{node.target}` stays one call: two would save nothing at rank={share}")
            else:
                wanted[node] = _rank(share, sizes[node])
    return Ranks(_saving(wanted, sizes), tuple(notes))


def _names(node: fx.Node) -> set[str]:
    """What a user may call it."""
    target = str(node.target)
    return {target, target.partition(".")[2], *sources_of(node)[:1]}


def _in_front_of_outputs(net: fx.GraphModule) -> set[fx.Node]:
    """The layers with weights from which some path leads to an output without another one in between."""
    found = set[fx.Node]()
    waiting, seen = [net.graph.output_node()], set[fx.Node]()
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node in seen:
                continue
            seen.add(node)
            if node.op == "call_module" and any(p.ndim > 1 for p in net.get_submodule(str(node.target)).parameters()):
                found.add(node)
            else:
                waiting.append(node)
    return found


def as_emitted(merged: ZippedModule, ranks: Mapping[Call, int]) -> ZippedModule:
    """A network that takes what it will take once its calls are fitted and made two; what it computes is another
    matter."""
    if not ranks:
        return merged
    result = copy.deepcopy(merged)
    factors = {}
    for node in result.graph.nodes:
        rank = ranks.get(_call(node)) if _fitted(node) else None
        if rank is not None:
            size = linear_size(result, node)
            factors[node] = Factors(
                torch.ones(rank, size.inputs, device="cpu"), torch.ones(size.outputs, rank, device="cpu")
            )
    factorise(result, factors)
    return result

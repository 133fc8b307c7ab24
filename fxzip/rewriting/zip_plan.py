"""From statistics to a plan: the merge of every space, and how each head gets its own features back.

Where the trunk hands features of a space to a head, the head's copy of them, x_k = U_k x*, is a gather. If the head
does nothing with these features but move them, apply functions feature by feature, and finally sum over them with its
own weights W, the gather is folded away: W U_k x* = W x_k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..analysis.spaces import FeatureSpaces, Layout
from ..errors import InputError
from ..matching import Energy, Merge, Method, Problem, Space, TaskVectorMethod, Weight, marks, match_unseen
from ..matching.activations.recover import recovered
from ..matching.moments import Moments
from ..matching.reconstruction import unexplained_share
from ..partition.own import weights_behind
from ..partition.region import Trunk
from .combined_parameters import Combination
from .downstream import downstream_weights
from .weight_evidence import weights_of


@dataclass(frozen=True, eq=False)
class ZipPlan:
    """All that the rewrite needs.

    Attributes:
        trunk: what is shared.
        merges: space number of model 0 -> its merge.
        folded: for each model, the spaces whose unmerge goes into the head's weights.
        reach: for each model, label of a head -> the trunk's label that it is the same feature as (0: none).
        unobserved: spaces for which the data showed nothing; they are matched by weights, if at all.
        kept: space number of model 0 -> how many features it keeps, where that is not the number of model 0.
        heads: model -> the plan of that model by itself, where its head keeps fewer features (see `branches`).
        readings: (space, model) -> how the head reads its features from the merged ones where they are not copied from
            its own clusters, [features of the model, merged features].
        combination: what makes one of the models' parameters; None: their weighted means, by the merges.
        ranks: (part, node of the part's first model) -> the rank of a call that becomes two, see `factorised.py`.
    """

    trunk: Trunk
    merges: Mapping[int, Merge]
    folded: tuple[frozenset[int], ...]
    reach: tuple[torch.Tensor, ...]
    unobserved: frozenset[int] = field(default_factory=frozenset)
    kept: Mapping[int, int] = field(default_factory=dict)
    heads: Mapping[int, ZipPlan] = field(default_factory=dict)
    readings: Mapping[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    combination: Combination | None = None
    ranks: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def U(self, space: int, k: int) -> torch.Tensor:
        """How head k gets its features of a space from the merged ones where that is not folded into its weights."""
        return self.readings.get((space, k), self.merges[space].U(k))


def problem_of(
    trunk: Trunk,
    statistics: Mapping[int, Moments],
    method: Method,
    reach: Sequence[torch.Tensor] | None = None,
    kept: Mapping[int, int] | None = None,
) -> Problem:
    """What the method gets to see: every space with its moments, and the weights that it asks for.

    `kept`: how many features a space is to keep, where that is not the number of model 0.
    """
    spaces = []
    read: Sequence[tuple[tuple[torch.Tensor, ...], ...]] = [()] * len(trunk.spaces[0].spaces)
    if "downstream" in method.needs:
        read = downstream_weights(trunk, trunk.reach if reach is None else reach)
    for number, first in enumerate(trunk.spaces[0].spaces):
        own = [found.spaces[number] for found in trunk.spaces]
        seen = statistics.get(number)
        spaces.append(
            Space(
                tuple(space.size for space in own),
                first.legality,
                first.tie,
                tuple(space.blocks for space in own if space.blocks is not None),
                seen if seen is not None and seen.count else None,
                downstream=read[number],
                kept=(kept or {}).get(number, 0),
            )
        )
    weights = weights_of(trunk) if "weights" in method.needs else ()
    return Problem(_marked(trunk, spaces, weights) if "moments" in method.needs else tuple(spaces), weights)


def _marked(trunk: Trunk, spaces: Sequence[Space], weights: Sequence[Weight]) -> tuple[Space, ...]:
    """The spaces; where the data cannot tell features apart, their moments come with marks of the weights."""
    unclear = {s for s, space in enumerate(spaces) if space.moments is not None and bool(space.moments.unclear().any())}
    if unclear and not weights:
        weights = weights_of(trunk)
    result = list(spaces)
    for s in unclear:
        seen = spaces[s].moments
        assert seen is not None
        result[s] = replace(spaces[s], moments=replace(seen, marks=marks(weights, s)))
    return tuple(result)


def plan(
    trunk: Trunk,
    statistics: Mapping[int, Moments],
    method: Method,
    kept: Mapping[int, int] | None = None,
    base: Mapping[str, torch.Tensor] | None = None,
) -> ZipPlan:
    """Match every space and decide which unmerges fold. `kept` as in `problem_of`.

    `base`: parameters of the network that the models were fine-tuned from, by their names in model 0, for a method of
    task vectors.

    Raises:
        InputError: the method cannot keep another number of features than model 0 has; the base lacks a parameter, or
            has it in another shape; and as the method does.
    """
    kept = kept or {}
    reach = trunk.reach
    problem = problem_of(trunk, statistics, method, reach, kept)
    merges: dict[int, Merge] = dict(enumerate(method.match(problem))) if problem.spaces else {}
    for number, size in kept.items():
        if merges[number].size != size:
            raise InputError(
                f"`width` needs a method that keeps any number of features; {method!r} keeps {merges[number].size} of "
                f"`{trunk.spaces[0].spaces[number].name}` instead of {size}. Use `zip`, `energy` or `permute`."
            )
    asks = "moments" in method.needs
    unobserved = frozenset(s for s, space in enumerate(problem.spaces) if asks and space.moments is None)
    if unobserved and "weights" not in method.needs and not method.by_position:
        merges |= match_unseen(replace(problem, weights=weights_of(trunk)), merges)
    result = planned(trunk, merges, reach, unobserved, kept)
    if isinstance(method, TaskVectorMethod):
        return replace(result, combination=Combination.of(trunk, method, base))
    if not isinstance(method, Energy) or kept:  # others copy, as published; a budget leaves no room for products
        return result
    return replace(result, readings=_readings(problem, merges, result.folded))


_COPIED, _BETTER, _RIDGE = 0.02, 0.8, 1e-3
"""The share of the variance that a copy may miss, how much of that a product may miss, and the regression's ridge."""


def _readings(
    problem: Problem, merges: Mapping[int, Merge], folded: Sequence[frozenset[int]]
) -> dict[tuple[int, int], torch.Tensor]:
    """`ZipPlan.readings`: by linear regression where copies miss much, for a copy reads its own clusters only."""
    result = {}
    for s, space in enumerate(problem.spaces):
        if space.legality != "free" or space.tie is not None or space.moments is None:
            continue
        full = recovered(merges[s], space.moments, _RIDGE)
        missed = zip(unexplained_share(merges[s], space.moments), unexplained_share(full, space.moments), strict=True)
        for k, (copied, read) in enumerate(missed):
            if s in folded[k] or copied is None or read is None:  # features that do not vary have nothing to lose
                continue
            if copied > _COPIED and read < _BETTER * copied:
                result[s, k] = full.U(k)
    return result


def planned(
    trunk: Trunk,
    merges: Mapping[int, Merge],
    reach: tuple[torch.Tensor, ...],
    unobserved: frozenset[int] = frozenset(),
    kept: Mapping[int, int] | None = None,
) -> ZipPlan:
    """The plan for given merges: which unmerges fold.

    Raises:
        InputError: a merge is no average.
    """
    kept = kept or {}
    for number, merge in merges.items():
        merge.check_averages(trunk.spaces[0].spaces[number].name)
    folded = tuple(_foldable(trunk, k, same, merges, kept) for k, same in enumerate(reach))
    return ZipPlan(trunk, merges, folded, reach, unobserved, kept)


def _foldable(
    trunk: Trunk, k: int, reach: torch.Tensor, merges: Mapping[int, Merge], kept: Mapping[int, int]
) -> frozenset[int]:
    """Spaces (of model 0) whose unmerge goes into the weights of head k.

    Where the head sees another number of features than its own, its code must bear that: it has been tried for those
    in `kept` (see `elastic`).
    """
    narrow = {s for s, merge in merges.items() if s not in kept and merge.sizes[k] != merge.size}
    possible = set(merges) - unmerged_spaces(trunk, k, reach) - narrow
    return frozenset(s for s in possible if merges[s].assignment(k) is not None)


def unmerged_spaces(trunk: Trunk, k: int, reach: torch.Tensor) -> set[int]:
    """Spaces (of model 0) whose features head k needs in the model's own basis, whatever the merge.

    All but those that it only moves, maps one by one, and sums over with weights of its own. Where it treats a part of
    the features by itself, a slice say, their order is its own.
    """
    spaces = trunk.spaces[k]

    def reached(labels: torch.Tensor) -> set[int]:
        inside = reach[labels[labels > 0]]
        here = spaces.space_of[spaces.klass[inside[inside > 0]]]
        return {int(s) for s in here.unique() if s >= 0}

    met = set[int]()
    run = run_by_head(trunk, k)
    for name in run:
        constraints = trunk.labellings[k].constraints[name]
        for _, labels in constraints.touched:
            met |= reached(labels)
        for labels in (*(pin.labels for pin in constraints.pins), *(pairs.reshape(-1) for pairs in constraints.blocks)):
            met |= reached(labels)
    labelling = trunk.labellings[k]
    read = head_params(trunk, k) & set(labelling.params)
    runs = [labels for name in read for labels in labelling.params[name].fields]
    runs += [labels for name in run for labels in (*labelling.seen[name], *labelling.fields.get(name, ()))]
    for labels in runs:
        layout = spaces.layout(reach[labels.reshape(-1)].clamp(min=0))
        held = layout.space[layout.space >= 0]
        met |= {int(s) for s in held.unique() if not _whole(spaces, layout, int(s))}
    for labels in _past_the_trunk(trunk, k):
        met |= reached(labels)
    fused = spaces.space_of[spaces.klass[(reach == -1).nonzero().flatten()]]
    met |= {int(s) for s in fused.unique() if s >= 0}
    return met


def _past_the_trunk(trunk: Trunk, k: int) -> list[torch.Tensor]:
    """Labels of values that head k reads from its own stem: there they are in the model's own basis."""
    stem, own = trunk.alignment.stem(k), set(trunk.head_nodes(k))
    nodes = trunk.alignment.programs[k].module.graph.nodes
    read = {source.name for node in nodes if node.name in own for source in node.all_input_nodes} & stem
    return [labels for name in sorted(read) for labels in trunk.labellings[k].fields.get(name, ())]


def _whole(spaces: FeatureSpaces, layout: Layout, space: int) -> bool:
    """Whether every feature of a space sits in the run, equally often."""
    times = torch.bincount(layout.feature[layout.space == space], minlength=spaces.spaces[space].size)
    return bool((times == times[0]).all())


def run_by_head(trunk: Trunk, k: int) -> list[str]:
    """Names of the nodes of model k that its head runs, in order: those behind the trunk, and what these need that does
    not depend on the input, which may lie in the trunk too."""
    labelling = trunk.labellings[k]
    nodes = {node.name: node for node in trunk.alignment.programs[k].module.graph.nodes}
    waiting, done = trunk.head_nodes(k), set[str]()
    while waiting:
        name = waiting.pop()
        done.add(name)
        waiting += {source.name for source in nodes[name].all_input_nodes} - labelling.dynamic - done
    return [name for name in nodes if name in done]


def head_params(trunk: Trunk, k: int) -> set[str]:
    """Parameters and buffers that model k's head reads, itself or through what does not depend on the input."""
    behind = weights_behind(trunk.labellings[k])
    return {param for name in run_by_head(trunk, k) for param in behind[name]}

"""Which feature spaces may have another number of features: found by trying it, on each model.

A space is made twice as wide, as it is where two networks lie in it side by side: by features that nobody reads, larger
than those of the network, which lie behind them or among them. Whatever the network does with the space feature by
feature, and sums over with weights, it then computes as before. A size that is written into the code, a mean over the
features or the largest of them, a scale that depends on their number: all these show, as an error or as another output.
Then every space gets a size of its own: those whose numbers the code ties together, the halves of a `chunk` that go
separate ways, pass together only, and keep one size. The trial runs the very passes that emit a zipped network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..analysis.random_trial import Trial, run_with, sane_values
from ..analysis.sightings import relative_difference
from ..matching import Merge
from ..matching.moments import Moments
from ..partition.alignment import Alignment, attribute
from ..partition.region import Trunk
from ..rewriting.emit import rewrite
from ..rewriting.merged_parameters import merged_layout
from ..rewriting.zip_plan import planned
from ..tracing import Program
from ..tracing.calls import Call, batch_size

Sizes = Mapping[int, int]  # by space number of model 0
_VALUES = 1 << 15  # of the inputs of a trial
_LARGER = 1.5
_FEWEST = 3  # positions: of two any features are alike, or opposite


@dataclass(frozen=True)
class Elastic:
    """What may have another number of features.

    Attributes:
        spaces: the numbers of the spaces that may.
        reasons: of the others that were asked for, why not.
        alike: sets of spaces that must all have the same number, as the halves of a `chunk` that go separate ways.
    """

    spaces: frozenset[int]
    reasons: Mapping[int, str]
    alike: tuple[frozenset[int], ...] = ()

    def among(self, chosen: Collection[int], names: Sequence[str]) -> Elastic:
        """Of some of the spaces; those that must be like one that is not among them may not."""
        reasons = {s: why for s, why in self.reasons.items() if s in chosen}
        for group in self.alike:
            if not group <= set(chosen):
                others = sorted({names[s] for s in group - set(chosen)})
                why = f"it must have as many as {' and '.join(f'`{name}`' for name in others)}, which keeps its own"
                reasons |= dict.fromkeys(group & set(chosen), why)
        spaces = self.spaces & set(chosen) - reasons.keys()
        return Elastic(spaces, reasons, tuple(group for group in self.alike if group <= spaces))


def elastic_spaces(trunk: Trunk, statistics: Mapping[int, Moments], asked: Collection[int] | None = None) -> Elastic:
    """Of the spaces asked for (None: all that are free) those that can get another size, and of the others why not."""
    spaces = trunk.spaces[0].spaces
    able = {s for s, space in enumerate(spaces) if space.legality == "free" and space.tie is None}
    wanted = able if asked is None else set(asked)
    tried = [s for s in sorted(able) if s in statistics and statistics[s].count >= _FEWEST]
    found = _tried(trunk, tried)
    reasons = {s: spaces[s].reason or "it was not observed" for s in wanted - set(tried)}
    return replace(found, reasons={**reasons, **found.reasons}).among(wanted, [space.name for space in spaces])


def resizable_spaces(trunk: Trunk) -> Elastic:
    """All free spaces that can get another size, whatever the data show of them."""
    spaces = trunk.spaces[0].spaces
    able = [s for s, space in enumerate(spaces) if space.legality == "free" and space.tie is None]
    return _tried(trunk, able).among(able, [space.name for space in spaces])


def stiff_spaces(trunk: Trunk, candidates: Sequence[int]) -> dict[int, str]:
    """Those of the spaces that must keep their size, with the reason. In: a trunk and space numbers of model 0."""
    return dict(_tried(trunk, candidates).reasons)


def _tried(trunk: Trunk, candidates: Sequence[int]) -> Elastic:
    """Two forward passes of each model and one for each trial; three trials if all candidates pass, each of a size of
    its own.

    Spaces that pass together, but not each by itself, are those whose numbers the code ties together.
    """
    trials = [_Trials(trunk, k) for k in range(len(trunk.spaces))]
    stiff = _extrema(trunk, candidates)
    for own in trials:
        stiff |= _left_out(own.failure, [space for space in candidates if space not in stiff])
    left = [space for space in candidates if space not in stiff]
    tied: dict[int, str] = {}
    for own in trials:
        tied |= _left_out(own.failure_apart, [space for space in left if space not in tied])
    groups: list[frozenset[int]] = []
    for own in trials:
        for space in sorted(tied):
            group = _needed(own.failure, space, sorted(tied))
            touching = [other for other in groups if other & group]
            groups = [other for other in groups if other not in touching] + [group.union(*touching)]
    several = [group for group in groups if len(group) > 1]
    uneven = [group for group in several if len({trunk.sizes(space) for space in group}) > 1]
    stiff |= {s: tied[s] for group in (*uneven, *(g for g in groups if len(g) == 1)) for s in group}
    free = frozenset(candidates) - stiff.keys()
    return Elastic(free, stiff, tuple(group for group in several if group <= free))


def _extrema(trunk: Trunk, candidates: Sequence[int]) -> dict[int, str]:
    """Spaces over which a maximum is taken: it does not see copies, so that a trial would show nothing."""
    spaces, found = trunk.spaces[0], {}
    for node in trunk.nodes:
        for labels in (labels for how, labels in trunk.labellings[0].constraints[node].touched if how == "extremum"):
            for space in spaces.space_of[spaces.klass[labels]].unique().tolist():
                found[space] = f"a maximum over its features depends on which there are (node `{node}`)"
    return {space: found[space] for space in candidates if space in found}


def _left_out(failure: Callable[[Sequence[int]], str], candidates: Sequence[int]) -> dict[int, str]:
    """What has to be left out so that the rest passes together, by halving."""
    stiff: dict[int, str] = {}

    def added(base: list[int], more: Sequence[int]) -> list[int]:
        why = failure([*base, *more]) if more else ""
        if not why:
            return [*base, *more]
        if len(more) == 1:
            stiff[more[0]] = why
            return base
        half = len(more) // 2
        return added(added(base, more[:half]), more[half:])

    added([], list(candidates))
    return stiff


def _needed(failure: Callable[[Sequence[int]], str], space: int, among: Sequence[int]) -> frozenset[int]:
    """A least set of spaces with this one that pass together: those needed are found one by one, by bisection."""
    chosen, rest = [space], [other for other in among if other != space]
    while failure(chosen) and rest:
        low, high = 0, len(rest)  # with the first `low` it does not pass, with the first `high` it does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if not failure([*chosen, *rest[:middle]]) else (middle, high)
        chosen.append(rest[high - 1])
        rest = rest[: high - 1]
    return frozenset(chosen)


class _Trials:
    """Model k of a trunk, on random parameters."""

    def __init__(self, trunk: Trunk, k: int) -> None:
        program = trunk.alignment.programs[k]
        self.trial = Trial(program, 0, None, rows=_rows(program.call))
        self.spaces = trunk.spaces[k].spaces
        self.cases = [(_alone(trunk, k, self._holding(v)), expected) for v, expected in self._values()]

    def _values(self) -> list[tuple[dict[str, Tensor], Any]]:
        """Parameters with the output on them, such that no feature is on the same side of zero throughout: of both
        signs, and with those that are no matrices turned round; where the output is not finite, the plain ones."""
        names = {name for name, _ in self.trial.program.module.named_parameters()}
        found = [(dict(self.trial.values), self.trial.expected)]
        signed = sane_values(self.trial.program, 1, signed=True)
        turned = {name: -value if name in names and value.ndim == 1 else value for name, value in signed.items()}
        for values in (signed, turned):
            expected = run_with(self.trial.program, values, self.trial.call, self.trial.dtype)
            if all(bool(t.isfinite().all()) for t in tree_leaves(expected) if isinstance(t, Tensor)):
                found.append((values, expected))
        return found[-2:]

    def _holding(self, values: Mapping[str, Tensor]) -> Program:
        module = copy.deepcopy(self.trial.program.module)
        for name, value in values.items():
            attribute(module, name).data = value.detach().clone()
        return replace(self.trial.program, module=module)

    def failure(self, spaces: Sequence[int]) -> str:
        """Why the spaces cannot all be made twice as wide; "" if they can. Their features lie behind what is added,
        then among it."""
        more = {s: self.spaces[s].size for s in spaces}
        return self._failure(more, None, 0) or self._failure(more, 1, -1)

    def failure_apart(self, spaces: Sequence[int]) -> str:
        """Why the spaces cannot each be made wider by a number of its own; "" if they can.

        The numbers are two apart: `chunk` rounds up, so that its first part may have one feature more by accident.
        """
        return self._failure({s: 2 * place + 2 for place, s in enumerate(sorted(spaces))}, 2, 0)

    def _failure(self, more: Mapping[int, int], seed: int | None, case: int) -> str:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        own, (alone, expected) = self.spaces, self.cases[case]
        wider = {s: _spread(own[s].size, extra, generator) for s, extra in more.items()}
        merges = {s: wider.get(s) or Merge.identity(space.size, 1) for s, space in enumerate(own)}
        try:
            net = rewrite(planned(alone, merges, alone.reach, kept={s: m.size for s, m in wider.items()}))
            values = {**dict(net.named_parameters()), **dict(net.named_buffers())}
            values |= _distinct(alone, wider, values)
            found = run_with(replace(self.trial.program, module=net), values, self.trial.call, self.trial.dtype)
        except Exception as error:  # whatever a model may raise when its features have another number
            lines = str(error).strip().splitlines() or [""]
            return f"with more features it raises {type(error).__name__}: {lines[0][:120]}"
        if _numbers(expected) != _numbers(found[0]):
            return "the model returns a size that goes by it"
        moved = relative_difference(expected, found[0])
        return "" if moved <= self.trial.tolerance else f"with more features of others the output moves by {moved:.1e}"


def _numbers(output: Any) -> list[Any]:
    """What a model returns beside tensors: sizes, say."""
    return [value for value in tree_leaves(output) if isinstance(value, (int, float, str))]


def _rows(call: Call) -> int:
    """A batch on which a nonlinearity hides nothing: so many rows as do not cost much."""
    sizes = [t.numel() for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
    each = sum(sizes) // max(batch_size(call) or 1, 1)
    return max(2, min(16, _VALUES // max(each, 1)))


def _spread(size: int, more: int, generator: torch.Generator | None) -> Merge:
    """So many features, `size + more` in all, of which only those of the model are read: at the end, or at random
    places. What lies at the others is the model's features too, until `_distinct`."""
    places = torch.arange(size + more, device="cpu")
    order = places.roll(size) if generator is None else torch.randperm(size + more, generator=generator, device="cpu")
    merge = torch.zeros(size + more, size, dtype=torch.float64, device="cpu")
    merge[order, places % size] = 1
    unmerge = torch.zeros(size, size + more, dtype=torch.float64, device="cpu")
    unmerge[places[:size], order[:size]] = 1
    return Merge(merge, unmerge, (size,), 1.0)


def _distinct(alone: Trunk, wider: Mapping[int, Merge], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the trunk in which features that nobody reads are larger than those that they were copied from: so
    they show wherever features are averaged, compared or taken for others."""
    spaces = alone.spaces[0]
    idle = {s: merge.unmerge.sum(0) == 0 for s, merge in wider.items()}
    result: dict[str, Tensor] = {}
    for name, labels in spaces.labelling.params.items():
        value = values.get(f"trunk.{name}")
        for place, run in enumerate(labels.fields if value is not None else ()):
            if (name, place) in spaces.consumed or (labels.groups > 1 and place) or labels.order is not None:
                continue
            layout = merged_layout(spaces, run, wider)
            factor = torch.ones(len(layout.space), dtype=torch.float64, device="cpu")
            for s, unread in idle.items():
                here = layout.space == s
                factor[here] = torch.where(unread[layout.feature[here]], _LARGER, 1.0).to(factor)
            axis = next(a for a, n in enumerate(run.shape) if n > 1)
            shape = [-1 if a == axis else 1 for a in range(run.ndim)]
            value = result.get(f"trunk.{name}", value)
            assert value is not None
            if bool((factor != 1).any()):
                result[f"trunk.{name}"] = value.detach() * factor.to(value.device, value.dtype).reshape(shape)
    return result


def _alone(trunk: Trunk, k: int, program: Program) -> Trunk:
    """The trunk of model k by itself."""
    own = trunk.alignment
    alignment = Alignment(
        (program,),
        {twins[k]: (twins[k],) for twins in own.pairs.values()},
        {twins[k]: (twins[k],) for twins in own.params.values()},
        ("",),
        own.stems[k : k + 1],
    )
    spaces = (trunk.spaces[k],)
    return Trunk(
        alignment,
        (trunk.labellings[k],),
        tuple(trunk.names(k).values()),
        spaces,
        {},
    )

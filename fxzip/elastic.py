"""Which feature spaces may have another number of features: found by trying it, on each model.

A space is widened by copies of features of its own, and each use of a feature reads either the feature or its copy.
Whatever the network does with the space feature by feature, and sums over with weights, it then computes as before. A
size that is written into the code, a mean over the features, a scale that depends on their number: all these show, as
an error or as another output. The trial runs the very passes that emit a zipped network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from .align import Alignment, attribute
from .analysis.sightings import relative_difference
from .analysis.trial import Trial, run_with
from .matching import Merge
from .moments import Moments
from .plan import planned, reaches
from .rewrite import rewrite
from .tracing import Program
from .trunk import Trunk

Sizes = Mapping[int, int]  # by space number of model 0
_FEWEST = 3  # positions: of two any features are alike, or opposite


def elastic_spaces(
    trunk: Trunk, statistics: Mapping[int, Moments], asked: Collection[int] | None = None
) -> tuple[frozenset[int], dict[int, str]]:
    """Of the spaces asked for (None: all that are free) those that can get another size, and of the others why not."""
    spaces = trunk.spaces[0].spaces
    able = {s for s, space in enumerate(spaces) if space.legality == "free" and space.tie is None}
    wanted = able if asked is None else asked
    tried = [s for s in wanted if s in able and s in statistics and statistics[s].count >= _FEWEST]
    stiff = stiff_spaces(trunk, tried)
    reasons = {
        s: stiff.get(s) or spaces[s].reason or "it was not observed" for s in wanted if s not in tried or s in stiff
    }
    return frozenset(tried) - stiff.keys(), reasons


def stiff_spaces(trunk: Trunk, candidates: Sequence[int]) -> dict[int, str]:
    """Those of the spaces that must keep their size, with the reason. In: a trunk and space numbers of model 0.

    Two forward passes of each model and one for each trial; one trial if all candidates pass.
    """
    stiff = _extrema(trunk, candidates)
    for k in range(len(trunk.spaces)):
        left = [space for space in candidates if space not in stiff]
        stiff |= _stiff(_Trials(trunk, k).failure, left)
    return stiff


def _extrema(trunk: Trunk, candidates: Sequence[int]) -> dict[int, str]:
    """Spaces over which a maximum is taken: it does not see copies, so that a trial would show nothing."""
    spaces, found = trunk.spaces[0], {}
    for node in trunk.nodes:
        for labels in (labels for how, labels in trunk.labellings[0].facts[node].touched if how == "extremum"):
            for space in spaces.space_of[spaces.klass[labels]].unique().tolist():
                found[space] = f"a maximum over its features depends on which there are (node `{node}`)"
    return {space: found[space] for space in candidates if space in found}


def _stiff(failure: Callable[[Sequence[int]], str], candidates: Sequence[int]) -> dict[int, str]:
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


class _Trials:
    """Model k of a trunk, on random parameters."""

    def __init__(self, trunk: Trunk, k: int) -> None:
        self.trial = Trial(trunk.alignment.programs[k], 0, None)
        self.numbers = trunk.partners[k]
        module = copy.deepcopy(trunk.alignment.programs[k].module)
        for name, value in self.trial.values.items():
            attribute(module, name).data = value.detach().clone()
        self.alone = _alone(trunk, k, replace(trunk.alignment.programs[k], module=module))

    def failure(self, spaces: Sequence[int]) -> str:
        """Why the spaces cannot be widened together; "" if they can."""
        generator = torch.Generator().manual_seed(0)
        wider = {self.numbers[space] for space in spaces}
        merges = {
            number: _copies(space.size, -(-space.size // 4) if number in wider else 0, generator)
            for number, space in enumerate(self.alone.spaces[0].spaces)
        }
        kept = {number: merges[number].size for number in wider}
        try:
            net = rewrite(planned(self.alone, merges, reaches(self.alone), kept=kept))
            values = {**dict(net.named_parameters()), **dict(net.named_buffers())}
            found = run_with(replace(self.trial.program, module=net), values, self.trial.call, self.trial.dtype)
        except Exception as error:  # whatever a model may raise when its features have another number
            return f"with more features it raises {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        moved = relative_difference(self.trial.expected, found[0])
        return "" if moved <= self.trial.tolerance else f"with copies of its features the output moves by {moved:.1e}"


def _copies(size: int, more: int, generator: torch.Generator) -> Merge:
    """So many features copied, and each read from one of its two places at random."""
    chosen = torch.randperm(size, generator=generator)[:more]
    merge = torch.eye(size, dtype=torch.float64)[torch.cat([torch.arange(size), chosen])]
    place = torch.arange(size)
    moved = torch.rand(more, generator=generator) < 0.5
    place[chosen[moved]] = size + moved.nonzero().flatten()
    return Merge(merge, torch.eye(size + more, dtype=torch.float64)[place], (size,), 1.0)


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
        (tuple(range(len(trunk.spaces[k].spaces))),),
        {},
    )

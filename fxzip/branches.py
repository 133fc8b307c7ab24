"""What is redundant within one model: heads that keep fewer features than their models had.

Behind the cut nothing is shared, but a head may still be narrowed: features of its own are merged with one another, by
the same statistics and the same clusters as in the trunk. For that each model is looked at by itself, as a zip of one
that is all trunk; of its spaces those count that lie wholly behind the cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .align import Alignment, align
from .analysis.labelling import Labelling
from .elastic import elastic_spaces
from .errors import AlignError
from .inputs import Call
from .losses import Losses
from .matching import Energy, JointMethod, Merge, Method, Problem, Zip, match_spaces
from .moments import Moments
from .observe import observe
from .plan import ZipPlan, planned, problem_of, reaches
from .trunk import Trunk, find_trunk


@dataclass(frozen=True, eq=False)
class Alone:
    """One model by itself.

    Attributes:
        trunk: the whole model, up to what it returns.
        statistics: moments of its spaces, by number.
    """

    trunk: Trunk
    statistics: Mapping[int, Moments]

    @cached_property
    def losses(self) -> Losses:
        """What its spaces lose with fewer features."""
        return Losses(self.trunk, self.statistics)

    @cached_property
    def elastic(self) -> tuple[frozenset[int], dict[int, str]]:
        """Spaces that may have another size; of others that look like it the reasons why they may not."""
        return elastic_spaces(self.trunk, self.statistics)


def whole_trunk(alignment: Alignment, labelling: Labelling, pinned: dict[int, str], k: int) -> Trunk | None:
    """Model k as a trunk by itself; None if it has no parameters."""
    with suppress(AlignError):
        return find_trunk(align((alignment.programs[k],)), [labelling], pinned=[pinned], whole=True)
    return None


def observe_alone(trunks: Sequence[Trunk | None], data: Sequence[Iterable[Call]]) -> tuple[Alone | None, ...]:
    """The trunks with what the data show of their spaces, one pass for each."""
    return tuple(
        None if trunk is None else Alone(trunk, observe(trunk, calls))
        for trunk, calls in zip(trunks, data, strict=True)
    )


def behind(trunk: Trunk, k: int, own: Trunk) -> frozenset[int]:
    """Spaces of `own`, model k by itself, of which nothing arises, is read, or lies on one axis with others in front of
    the cut."""
    labelling = own.labellings[0]
    nodes = set(trunk.names(k).values()) | trunk.alignment.stem(k)
    front = {s for name in nodes for labels in labelling.fields.get(name, ()) for s in _spaces(own, labels)}
    runs = {name: [_spaces(own, run) for run in labels.fields] for name, labels in labelling.params.items()}
    read = {name for node in nodes for name in labelling.touches[node]} & runs.keys()
    front |= {s for name in read for run in runs[name] for s in run}
    beside = {s for found in runs.values() for run in found if run & front for s in run}
    return frozenset(range(len(own.spaces[0].spaces))) - front - beside


def _spaces(own: Trunk, labels: Tensor) -> set[int]:
    found = own.spaces[0].layout(labels.reshape(-1)).space.unique().tolist()
    return {int(s) for s in found if s >= 0}


def narrowed(
    whole: ZipPlan,
    alone: Sequence[Alone | None],
    kept: Sequence[Mapping[int, int]],
    method: Method | JointMethod,
) -> ZipPlan:
    """The plan with heads that keep so many features, by space of each model alone.

    Methods that only match features of several models leave it to `Energy` to match those of one.
    """
    heads = {
        k: _narrowed(own, sizes, method if isinstance(method, (Zip, Energy)) else Energy())
        for k, (own, sizes) in enumerate(zip(alone, kept, strict=True))
        if own is not None and sizes
    }
    return replace(whole, heads=heads)


def _narrowed(own: Alone, kept: Mapping[int, int], method: Method | JointMethod) -> ZipPlan:
    reach = reaches(own.trunk)
    problem = problem_of(own.trunk, own.statistics, method, reach, kept)
    chosen = sorted(kept)
    found = match_spaces(Problem(tuple(problem.spaces[s] for s in chosen), ()), method)
    sizes = [space.size for space in own.trunk.spaces[0].spaces]
    merges = {s: Merge.from_clusters(torch.arange(size), (size,)) for s, size in enumerate(sizes)}
    merges |= dict(zip(chosen, found, strict=True))
    return planned(own.trunk, merges, reach, kept=kept)

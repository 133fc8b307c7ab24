"""What is redundant within one model: heads that keep fewer features than their models had.

Behind the cut nothing is shared, but a head may still be narrowed: features of its own are merged with one another, by
the same statistics and the same clusters as in the trunk. For that each model is looked at by itself, as a zip of one
that is all trunk; of its spaces those count that lie wholly behind the cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from ..analysis.labelling import Labelling
from ..errors import AlignError
from ..matching import Energy, Merge, Method, Problem, Zip
from ..partition.alignment import Alignment, align
from ..partition.region import Trunk
from ..partition.trunk import whole_trunk
from ..rewriting.zip_plan import ZipPlan, planned, problem_of
from .observed import Observed


def whole_trunks(
    alignment: Alignment, labellings: Sequence[Labelling], pinned: Sequence[dict[int, str]]
) -> dict[int, Trunk]:
    """Each model as a trunk by itself, by its number; those without parameters are left out."""
    result = {}
    for k, (program, labelling, pins) in enumerate(zip(alignment.programs, labellings, pinned, strict=True)):
        with suppress(AlignError):
            result[k] = whole_trunk(align((program,)), [labelling], [pins])
    return result


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
    solo: Mapping[int, Observed],
    kept: Mapping[int, Mapping[int, int]],
    method: Method,
) -> ZipPlan:
    """The plan with heads that keep so many features: model -> space of the model alone -> number.

    Methods that only match features of several models leave it to `Energy` to match those of one.
    """
    within = method if isinstance(method, (Zip, Energy)) else Energy()
    return replace(whole, heads={k: _narrowed(solo[k], sizes, within) for k, sizes in kept.items()})


def _narrowed(own: Observed, kept: Mapping[int, int], method: Method) -> ZipPlan:
    reach = own.trunk.reach
    problem = problem_of(own.trunk, own.moments, method, reach, kept)
    chosen = sorted(kept)
    found = method.match(Problem(tuple(problem.spaces[s] for s in chosen)))
    sizes = [space.size for space in own.trunk.spaces[0].spaces]
    merges = {s: Merge.from_clusters(torch.arange(size, device="cpu"), (size,)) for s, size in enumerate(sizes)}
    merges |= dict(zip(chosen, found, strict=True))
    return planned(own.trunk, merges, reach, kept=kept)

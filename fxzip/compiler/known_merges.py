"""The merges of a network with a relabelled copy, which are known, and the parameters that they touch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..analysis import FeatureSpaces
from ..analysis.random_trial import Trial, is_inexact
from ..matching import Merge
from ..partition.region import Trunk
from ..rewriting.zip_plan import head_params


def spaces_on(spaces: FeatureSpaces, names: Collection[str]) -> set[int]:
    """Numbers of the spaces whose features these parameters hold."""
    runs = [run for name in names if name in spaces.labelling.params for run in spaces.labelling.params[name].fields]
    return {int(s) for run in runs for s in spaces.layout(run).space.unique() if s >= 0}


def trunk_params(trunk: Trunk) -> list[str]:
    """Parameters and buffers of model 0 that the trunk reads."""
    return sorted({param for node in trunk.nodes for param in trunk.labellings[0].touches[node]})


def averaged_params(trunk: Trunk, trial: Trial, stem: Collection[str]) -> dict[str, str]:
    """Parameters of the trunk that may differ between the models: no head or stem reads them, and what they hold is
    matched. Their names in both."""
    read = [head_params(trunk, 0) | set(stem), head_params(trunk, 1)]
    result = {}
    for name in trunk_params(trunk):
        twin, labels = trunk.alignment.params[name][1], trunk.spaces[0].labelling.params.get(name)
        if labels is None or name in read[0] or twin in read[1] or not is_inexact(trial.values[name]):
            continue
        if spaces_on(trunk.spaces[0], [name]):
            result[name] = twin
    return result


def merges_of(trunk: Trunk, perms: Sequence[Tensor]) -> dict[int, Merge]:
    """The merges that a relabelling of the second model tells."""
    mates = _mates(trunk)
    result = {}
    for space, own in enumerate(trunk.spaces[0].spaces):
        size = own.size
        place = torch.empty(size, dtype=torch.int64, device="cpu")
        place[perms[space]] = mates[space]
        result[space] = Merge.from_clusters(torch.cat([torch.arange(size, device="cpu"), place]), (size, size))
    return result


def _mates(trunk: Trunk) -> list[Tensor]:
    """For each space of the first model, and each feature of the second in it, the feature of the first one that lies
    at the same places."""
    first, second = trunk.spaces
    mates = [torch.arange(space.size, device="cpu") for space in first.spaces]
    for name, labels in first.labelling.params.items():
        other = second.labelling.params.get(trunk.alignment.params.get(name, ("", ""))[1])
        for run, twin in zip(labels.fields, () if other is None else other.fields, strict=False):
            here, there = first.layout(run), second.layout(twin)
            for space in here.space[here.space >= 0].unique().tolist():
                mine = (here.space == space) & (there.space == space)
                mates[space][there.feature[mine]] = here.feature[mine]
    return mates

"""The weights downstream of a space: parameters that sum over its features, in the trunk and right behind it in the
heads.

It is what matching needs to know about the importance of features: a feature that no weight reads may be lost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..analysis.spaces import Layout
from ..partition.alignment import attribute
from ..partition.region import Trunk


def downstream_weights(trunk: Trunk, reach: Sequence[Tensor]) -> list[tuple[tuple[Tensor, ...], ...]]:
    """For each space and each model k the weights that sum over it, [outputs, taps, n_k] each.

    Taps are all places at which a feature is read: those of a kernel, and those that were flattened. Grouped kernels
    are left out: their features are tied in blocks, which are matched as they are.

    Args:
        trunk: what is shared.
        reach: for each model, label of a head -> the trunk's label that it is the same feature as, see `ZipPlan`.
    """
    found = [_of_model(trunk, k, own) for k, own in enumerate(reach)]
    return [tuple(tuple(own[space]) for own in found) for space in range(len(trunk.spaces[0].spaces))]


def _of_model(trunk: Trunk, k: int, reach: Tensor) -> dict[int, list[Tensor]]:
    """Downstream weights of model k by its spaces."""
    spaces, labelling = trunk.spaces[k], trunk.labellings[k]
    module = trunk.alignment.programs[k].module
    summed = torch.zeros(len(spaces.klass), dtype=torch.bool, device="cpu")
    for stated in labelling.constraints.values():
        for contracted in stated.consumed:
            summed[contracted] = True
    result: dict[int, list[Tensor]] = defaultdict(list)
    for name, labels in labelling.params.items():
        if labels.groups > 1:
            continue
        for axis, flat in labels.runs():
            if not bool(summed[flat].any()):
                continue
            layout = spaces.layout(torch.where(reach[flat] > 0, reach[flat], flat))
            weight: Tensor | None = None
            for space in layout.space[layout.space >= 0].unique().tolist():
                if weight is None:
                    value = labels.kernel(attribute(module, name).detach()).movedim(axis, -1)
                    weight = value.reshape(len(value), -1, value.shape[-1]) if value.ndim > 1 else value[None, None]
                result[space].append(_features(weight, layout, space, spaces.spaces[space].size))
    return result


def _features(weight: Tensor, layout: Layout, space: int, size: int) -> Tensor:
    """Columns of a weight [outputs, taps, columns] as [outputs, taps, features]; features that the run does not hold
    are read with 0."""
    here = (layout.space == space).nonzero().flatten()
    occurrence, feature = layout.occurrence[here], layout.feature[here]
    if len(here) == weight.shape[-1] == size and torch.equal(feature, torch.arange(size, device="cpu")):
        return weight
    result = weight.new_zeros(len(weight), int(occurrence.max()) + 1, weight.shape[1], size)
    for number, own in enumerate(result.unbind(1)):
        mine = occurrence == number
        own[:, :, feature[mine].to(weight.device)] = weight[:, :, here[mine].to(weight.device)]
    return result.flatten(1, 2)

"""What the merged features should be: the outputs of the originals, merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...analysis.rules import varying
from ...analysis.spaces import Layout, slots
from ...rewriting.merged_parameters import merged_layout
from ...rewriting.zip_plan import ZipPlan
from ..linear_calls.counterparts import labels_at


@dataclass(frozen=True, eq=False)
class TargetMerging:
    """Merging of the originals' outputs: matrices[source][model] is [m, n_k], features along `axes`, as one run.

    `layouts`: for each model the space and the feature at every place of its run.
    """

    axes: tuple[int, ...]
    matrices: tuple[tuple[Tensor, ...], ...]
    layouts: tuple[Layout, ...]

    @property
    def size(self) -> int:
        """The number of merged features, m."""
        return len(self.matrices[0][0])

    def merged(self, source: int, features: Sequence[Tensor]) -> Tensor:
        """Σ_k M_k y_k, [places, n], from the features y_k of each model, [places, n_k], on a batch of the given
        source."""
        parts = [own @ matrix.to(own).T for own, matrix in zip(features, self.matrices[source], strict=True)]
        return sum(parts[1:], start=parts[0])


def find_merging(plan: ZipPlan, places: Sequence[tuple[str, int | None]], sources: int) -> TargetMerging | None:
    """The merging at a trunk node, or at the result of one of its ATen calls.

    `places` are node and call of every model.

    None where the features do not lie in one order, along one axis or several; at calls, along the last of axes that
    may be of another number in each model.

    With several sources of data, one per model, a cluster's target on the data of model k is the mean of its members
    in model k, where it has any: on its own domain a model knows best.
    """
    trunk = plan.trunk
    fields = [labels_at(label, *place) for label, place in zip(trunk.labellings, places, strict=True)]
    axes = [tuple(sorted(varying(own[0]))) if len(own) == 1 else () for own in fields]
    last = all(len(own) == 1 and found == (own[0].ndim - 1,) for own, found in zip(fields, axes, strict=True))
    if not axes[0] or (any(own != axes[0] for own in axes) and not last):
        return None
    layouts = [trunk.spaces[k].layout(f[0]) for k, f in enumerate(fields)]
    if not bool((layouts[0].space >= 0).all()):
        return None
    merged = merged_layout(trunk.spaces[0], fields[0][0], plan.merges)
    models, device = range(len(layouts)), trunk.alignment.programs[0].call.device
    matrices = [
        tuple(
            _merge_matrix(plan, merged, layouts, k, source if sources == len(models) else None).to(device)
            for k in models
        )
        for source in range(sources)
    ]
    return TargetMerging(axes[0], tuple(matrices), tuple(layouts))


def _merge_matrix(plan: ZipPlan, merged: Layout, layouts: Sequence[Layout], k: int, source: int | None) -> Tensor:
    """M_k over the places of a run; with a source, restricted to that model's members of each cluster."""
    result = torch.zeros(len(merged.space), len(layouts[k].space), device="cpu")
    for space in merged.space.unique().tolist():
        merge = plan.merges[space]
        matrix = merge.M(k)
        if source is not None:
            share = merge.M(source).sum(1)
            lone = share <= 1e-12
            mine = matrix / share.clamp(min=1e-12)[:, None] if k == source else torch.zeros_like(matrix)
            matrix = torch.where(lone[:, None], matrix, mine)
        rows, columns = slots(merged, space), slots(layouts[k], space)
        for row, column in zip(rows, columns, strict=True):
            result[row[:, None], column[None, :]] = matrix.to(result)
    return result

"""A change of basis applied to parameters: W* = Σ_k M_k · W_k · U_k.

Axes that write features take the merge matrix M_k, axes that are summed over against activations take the unmerge
matrix U_k. M has the mean over a cluster in its rows, so biases, and scales that sit on the diagonal, are averaged over
the members by the same formula. Where no axis of a parameter is written (a scalar), the models are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .analysis.labelling import ParamLabels
from .analysis.relabel import group_run
from .analysis.spaces import FeatureSpaces, Layout, slots
from .matching import Merge

Merges = Mapping[int, Merge]  # by space number of model 0


def change_axis(
    value: Tensor, axis: int, own: Layout, target: Layout, matrices: Mapping[int, Tensor], partners: Sequence[int]
) -> Tensor:
    """Apply a matrix per space along one axis: places of `own` (model k) become places of `target` (model 0).

    `matrices[s]` is [m, n_k], for the space s of model 0, which is `partners[s]` of model k. Places in no space, and
    spaces without a matrix, are carried over by position.
    """
    value = value.movedim(axis, 0)
    result = value.new_zeros(len(target.space), *value.shape[1:])
    rest_own = ~torch.isin(own.space, torch.tensor([partners[s] for s in matrices], dtype=torch.int64))
    rest_target = ~torch.isin(target.space, torch.tensor(list(matrices), dtype=torch.int64))
    result[rest_target] = value[rest_own]
    for space, matrix in matrices.items():
        if not bool((target.space == space).any()):
            continue
        source, sink = slots(own, partners[space]), slots(target, space)
        part = value[source.to(value.device)]
        moved = torch.tensordot(matrix.to(part), part, dims=([1], [1]))  # [m, occurrences, ...]
        result[sink.T.to(value.device)] = moved
    return result.movedim(0, axis)


Matrix = Callable[[int, bool], Tensor]  # (space, consumed) -> [m, n_k]


def change_param(
    value: Tensor, labels: ParamLabels, target: ParamLabels, name: str, target_name: str, own: FeatureSpaces,
    first: FeatureSpaces, partners: Sequence[int], merges: Merges, k: int, only: set[int] | None = None,
) -> tuple[Tensor, bool]:  # fmt: skip
    """One model's share of a merged parameter, in model 0's layout, and whether an axis was written (by M)."""
    runs = _runs(labels, value)
    target_runs = _runs(target, value)
    if labels.groups > 1:
        value = _dense(value, labels.groups)
    written = False
    for place, (axis, run) in enumerate(runs):
        consumed = (target_name, place) in first.consumed
        layout, target_layout = own.layout(run), first.layout(target_runs[place][1])
        spaces = {int(s) for s in target_layout.space.unique() if s >= 0 and int(s) in merges}
        if only is not None:
            spaces &= only
        matrices = {s: merges[s].U(k).T if consumed else merges[s].M(k) for s in sorted(spaces)}
        written |= bool(spaces) and not consumed
        value = change_axis(value, axis, layout, target_layout, matrices, partners)
    if labels.groups > 1:
        value = _grouped(value, labels.groups)
    return value, written


def _runs(labels: ParamLabels, value: Tensor) -> list[tuple[int, Tensor]]:
    """(axis, labels along it) for each field; a grouped kernel is seen in its dense form."""
    if labels.groups > 1:
        return [(0, labels.fields[0].reshape(-1)), (1, group_run(labels))]
    result = []
    for run in labels.fields:
        axes = [a for a, n in enumerate(run.shape) if n > 1]
        result.append((axes[0], run.reshape(-1)))
    return result


def _dense(value: Tensor, groups: int) -> Tensor:
    """A grouped kernel [rows, columns, ...] as a dense one [rows, groups · columns, ...], zero between groups."""
    rows, columns = value.shape[:2]
    result = value.new_zeros(groups, rows // groups, groups, columns, *value.shape[2:])
    index = torch.arange(groups)
    result[index, :, index] = value.reshape(groups, rows // groups, columns, *value.shape[2:])
    return result.reshape(rows, groups * columns, *value.shape[2:])


def _grouped(value: Tensor, groups: int) -> Tensor:
    """The blocks on the diagonal of a dense kernel: inverse of `_dense`."""
    rows, columns = value.shape[0] // groups, value.shape[1] // groups
    blocks = value.reshape(groups, rows, groups, columns, *value.shape[2:])
    index = torch.arange(groups)
    return blocks[index, :, index].reshape(groups * rows, columns, *value.shape[2:])


def merged_param(
    names: Sequence[str], values: Sequence[Tensor], spaces: Sequence[FeatureSpaces], partners: Sequence[Sequence[int]],
    merges: Merges,
) -> Tensor:  # fmt: skip
    """W* = Σ_k M_k W_k U_k for one parameter of the trunk (`names[k]` in model k), in float64, model 0's layout."""
    target = spaces[0].labelling.params.get(names[0])
    if target is None:
        return torch.stack([v.double() for v in values]).mean(0)
    total: Tensor | None = None
    written = False
    for k, value in enumerate(values):
        labels = spaces[k].labelling.params[names[k]]
        share, written = change_param(
            value.double(), labels, target, names[k], names[0], spaces[k], spaces[0], partners[k], merges, k
        )
        total = share if total is None else total + share
    assert total is not None
    return total if written else total / len(values)

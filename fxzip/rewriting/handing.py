"""How a value of the trunk becomes what a head's own network has there: x_k = U_k x*, along every labelled axis.

A field over some axes is one run of places, and U_k of the spaces on it a matrix from the merged places to those of
model k. Fields over different axes are brought back one after another. Fields that share an axis are not independent:
where the state of a linear attention [heads, keys, values] has one field over (heads, keys) and one over (heads,
values), both move the heads. There a place is looked up by what all its fields say together.

Blocks that no parameter holds (the heads along the scores of an attention) move as the features in them do.

Where the first axis holds the batch as well, features are a pattern that is repeated, or of which every place is: the
axis is split, so that the graph stays right for other batch sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..analysis.resizing import resized
from ..analysis.rules import AxisLabels, varying
from ..analysis.rules.axis_labels import occurrences
from ..analysis.spaces import Layout
from ..errors import CutError
from ..matching.merge import gather_index
from .merged_parameters import PlaceMap
from .zip_plan import ZipPlan

Split = tuple[int, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Step:
    """One change of places: `table` is a gather index or a matrix over the run made of `axes`, `sizes` what these are
    then. `split`: an axis and the sizes into which it is split before, to be joined again behind; None: none is."""

    table: Tensor
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    split: Split | None = None


@dataclass(frozen=True, eq=False)
class _Run:
    """One field of a value, in model k and in the trunk, over the same axes; sizes of these in both."""

    axes: tuple[int, ...]
    own: Layout
    merged: Layout
    own_sizes: tuple[int, ...]
    merged_sizes: tuple[int, ...]


def steps(plan: ZipPlan, k: int, name: str, first: str) -> list[Step]:
    """What has to be done to a value of the trunk so that head k finds its own features; nothing if it does already.

    In: the merges, and what is folded into the head; the node in model k, and in model 0.

    Raises:
        CutError: a merge is no gather where fields share an axis, or features lie among the batch without a pattern.
    """
    trunk = plan.trunk
    fields = tuple(
        trunk.labellings[i].fields_after(node, set(trunk.names(i).values())) for i, node in ((k, name), (0, first))
    )
    matrices, copies = _matrices(plan, k), _matrices(plan, k, copied=True)
    if not any(_moves(trunk.spaces[k].layout_with_blocks(labels), matrices) for labels in fields[0]):
        return []
    varied = {axis for own in fields for labels in own for axis in varying(labels)}
    batch = sorted(varied & {*trunk.alignment.programs[k].batch_axes.get(name, ())})
    split = _split(fields, batch[0], name) if batch else None
    if split is not None:
        fields = tuple(tuple(_apart(labels, split) for labels in own) for own in fields)
    runs = [_run(plan, k, own, first) for own, first in zip(*fields, strict=True)]
    found = []
    for group in _sharing_axes([run for run in runs if _moves(run.own, matrices)], runs):
        step = _alone(group[0], matrices) if len(group) == 1 else _together(group, copies, name)
        if step is not None:
            found.append(Step(step.table, step.axes, step.sizes, split))
    return found


def _split(fields: Sequence[AxisLabels], axis: int, name: str) -> Split:
    """How an axis that holds the batch too is to be split so that no field varies with the batch; -1 for its size."""
    runs = [
        labels.movedim(axis, -1).reshape(-1, labels.shape[axis])
        for own in fields
        for labels in own
        if axis in varying(labels)
    ]
    length = runs[0].shape[1]
    for inner in (n for n in range(1, length) if length % n == 0):
        if all(bool((run.unflatten(1, (-1, inner)) == run[:, None, :inner]).all()) for run in runs):
            return axis, (-1, inner)
        if all(bool((run.unflatten(1, (inner, -1)) == run.unflatten(1, (inner, -1))[..., :1]).all()) for run in runs):
            return axis, (inner, -1)
    raise CutError(
        f"Features that are handed to a head may not depend on the place in the batch; those of node `{name}` lie "
        f"along axis {axis} in no pattern that another batch would continue. Choose another cut with `until`."
    )


def _apart(labels: Tensor, split: Split) -> Tensor:
    """A field with an axis split in two, the same along that of the batch."""
    axis, sizes = split
    if labels.shape[axis] == 1:
        return labels.unsqueeze(axis)
    parts: Tensor = labels.unflatten(axis, sizes)
    return parts.narrow(axis + sizes.index(-1), 0, 1)


def _run(plan: ZipPlan, k: int, own: Tensor, first: Tensor) -> _Run:
    axes = tuple(sorted(varying(own) | varying(first)))
    spaces = plan.trunk.spaces[0]
    layout = spaces.layout_with_blocks(first)
    here = [int(s) for s in layout.space.unique() if int(s) in plan.merges]
    sizes = {s: plan.merges[s].size for s in here if plan.merges[s].size != spaces.spaces[s].size}
    merged = resized(layout, sizes)
    shape = tuple(first.shape[a] for a in axes)
    if len(merged.space) != math.prod(shape):
        shape = (len(merged.space),) if len(axes) == 1 else shape
    return _Run(axes, plan.trunk.spaces[k].layout_with_blocks(own), merged, tuple(own.shape[a] for a in axes), shape)


def _matrices(plan: ZipPlan, k: int, *, copied: bool = False) -> dict[tuple[int, int], Tensor]:
    """(space of model 0, space of model k) -> U_k, of what is not folded into the head; blocks included. `copied`: that
    of the merge, where the head reads better what a regression gives."""
    trunk = plan.trunk
    result = {
        (s, s): plan.merges[s].U(k) if copied else plan.U(s, k)
        for s in range(len(trunk.spaces[0].spaces))
        if s not in plan.folded[k]
    }
    for s, space in enumerate(trunk.spaces[0].spaces):
        twin = trunk.spaces[k].spaces[s]
        if space.tie is not None and twin.tie is not None and space.blocks is not None and twin.blocks is not None:
            pair = (len(trunk.spaces[0].spaces) + space.tie,) * 2
            result.setdefault(pair, _of_blocks(plan.merges[s].U(k), twin.blocks, space.blocks))
    return result


def _of_blocks(unmerge: Tensor, own: Tensor, merged: Tensor) -> Tensor:
    """Which merged block every block of a model is, as a 0/1 matrix. Blocks are rows of feature numbers."""
    weight = torch.stack([unmerge[:, block].abs().sum(1) for block in merged.to(unmerge.device)], 1)
    weight = torch.stack([weight[block].sum(0) for block in own.to(unmerge.device)])
    return (weight > 0).to(unmerge.dtype)


def _moves(layout: Layout, matrices: Mapping[tuple[int, int], Tensor]) -> bool:
    here = set(layout.space.unique().tolist())
    return any(own in here for _, own in matrices)


def _sharing_axes(moving: Sequence[_Run], runs: Sequence[_Run]) -> list[list[_Run]]:
    """Runs that lie along common axes, together with those that do not move but lie along the same axes."""
    groups: list[list[_Run]] = []
    for run in runs:
        touching = [group for group in groups if any(set(run.axes) & set(other.axes) for other in group)]
        groups = [group for group in groups if group not in touching] + [[*(r for g in touching for r in g), run]]
    return [group for group in groups if any(run in moving for run in group)]


def _alone(run: _Run, matrices: Mapping[tuple[int, int], Tensor]) -> Step | None:
    """The step for a field that shares no axis with another; None if nothing moves."""
    here = set(run.own.space.unique().tolist())
    places = PlaceMap.between(run.merged, run.own, {pair: m for pair, m in matrices.items() if pair[1] in here})
    index = places.gather
    if index is None:
        return Step(places.matrix.float(), run.axes, run.own_sizes)
    if index.equal(index.new_tensor(range(places.width))):
        return None
    return Step(index, run.axes, run.own_sizes)


def _together(group: Sequence[_Run], matrices: Mapping[tuple[int, int], Tensor], name: str) -> Step | None:
    """The step for fields that share axes: every place takes what lies where all fields say the same."""
    axes = tuple(sorted({axis for run in group for axis in run.axes}))
    sizes = {axis: size for run in group for axis, size in zip(run.axes, run.own_sizes, strict=True)}
    merged = {axis: size for run in group for axis, size in zip(run.axes, run.merged_sizes, strict=True)}
    sources, wanted, own = [], [], []
    for run in group:
        origin, target, mine = _codes(run, matrices, name)
        sources.append(_spread(origin, run.axes, merged))
        wanted.append(_spread(target, run.axes, sizes))
        own.append(_spread(mine, run.axes, sizes))
    numbers = torch.cat([torch.stack(sources), torch.stack(wanted)], 1).unique(dim=1, return_inverse=True)[1]
    origin, target = numbers[: sources[0].numel()], numbers[sources[0].numel() :]
    mine = torch.stack(own).unique(dim=1, return_inverse=True)[1]
    times, again = occurrences(origin), occurrences(mine)
    base = int(max(times.max(), again.max())) + 1
    keys, order = (origin * base + times).sort()
    place = torch.searchsorted(keys, target * base + again).clamp(max=len(keys) - 1)
    if not torch.equal(keys[place], target * base + again):
        raise CutError(_entangled(name))
    index = order[place]
    if sizes == merged and index.equal(torch.arange(len(index), device="cpu")):
        return None
    return Step(index, axes, tuple(sizes[a] for a in axes))


def _codes(run: _Run, matrices: Mapping[tuple[int, int], Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of what lies at the merged places, of what the own places want, and of what lies at these.

    Features that need not be brought back are wanted as they are: another field may move them along the axis. What is
    no feature stays where it is, in its order.
    """
    here = set(run.own.space.unique().tolist())
    pairs = [pair for pair in matrices if pair[1] in here]
    origin, target, mine = (torch.full_like(own, -1) for own in (run.merged.space, run.own.space, run.own.space))
    start = 0
    for pair in pairs:
        matrix = matrices[pair].cpu()
        taken = gather_index(matrix)
        if taken is None:
            raise CutError(_entangled(name))
        there, own = run.merged.space == pair[0], run.own.space == pair[1]
        origin[there] = start + run.merged.feature[there]
        target[own] = start + taken[run.own.feature[own]]
        mine[own] = start + run.own.feature[own]
        start += max(matrix.shape)
    features = 1 + max(int(layout.feature.max()) for layout in (run.merged, run.own))
    spaces = 1 + max(int(layout.space.max()) for layout in (run.merged, run.own))
    for code, layout in ((origin, run.merged), (target, run.own), (mine, run.own)):
        kept = (code < 0) & (layout.space >= 0)
        code[kept] = start + layout.space[kept] * features + layout.feature[kept]
        rest = code < 0
        code[rest] = start + spaces * features + torch.arange(int(rest.sum()), device="cpu")
    return origin, target, mine


def _spread(codes: Tensor, axes: tuple[int, ...], sizes: Mapping[int, int]) -> Tensor:
    """Codes along a run, for every place along all axes."""
    every = sorted(sizes)
    return codes.reshape([sizes[a] if a in axes else 1 for a in every]).expand([sizes[a] for a in every]).flatten()


def _entangled(name: str) -> str:
    return (
        "Features that are handed to a head must be found in their places; at node "
        f"`{name}` several lie along one axis, and this merge mixes them. Choose an earlier or later cut with `until`, "
        'or a method that pairs or clusters features, such as "zip" or "permute".'
    )

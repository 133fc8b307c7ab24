"""Relabel a network at random within the legality.

A relabelling moves the element with labels (l, l', ...) to the place of (π l, π l', ...). If the analysis is right the
network computes the same function afterwards; `checking` makes the self-check of that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .labelling import ParamLabels
from .spaces import FeatureSpaces, Layout


def _shuffle(size: int, generator: torch.Generator) -> Tensor:
    """A random permutation, never the identity if there is another."""
    perm = torch.randperm(size, generator=generator)
    return perm.roll(1) if bool((perm == torch.arange(size)).all()) else perm


def random_relabelling(
    spaces: FeatureSpaces, generator: torch.Generator, only: Collection[int] | None = None
) -> list[Tensor]:
    """One legal permutation per space: feature f goes to the place of feature `perms[s][f]`.

    Blocks of a tie group move together, features inside a block on their own. Spaces (and tie groups) not in `only`
    stay as they are.
    """
    shuffled: dict[int, Tensor] = {}
    perms = []
    chosen = set(range(len(spaces.spaces)) if only is None else only)
    ties = {spaces.spaces[number].tie for number in chosen}
    for number, space in enumerate(spaces.spaces):
        if number not in chosen and (space.tie is None or space.tie not in ties):
            perms.append(torch.arange(space.size))
        elif space.blocks is None or space.tie is None:
            perms.append(_shuffle(space.size, generator))
        else:
            count, width = space.blocks.shape
            if space.tie not in shuffled:
                shuffled[space.tie] = _shuffle(count, generator)
            inner = torch.stack([_shuffle(width, generator) for _ in range(count)])
            perm = torch.empty(space.size, dtype=torch.int64)
            perm[space.blocks] = space.blocks[shuffled[space.tie]].gather(1, inner)
            perms.append(perm)
    return perms


def _keys(layout: Layout, feature: Tensor) -> Tensor:
    """One number per place from space, feature and occurrence; places without a feature keep their own."""
    places = torch.arange(len(feature))
    key = ((layout.space + 1) << 48) + (feature.clamp(min=0) << 24) + layout.occurrence
    return torch.where(layout.space >= 0, key, places)


def targets(layout: Layout, perms: list[Tensor]) -> Tensor:
    """Where each place of a labelled run goes, shape [places]."""
    sizes = torch.tensor([0, *(len(perm) for perm in perms)])
    table = torch.cat([torch.zeros(1, dtype=torch.int64), *perms])
    held = layout.space >= 0
    places = torch.where(held, sizes.cumsum(0)[layout.space.clamp(min=0)] + layout.feature + 1, 0)
    moved = torch.where(held, table[places], layout.feature)
    keys, order = _keys(layout, layout.feature).sort()
    return order[torch.searchsorted(keys, _keys(layout, moved))]


def group_run(labels: ParamLabels) -> Tensor:
    """The second field of a grouped kernel as one run over (group, axis 1)."""
    rows = labels.fields[1].shape[0] // labels.groups
    return labels.fields[1].reshape(labels.fields[1].shape[:2])[::rows].reshape(-1)


def dense_kernel(value: Tensor, groups: int) -> Tensor:
    """A grouped kernel [rows, columns, ...] as a dense one [rows, groups · columns, ...], zero between groups."""
    rows, columns = value.shape[:2]
    result = value.new_zeros(groups, rows // groups, groups, columns, *value.shape[2:])
    index = torch.arange(groups)
    result[index, :, index] = value.reshape(groups, rows // groups, columns, *value.shape[2:])
    return result.reshape(rows, groups * columns, *value.shape[2:])


def relabel_tensor(value: Tensor, labels: ParamLabels, spaces: FeatureSpaces, perms: list[Tensor]) -> Tensor:
    """A parameter after the relabelling."""
    if labels.groups > 1:
        rows, columns = value.shape[0] // labels.groups, value.shape[1]
        first = targets(spaces.layout(labels.fields[0]), perms)
        second = targets(spaces.layout(group_run(labels)), perms).reshape(labels.groups, columns) % columns
        result = torch.empty_like(value)
        own = second.repeat_interleave(rows, 0)
        result[first[:, None], own] = value
        return result
    for run in labels.fields:
        axis = next(a for a, n in enumerate(run.shape) if n > 1)
        source = torch.argsort(targets(spaces.layout(run), perms))
        if bool((source != torch.arange(len(source))).any()):
            value = value.index_select(axis, source.to(value.device))
    return value


def relabelled(values: Mapping[str, Tensor], spaces: FeatureSpaces, perms: list[Tensor]) -> dict[str, Tensor]:
    """All parameters and buffers in `values` (by name) after the relabelling."""
    params = spaces.labelling.params
    return {k: relabel_tensor(v, params[k], spaces, perms) if k in params else v for k, v in values.items()}

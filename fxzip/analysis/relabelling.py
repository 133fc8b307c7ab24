"""Relabel a network at random within the legality.

A relabelling moves the element with labels (l, l', ...) to the place of (π l, π l', ...). If the analysis is right the
network computes the same function afterwards; `checking` makes the self-check of that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .labelling import ParamLabels
from .rules.axis_labels import occurrences
from .solver import Ints
from .spaces import FeatureSpaces

_PART = 1 << 17  # elements


def _shuffle(size: int, generator: torch.Generator) -> Tensor:
    """A random permutation, never the identity if there is another."""
    perm = torch.randperm(size, generator=generator, device="cpu")
    return perm.roll(1) if bool((perm == torch.arange(size, device="cpu")).all()) else perm


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
            perms.append(torch.arange(space.size, device="cpu"))
        elif space.blocks is None or space.tie is None:
            perms.append(_shuffle(space.size, generator))
        else:
            count, width = space.blocks.shape
            if space.tie not in shuffled:
                shuffled[space.tie] = _shuffle(count, generator)
            inner = torch.stack([_shuffle(width, generator) for _ in range(count)])
            perm = torch.empty(space.size, dtype=torch.int64, device="cpu")
            perm[space.blocks] = space.blocks[shuffled[space.tie]].gather(1, inner)
            perms.append(perm)
    return perms


def dense_kernel(value: Tensor, groups: int) -> Tensor:
    """A grouped kernel [rows, columns, ...] as a dense one [rows, groups · columns, ...], zero between groups."""
    rows, columns = value.shape[:2]
    result = value.new_zeros(groups, rows // groups, groups, columns, *value.shape[2:])
    index = torch.arange(groups, device="cpu")
    result[index, :, index] = value.reshape(groups, rows // groups, columns, *value.shape[2:])
    return result.reshape(rows, groups * columns, *value.shape[2:])


def _origins(spaces: FeatureSpaces, perms: Sequence[Tensor]) -> Ints:
    """For each class (and, last, for what is none) the class that comes to its places, shape [classes + 1]."""
    origin = np.arange(len(spaces.space_of) + 1)
    for space, perm in zip(spaces.spaces, perms, strict=True):
        origin[space.classes[perm].numpy()] = space.classes.numpy()
    block_of = spaces.block_of.numpy()
    held = np.flatnonzero(block_of >= 0)  # a block that no parameter holds goes where its members go
    held = held[block_of[origin[held]] >= 0]
    origin[block_of[held]] = block_of[origin[held]]
    return origin


class _Runs:
    """Where the places of a run of labels get what they hold from; `origin` is that of `_origins`."""

    def __init__(self, spaces: FeatureSpaces, origin: Ints) -> None:
        self.klass, self.origin = spaces.klass.numpy(), origin
        self.place = np.empty_like(origin)

    def classes(self, run: Tensor) -> tuple[Tensor, Tensor]:
        """For each place of a run its class, and the one whose content comes there."""
        labels = run.reshape(-1).numpy()
        classes = self.klass[np.maximum(labels, 0)]
        classes[labels <= 0] = len(self.origin) - 1
        return torch.from_numpy(classes), torch.from_numpy(self.origin[classes])

    def sources(self, run: Tensor) -> Tensor | None:
        """For each place of a run the place whose content it gets; None if all stay. Shape [places]."""
        classes, wanted = (own.numpy() for own in self.classes(run))
        if np.array_equal(wanted, classes):
            return None
        places = np.arange(len(classes))
        self.place[classes] = places
        if np.array_equal(self.place[classes], places):  # each class once
            return torch.from_numpy(self.place[wanted])
        order = np.argsort(classes, kind="stable")
        ranked = classes[order]
        occurrence = np.empty_like(places)
        occurrence[order] = places - np.searchsorted(ranked, ranked)
        return torch.from_numpy(order[np.searchsorted(ranked, wanted) + occurrence])


class Movement:
    """What a relabelling does to the value of a node, by the fields that the node has.

    >>> import torch
    >>> from torch import nn
    >>> from fxzip.analysis import label, solve
    >>> from fxzip.analysis.rules import RULES
    >>> from fxzip.tracing import trace
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> labelling = label(trace(net, torch.ones(4, 2)), RULES)
    >>> shift = Movement(solve(labelling), [torch.tensor([1, 2, 0])])
    >>> shift(torch.tensor([[5.0, 6.0, 7.0]]), labelling.fields["_1"])
    tensor([[7., 5., 6.]])
    """

    def __init__(self, spaces: FeatureSpaces, perms: Sequence[Tensor]) -> None:
        self._runs = _Runs(spaces, _origins(spaces, perms))

    def __call__(self, value: Tensor, fields: Sequence[Tensor]) -> Tensor | None:
        """The value as it must be afterwards; None if its fields do not say where everything comes from."""
        moving, still = [], []
        for labels in fields:
            labels = _fitting(labels, value)
            source = self._runs.sources(labels)
            if source is None:
                still.append(labels)
                continue
            if not torch.equal(source.sort().values, torch.arange(len(source), device="cpu")):
                return None
            moving.append((labels, source.to(value.device)))

        axes = [axis for labels, _ in moving for axis in _varying(labels)]
        beside = [labels for labels in still if not set(axes).isdisjoint(_varying(labels))]
        if beside or len(set(axes)) < len(axes):
            together = [labels for labels, _ in moving] + beside
            return _gathered_jointly(value, [(labels, *self._runs.classes(labels)) for labels in together])
        for labels, source in moving:
            value = _gathered(value, source, labels)
        return value


def _fitting(labels: Tensor, value: Tensor) -> Tensor:
    """Labels of a value with fewer rows than the sample: those of the first ones."""
    return labels if labels.shape[0] in (1, value.shape[0]) else labels[: value.shape[0]]


def _gathered(value: Tensor, source: Tensor, labels: Tensor) -> Tensor:
    """The value with its places along the axes that the labels vary over taken from other places of theirs."""
    axes = _varying(labels)
    if len(axes) == 1:
        return value.index_select(axes[0], source)
    ends = list(range(value.ndim - len(axes), value.ndim))
    run = value.movedim(axes, ends)
    return run.flatten(-len(axes)).index_select(-1, source).reshape(run.shape).movedim(ends, axes)


def _gathered_jointly(value: Tensor, runs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor | None:
    """As `_gathered`, of several fields at once, some of which share an axis; None if there is no such place.

    Every place takes what lies where all fields say what they say of it; of several such places that of its number.

    Args:
        value: of a node.
        runs: labels, with the class of each of their places and that whose content comes there.
    """
    axes = sorted({axis for labels, _, _ in runs for axis in _varying(labels)})
    sizes = [value.shape[axis] for axis in axes]
    here = torch.zeros(2 * math.prod(sizes), dtype=torch.int64, device="cpu")
    for labels, own, wanted in runs:
        shape = [labels.shape[axis] for axis in axes]
        both = torch.cat([part.reshape(shape).expand(sizes).flatten() for part in (own, wanted)])
        here = (here * (int(both.max()) + 1) + both).unique(return_inverse=True)[1]

    have, want = here.chunk(2)
    (keys, order), asked = _numbered(have, len(want)).sort(), _numbered(want, len(want))
    found = torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)
    if not torch.equal(keys[found], asked):
        return None

    ends = list(range(value.ndim - len(axes), value.ndim))
    run = value.movedim(axes, ends)
    taken = run.flatten(-len(axes)).index_select(-1, order[found].to(value.device))
    return taken.reshape(run.shape).movedim(ends, axes)


def _numbered(codes: Tensor, base: int) -> Tensor:
    """Codes with the number of times that they occurred before."""
    return codes * base + occurrences(codes)


def _varying(labels: Tensor) -> list[int]:
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def relabelled(
    values: Mapping[str, Tensor],
    spaces: FeatureSpaces,
    perms: Sequence[Tensor],
    into: Mapping[str, Tensor] | None = None,
    but: Collection[tuple[str, int]] = (),
) -> dict[str, Tensor]:
    """All parameters and buffers in `values` (by name) after the relabelling.

    Those in `into` are written there, in its dtypes. Fields in `but` (parameter, number) stay as they are, so that the
    result is no relabelling.
    """
    params = spaces.labelling.params
    runs = _Runs(spaces, _origins(spaces, perms))
    result = {}
    for name, value in values.items():
        room = None if into is None else into.get(name)
        labels = params.get(name, ParamLabels(()))
        axes = {axis: runs.sources(run) for place, (axis, run) in enumerate(labels.runs()) if (name, place) not in but}
        sources = {axis: source.to(value.device) for axis, source in axes.items() if source is not None}
        if not sources:
            moved = value
        elif labels.groups > 1:
            moved = labels.natural(_grouped_kernel(labels.kernel(value), labels.groups, sources))
        elif labels.order is not None:
            kernel = labels.kernel(value)
            moved = labels.natural(_moved(kernel, sources, torch.empty_like(kernel)))
        else:
            moved = _moved(value, sources, torch.empty_like(value) if room is None else room)
        result[name] = moved if room is None or moved is room else room.copy_(moved)
    return result


def _moved(value: Tensor, sources: Mapping[int, Tensor], room: Tensor) -> Tensor:
    """`room`, filled with a tensor whose places along the axes get what is at their sources; part by part, so that
    what is in between stays in the cache."""
    length = len(value)
    step = max(_PART * length // max(value.numel(), 1), 1)
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        part = value.index_select(0, sources[0][rows]) if 0 in sources else value[rows]
        for axis, source in sources.items():
            part = part.index_select(axis, source) if axis else part
        room[rows] = part
    return room


def _grouped_kernel(value: Tensor, groups: int, sources: Mapping[int, Tensor]) -> Tensor:
    """A grouped kernel whose rows, and whose columns counted through all groups, get what is at their sources."""
    rows, columns = value.shape[0] // groups, value.shape[1]
    first = sources.get(0, torch.arange(len(value), device=value.device))
    second = sources.get(1, torch.arange(groups * columns, device=value.device))
    own = second.reshape(groups, columns).remainder(columns).repeat_interleave(rows, 0)
    return value[first[:, None], own]

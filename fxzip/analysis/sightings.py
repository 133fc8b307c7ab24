"""What a run shows at the nodes of a program, and how far that is from what it must show after a relabelling.

Outputs tell little where they are discrete, saturated or dead. The value of a node says more, and where it is wrong
says which node is: a value whose fields are f holds at the place of label l what the place of π⁻¹(l) held before. Of
large values a sample is taken, with all places along the axes that carry features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..tracing.containers import leaves
from .labelling import Labelling
from .relabelling import Movement
from .rules import AxisLabels
from .spaces import FeatureSpaces

Sightings = dict[str, Tensor]  # by node

_SAMPLE, _MOST = 1 << 14, 1 << 21  # elements of a value that are kept; those with features along so many are left out
_UNWRITTEN = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


def watched(labelling: Labelling) -> dict[str, AxisLabels]:
    """The nodes of a program whose values are looked at, with their fields.

    Left out are values without features that do not depend on the input either, those that nobody reads, and memory
    that nothing was written to.
    """
    fields = {}
    for node in labelling.program.module.graph.nodes:
        own = labelling.fields.get(node.name, ())
        name = str(getattr(node.target, "__name__", node.target))
        if node.name in labelling.unread:
            continue
        if node.op.startswith("call") and (own or node.name in labelling.dynamic) and name not in _UNWRITTEN:
            fields[node.name] = own
    return fields


class Watcher:
    """Keeps samples of the values of nodes as they are computed.

    Args:
        nodes: their names and fields.
    """

    def __init__(self, nodes: Mapping[str, AxisLabels]) -> None:
        self._nodes = nodes
        self.seen: Sightings = {}

    def __call__(self, node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor) and value.layout == torch.strided and node.name in self._nodes:
            sample = sampled(value, self._nodes[node.name])
            if sample is not None:
                self.seen[node.name] = sample
        return value


def sampled(value: Tensor, fields: Sequence[Tensor]) -> Tensor | None:
    """A copy of some of a value: all of it along the axes of its fields, evenly spread places along the others.

    None if the fields do not fit it, or say too much to keep it all.

    >>> sampled(torch.ones(2, 8, 64, 64), (torch.arange(8).reshape(1, 8, 1, 1),)).shape
    torch.Size([2, 8, 32, 32])
    """
    held = {axis for labels in fields for axis, size in enumerate(labels.shape) if size > 1}
    if any(not _fits(labels, value) for labels in fields):
        return None
    if math.prod(value.shape[axis] for axis in held) > _MOST:
        return None

    sizes, strides = list(value.shape), list(value.stride())
    free = [axis for axis in range(value.ndim) if axis not in held]

    while math.prod(sizes) > _SAMPLE and free:
        axis = max(free, key=lambda a: sizes[a])
        if sizes[axis] < 2:
            break
        sizes[axis], strides[axis] = -(-sizes[axis] // 2), 2 * strides[axis]

    return value.detach().as_strided(sizes, strides).clone()


def _fits(labels: Tensor, value: Tensor) -> bool:
    """Whether labels of a value on the sample say where features are in one of another batch size."""
    if labels.ndim != value.ndim:
        return False

    for axis, (size, own) in enumerate(zip(labels.shape, value.shape, strict=True)):
        if size in (1, own):
            continue
        if (
            axis
            or own > size
            or size % own
            or not torch.equal(labels, labels[:own].repeat(size // own, *_ones(labels)))
        ):
            return False

    return True


def _ones(labels: Tensor) -> list[int]:
    return [1] * (labels.ndim - 1)


def departures(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], labelling: Labelling, movement: Movement
) -> Iterator[tuple[str, float]]:
    """Node by node, in order, how far a value is from where the relabelling takes the expected one."""
    for name, value in expected.items():
        after = movement(value, labelling.fields.get(name, ()))
        other = found.get(name)
        same = after is not None and other is not None and other.shape == after.shape
        yield name, tensor_difference(after, other) if same else math.inf  # type: ignore[arg-type]


def unmoved(
    expected: Mapping[str, Tensor], labelling: Labelling, spaces: FeatureSpaces, movement: Movement
) -> set[int]:
    """Spaces whose features are all alike, or not finite, at some node: what is wrong there does not show there."""
    dead: set[int] = set()
    for name, value in expected.items():
        for labels in labelling.fields.get(name, ()):
            after = movement(value, (labels,))
            if after is None or after is value:
                continue
            moved = _places_moved(value, after, labels)
            here = spaces.layout(labels[: value.shape[0]] if labels.shape[0] > 1 else labels).space
            known = here[here >= 0].unique().tolist()
            dead |= {s for s in known if spaces.spaces[s].size > 1 and not bool(moved[here == s].any())}

    return dead


def _places_moved(value: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """For each place of a run of labels whether anything there moves visibly."""
    if value.dtype == torch.bool or not (value.is_floating_point() or value.is_complex()):
        gap, scale = (value != after).double(), 0.0
    else:
        finite = value.isfinite() & after.isfinite()
        gap = torch.where(finite, value - after, 0).abs()
        scale = float(torch.where(finite, value, 0).abs().max()) if value.numel() else 0.0

    ends = [axis for axis, size in enumerate(labels.shape) if size > 1]
    rest = [axis for axis in range(value.ndim) if axis not in ends]
    if not value.numel():  # rows of which a model picks none
        return torch.zeros(labels.numel(), dtype=torch.bool, device="cpu")

    largest = gap.amax(rest) if rest else gap
    return (largest > 1e-6 * scale).flatten().cpu()


def relative_difference(expected: Any, found: Any) -> float:
    """max |expected - found| / max |expected|, the worst over all tensors of two equal structures.

    inf where integers differ, or where one is not finite and the other is not the same.
    """
    pairs = zip(leaves(expected), leaves(found), strict=True)
    return max((tensor_difference(x, y) for x, y in pairs if x.numel()), default=0.0)


def tensor_difference(x: Tensor, y: Tensor) -> float:
    """As `relative_difference`, of two tensors of one shape."""
    if not x.numel():
        return 0.0
    if not (x.is_floating_point() or x.is_complex()):
        return 0.0 if torch.equal(x, y) else math.inf

    odd = ~x.isfinite()
    if bool(odd.any()):
        if not torch.equal(torch.nan_to_num(x[odd]), torch.nan_to_num(y[odd])):
            return math.inf
        x, y = torch.where(odd, 0, x), torch.where(odd, 0, y)

    scale = float(x.detach().abs().max()) or 1.0
    gap = float((x - y).detach().abs().max()) / scale
    return gap if math.isfinite(gap) else math.inf

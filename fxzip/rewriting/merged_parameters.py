"""A change of basis applied to parameters: W* = Σ_k M_k · W_k · U_k.

Axes that are summed over against activations take the unmerge matrix U_k, axes that write features the merge matrix
M_k, whose rows are means over the members of a cluster. Where several axes of one parameter are written (a position
embedding over two labelled axes) an entry is the mean over all tuples of members,

    W*[i, j] = Σ_k Σ_{a, b} M_k[i, a] M_k[j, b] W_k[a, b]  /  Σ_k Σ_{a, b} M_k[i, a] M_k[j, b],

and a place that carries no feature counts with weight 1 in each model, so with no written axis models are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..analysis.labelling import ParamLabels
from ..analysis.relabelling import dense_kernel
from ..analysis.resizing import resized
from ..analysis.spaces import FeatureSpaces, Layout, slots
from ..matching import Entries, Merge
from ..partition.alignment import same_values

Merges = Mapping[int, Merge]  # by space number of model 0


def merged_layout(first: FeatureSpaces, labels: Tensor, merges: Merges) -> Layout:
    """Where merged features sit along a run of model 0: as there, but for spaces that keep another number of them."""
    layout = first.layout(labels)
    here = [int(s) for s in layout.space.unique() if int(s) in merges]
    return resized(layout, {s: merges[s].size for s in here if merges[s].size != first.spaces[s].size})


@dataclass(frozen=True, eq=False)
class PlaceMap:
    """A sparse matrix from the places of one labelled run to those of another.

    >>> swap = PlaceMap(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.ones(2), 2, 2)
    >>> swap.gather, swap.apply(torch.tensor([[5.0, 7.0]]), axis=1)
    (tensor([1, 0]), tensor([[7., 5.]]))

    Attributes:
        rows, columns, weights: its entries; row = place in the result, column = place in the source.
        height, width: places of the result and of the source.
    """

    rows: Tensor
    columns: Tensor
    weights: Tensor
    height: int
    width: int

    @classmethod
    def between(cls, source: Layout, result: Layout, matrices: Mapping[tuple[int, int], Tensor | Entries]) -> PlaceMap:
        """From `matrices[space of the source, space of the result]`, each [features there, features here].

        Places in no such space are carried over by position.
        """
        here = [source.space == space for space, _ in matrices]
        there = [result.space == space for _, space in matrices]
        rest = [~torch.stack(held).any(0) if held else torch.ones(len(layout.space), dtype=torch.bool, device="cpu")
                for held, layout in ((here, source), (there, result))]  # fmt: skip
        columns, rows = ([mask.nonzero().flatten()] for mask in rest)
        weights = [torch.ones(len(rows[0]), dtype=torch.float64, device="cpu")]
        for (own, other), matrix in matrices.items():
            origin, sink = slots(source, own), slots(result, other)
            held = Entries.of(matrix) if isinstance(matrix, Tensor) else matrix
            i, j, weight = (part.to(sink.device) for part in held)
            rows.append(sink[:, i].reshape(-1))
            columns.append(origin[:, j].reshape(-1))
            weights.append(weight.repeat(len(sink)))
        return cls(torch.cat(rows), torch.cat(columns), torch.cat(weights), len(result.space), len(source.space))

    @property
    def gather(self) -> Tensor | None:
        """The source of every place if each has just one, of weight 1; else None."""
        if len(self.rows) != self.height or not bool((self.weights == 1).all()):
            return None
        order = self.rows.argsort()
        in_order = torch.equal(self.rows[order], torch.arange(self.height, device="cpu"))
        return self.columns[order] if in_order else None

    @property
    def matrix(self) -> Tensor:
        """The matrix itself, dense, [height, width]."""
        return self._sparse(torch.float64, self.rows.device).to_dense()

    @property
    def totals(self) -> Tensor:
        """Sums of its rows, [height]."""
        return self.weights.new_zeros(self.height).index_add_(0, self.rows, self.weights)

    def apply(self, value: Tensor, axis: int) -> Tensor:
        """The value with the matrix applied along one axis."""
        order = self.rows.argsort()
        if len(order) == self.height and torch.equal(self.rows[order], torch.arange(self.height, device=order.device)):
            taken = value.index_select(axis, self.columns[order].to(value.device))
            weights = self.weights[order].to(value.device, value.dtype)
            ones = bool((weights == 1).all())
            return taken if ones else taken.mul_(weights.reshape([-1] + [1] * (value.ndim - axis - 1)))
        moved = value.movedim(axis, 0)
        flat = self._sparse(value.dtype, value.device) @ moved.reshape(self.width, -1)
        return flat.reshape(self.height, *moved.shape[1:]).movedim(0, axis)

    def _sparse(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        index = torch.stack([self.rows, self.columns]).to(device)
        return torch.sparse_coo_tensor(
            index, self.weights.to(device, dtype), (self.height, self.width), check_invariants=False, device=device
        )


def _grouped(value: Tensor, columns: int) -> Tensor:
    """The blocks on the diagonal of a dense kernel, so many columns in each: inverse of `dense_kernel`."""
    groups = value.shape[1] // columns
    rows = value.shape[0] // groups
    blocks = value.reshape(groups, rows, groups, columns, *value.shape[2:])
    index = torch.arange(groups, device="cpu")
    return blocks[index, :, index].reshape(groups * rows, columns, *value.shape[2:])


@dataclass(frozen=True, eq=False)
class Share:
    """One model's part of a merged parameter, in model 0's layout: Σ M W U and, by axis written, the row sums of M.

    The sums are along their axis; those of a grouped kernel's second axis, which differ from group to group, [rows,
    columns]. Both are of the parameter as a kernel.
    """

    kernel: Tensor
    weights: Mapping[int, Tensor]
    labels: ParamLabels

    @property
    def value(self) -> Tensor:
        """Σ M W U."""
        return self.labels.natural(self.kernel)

    def weight(self) -> Tensor:
        """The denominator's part, in a shape that broadcasts against `value`."""
        result = self.kernel.new_ones([1] * self.kernel.ndim)
        for axis, sums in self.weights.items():
            ends = [1] * (self.kernel.ndim - axis - 1)
            result = result * sums.to(result).reshape([*([1] * axis if sums.ndim == 1 else sums.shape[:-1]), -1, *ends])
        return result if self.labels.order is None else self.labels.natural(result.expand(self.kernel.shape))


@dataclass(frozen=True, eq=False)
class Change:
    """How the features of a model become merged ones.

    Attributes:
        own, first: the spaces of the model, and of model 0.
        merges: by space of model 0.
        k: the model's number in them.
    """

    own: FeatureSpaces
    first: FeatureSpaces
    merges: Merges
    k: int


def share(value: Tensor, name: str, target_name: str, change: Change) -> Share:
    """A model's part of the merged parameter `target_name` of model 0, of its own one called `name`."""
    own, first, merges, k = change.own, change.first, change.merges, change.k
    labels, target = own.labelling.params[name], first.labelling.params[target_name]
    value = labels.kernel(value)
    value = dense_kernel(value, labels.groups) if labels.groups > 1 else value
    weights: dict[int, Tensor] = {}
    for place, ((axis, run), (_, other)) in enumerate(zip(labels.runs(), target.runs(), strict=True)):
        consumed = (target_name, place) in first.consumed
        layout, wanted = own.layout(run), merged_layout(first, other, merges)
        spaces = [int(s) for s in wanted.space.unique() if int(s) in merges]
        matrices = {(s, s): merges[s].entries[1][k].T if consumed else merges[s].entries[0][k] for s in spaces}
        if matrices:
            places = PlaceMap.between(layout, wanted, matrices)
            value = places.apply(value, axis)
            if not consumed:
                weights[axis] = places.totals
    if labels.groups > 1:
        value = _grouped(value, len(target.runs()[1][1]) // target.groups)
        if 1 in weights:  # a transposed one
            groups = len(weights[1]) // value.shape[1]
            weights[1] = weights[1].reshape(groups, -1).repeat_interleave(len(value) // groups, 0)
    return Share(value, weights, target)


def _stands(names: Sequence[str], spaces: Sequence[FeatureSpaces], merges: Merges) -> bool:
    """Whether all features along a parameter are merged by position, and lie alike in all models."""
    runs = [own.labelling.params[name].runs() for name, own in zip(names, spaces, strict=True)]
    for place, (_, run) in enumerate(runs[0]):
        first = spaces[0].layout(run)
        here = [int(s) for s in first.space.unique() if int(s) in merges]
        if not all(merges[s].by_position for s in here):
            return False
        for k, own in enumerate(spaces):
            layout = own.layout(runs[k][place][1])
            for s in here:
                if not torch.equal(slots(layout, s), slots(first, s)):
                    return False
    return True


def merged_param(
    names: Sequence[str], values: Sequence[Tensor], spaces: Sequence[FeatureSpaces], merges: Merges
) -> Tensor:
    """W* for one parameter of the trunk (`names[k]` in model k), in the merged layout, float32 or wider.

    Tensors without labels are averaged; integers are those of model 0. What all models agree in to the bit stays so
    where features are merged by position.
    """
    if not (values[0].is_floating_point() or values[0].is_complex()):
        return values[0]
    wide = [value.detach().to(torch.promote_types(value.dtype, torch.float32)) for value in values]
    if names[0] not in spaces[0].labelling.params:
        same = all(same_values(value, wide[0]) for value in wide[1:])
        return wide[0] if same else torch.stack(wide).mean(0)
    if all(same_values(value, wide[0]) for value in wide[1:]) and _stands(names, spaces, merges):
        return wide[0]  # the mean of what is equal to the bit would be rounded
    total, weight = torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
    for k, value in enumerate(wide):
        part = share(value, names[k], names[0], Change(spaces[k], spaces[0], merges, k))
        total, weight = part.value + total.to(part.value), part.weight() + weight.to(part.value)
    return total / torch.where(weight == 0, 1, weight)

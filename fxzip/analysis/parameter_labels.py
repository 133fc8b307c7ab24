"""How the features of one parameter lie: along its axes, in blocks, or along several axes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .rules import AxisLabels, ConstraintStore, varying
from .rules.axis_labels import along


@dataclass(frozen=True, eq=False)
class ParamLabels:
    """Labels of one parameter or buffer: one field per labelled axis, but where its features lie in blocks or along
    several axes at once.

    Such a parameter is seen as a kernel: that of a grouped convolution [groups · rows, columns, ...] as it is, one
    weight per head [heads, inputs, outputs] or one scale per feature of a head [heads, features] with its axes in
    another order and the first ones as one.

    Attributes:
        fields: in the parameter's own axes.
        groups: more than 1: a kernel of so many groups, whose second field varies with the group.
        order: of the axes, those first that are one in the kernel; None: it is a kernel as it is.
        joined: how many of them are one.
    """

    fields: AxisLabels
    groups: int = 1
    order: tuple[int, ...] | None = None
    joined: int = 2

    @classmethod
    def lying(cls, store: ConstraintStore, shape: Sequence[int], axes: Sequence[int]) -> ParamLabels:
        """Fresh labels of features that lie in blocks along an axis, or along several axes at once."""
        return cls.in_blocks(store, shape, axes[0]) if len(axes) == 1 else cls.at_once(store, shape, axes)

    @classmethod
    def in_blocks(cls, store: ConstraintStore, shape: Sequence[int], blocks: int) -> ParamLabels:
        """Fresh labels of features that lie in blocks along the axis `blocks`: each block has its own.

        >>> in_heads = ParamLabels.in_blocks(ConstraintStore(), [2, 3, 4], 0)
        >>> [list(field.shape) for field in in_heads.fields], in_heads.groups
        ([[2, 3, 1], [2, 1, 4]], 2)
        """
        labelled = [axis for axis, n in enumerate(shape) if n > 1 and axis != blocks]
        ends = [1] * (len(shape) - 2)
        fields = tuple(
            store.fresh(shape[blocks], shape[axis]).reshape(shape[blocks], shape[axis], *ends)
            .movedim((0, 1), (blocks, axis))
            for axis in labelled
        )  # fmt: skip
        rest = [axis for axis, n in enumerate(shape) if n == 1]
        return cls(fields, shape[blocks] if len(labelled) == 2 else 1, (blocks, *labelled, *rest))

    @classmethod
    def at_once(cls, store: ConstraintStore, shape: Sequence[int], axes: Sequence[int]) -> ParamLabels:
        """Fresh labels of features that lie along several axes, each place of these another; the other axes have their
        own.

        >>> of_heads = ParamLabels.at_once(ConstraintStore(), [2, 3, 4], [0, 2])
        >>> [list(field.shape) for field in of_heads.fields], of_heads.order
        ([[2, 1, 4], [1, 3, 1]], (0, 2, 1))
        """
        several = store.fresh(*(n if axis in axes else 1 for axis, n in enumerate(shape)))
        others = sorted(set(range(len(shape))) - set(axes), key=lambda axis: shape[axis] == 1)
        fields = (along(store.fresh(shape[axis]), axis, len(shape)) for axis in others if shape[axis] > 1)
        return cls((several, *fields), order=(*sorted(axes), *others), joined=len(axes))

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The first label of each field."""
        return tuple(int(labels.reshape(-1)[0]) for labels in self.fields)

    def kernel(self, value: Tensor) -> Tensor:
        """The parameter's value as a kernel."""
        return value if self.order is None else value.permute(self.order).flatten(0, self.joined - 1)

    def natural(self, kernel: Tensor) -> Tensor:
        """The value of the parameter, from that of the kernel; blocks may have another size by now."""
        if self.order is None:
            return kernel
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        outer = (self.fields[0].shape[axis] for axis in self.order[: self.joined - 1])
        blocks: Tensor = kernel.unflatten(0, (*outer, -1))
        return blocks.permute(back).contiguous()

    def runs(self) -> list[tuple[int, Tensor]]:
        """(axis of the kernel, labels along it) for each field; of a grouped one in its dense form."""
        if self.order is not None:
            return [(axis, field.permute(self.order).reshape(-1)) for axis, field in enumerate(self.fields)]
        if self.groups > 1:
            rows = self.fields[1].shape[0] // self.groups
            columns = self.fields[1].reshape(self.fields[1].shape[:2])[::rows].reshape(-1)
            return [(0, self.fields[0].reshape(-1)), (1, columns)]
        return [(min(varying(field)), field.reshape(-1)) for field in self.fields]

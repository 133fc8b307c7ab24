"""Tall matrices by blocks of rows, a batch each: what is summed over rows is summed in float64, block by block.

So a result depends neither on what lies in memory at a time nor on which process has a batch: the products of one block
are the same numbers everywhere, and the rounding of sums in float64 is far below that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ...calibration.processes import ExactSum, gathered, total
from .spill_file import Page, SpillFile, fetched

_WIDE = 128  # columns that are multiplied at a time


class Blocks:
    """A matrix [rows, n] by blocks, each made when it is asked for.

    >>> blocks = Blocks.of([torch.ones(2, 3), torch.ones(1, 3)])
    >>> [len(block) for block in blocks.map(lambda own: own + 1)], blocks.rows
    ([2, 1], 3)

    Attributes:
        file: where blocks that are kept lie; None: in memory.
    """

    def __init__(
        self, count: int, block: Callable[[int], Tensor], file: SpillFile | None = None,
        lengths: Callable[[], Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        """`lengths`: gives the rows of each block without making it; None: the blocks have to be made to be counted."""
        self._count, self._block, self.file = count, block, file
        self._given_lengths = lengths

    @classmethod
    def of(cls, value: Tensor | Sequence[Tensor] | Blocks, file: SpillFile | None = None) -> Blocks:
        """A matrix as it is, or by blocks that are there."""
        if isinstance(value, Blocks):
            return value
        parts = [value] if isinstance(value, Tensor) else value
        return cls(len(parts), parts.__getitem__, file, lambda: list(map(len, parts)))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        return (self._block(number) for number in range(self._count))

    def block(self, number: int) -> Tensor:
        """One of the blocks, [its rows, n]."""
        return self._block(number)

    def map(self, function: Callable[..., Tensor], *others: Blocks) -> Blocks:
        """What a function gives for each block, and the same block of other matrices, row by row; not computed yet."""
        return Blocks(self._count, self._mapped(function, others), self.file, lambda: self._lengths)

    def select(self, function: Callable[..., Tensor], *others: Blocks) -> Blocks:
        """The same where a function gives another number of rows."""
        return Blocks(self._count, self._mapped(function, others), self.file)

    def _mapped(self, function: Callable[..., Tensor], others: Sequence[Blocks]) -> Callable[[int], Tensor]:
        def block(number: int) -> Tensor:
            return function(self._block(number), *(other.block(number) for other in others))

        return block

    def stored(self) -> Blocks:
        """The same, computed once and kept: on the file, if there is one."""
        if self.file is None:
            return Blocks.of(list(self))
        pages = [Page.of(self.file, own) for own in self]
        lengths = list(map(len, pages))
        return Blocks(self._count, lambda number: fetched(pages[number]), self.file, lambda: lengths)

    @cached_property
    def _lengths(self) -> Sequence[int]:
        return [len(own) for own in self] if self._given_lengths is None else self._given_lengths()

    @cached_property
    def rows(self) -> int:
        """Of all blocks, of all processes."""
        return int(total(torch.tensor(sum(self._lengths), dtype=torch.int64, device="cpu")))

    def whole(self) -> Tensor:
        """The matrix, of all processes."""
        return gathered(torch.cat(list(self)))

    def product(self, other: Blocks, *, constant: bool = False) -> Tensor:
        """selfᵀ other, float64, of products in the blocks' own precision. `constant`: with a last column of ones."""
        sums = ExactSum(len(self))
        for own, theirs in zip(self, other, strict=True):
            part = (own.T @ theirs).double()
            sums.add(torch.cat([part, theirs.sum(0, dtype=torch.float64)[None]]) if constant else part)
        return sums.total()

    def moments(self, other: Blocks) -> tuple[Tensor, Tensor, Tensor]:
        """The sum over the rows, selfᵀ self and selfᵀ other, in float64; each block is made once."""
        sums = [ExactSum(len(self)) for _ in range(3)]
        for own, theirs in zip(self, other, strict=True):
            found = own.sum(0, dtype=torch.float64), _upper(own), (own.T @ theirs).double()
            for every, part in zip(sums, found, strict=True):
                every.add(part)
        first, gram, product = (every.total() for every in sums)
        return first, _mirrored(gram), product

    def gram(self, *, constant: bool = False) -> Tensor:
        """selfᵀ self, float64; above the diagonal only, the rest is its mirror image. `constant`: with a last column of
        ones."""
        sums = ExactSum(len(self))
        for own in self:
            part = _upper(own, constant)
            if constant:
                part[:-1, -1] = part[-1, :-1] = own.sum(0, dtype=torch.float64)
                part[-1, -1] = len(own)
            sums.add(part)
        return _mirrored(sums.total())

    def sum(self) -> Tensor:
        """Over the rows, float64 [n]."""
        sums = ExactSum(len(self))
        for own in self:
            sums.add(own.sum(0, dtype=torch.float64))
        return sums.total()

    def mean(self) -> Tensor:
        """Over the rows, float64 [n]."""
        return self.sum() / self.rows

    def centred(self) -> Blocks:
        """Less the mean."""
        mean = self.mean()
        return self.map(lambda own: own - mean.to(own))


def _upper(own: Tensor, more: int = 0) -> Tensor:
    """ownᵀ own in float64, above the diagonal only (below it in its blocks), with so many more rows and columns of
    zeros."""
    width = own.shape[1]
    part = own.new_zeros(width + more, width + more, dtype=torch.float64)
    inner = part[:width, :width]
    for start in range(0, width, _WIDE):
        inner[start : start + _WIDE, start:] = own[:, start : start + _WIDE].T @ own[:, start:]
    return part


def _mirrored(gram: Tensor) -> Tensor:
    """The same, below the diagonal the mirror image of what is above it; in place."""
    for start in range(0, len(gram), _WIDE):
        stop = start + _WIDE
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram

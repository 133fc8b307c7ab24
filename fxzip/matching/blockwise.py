"""Matching of spaces that are tied blockwise: attention heads, groups of a grouped convolution.

A tie group is a set of spaces (q, k and v of the heads, say) in which only whole blocks may change places, in all of
them alike, and features within their block. So blocks are matched first, one to one, and features inside matched
blocks. With π_k the block of model k that goes with each block of model 0, chosen to maximise over the whole group

    Σ_b Σ_spaces  value(b, π_k(b)),    value = mean similarity of the best one-to-one pairs of features of two blocks,

the merge of a space is block diagonal: merged block b holds model 0's block b and the blocks π_k(b), merged by the
method. The inner value needs an assignment problem for each pair of blocks; most are never solved. The sum of row
maxima bounds the value from above, so: solve the outer assignment with bounds, replace the bounds of the pairs
that it chose by their values, and repeat until it chooses none but values. The result is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from .assignment import best_pairs
from .merge import Merge, cluster_merge
from .moments import Moments
from .similarities import mean_similarity, similarity

if TYPE_CHECKING:
    from .method import SpaceMethod


@dataclass(frozen=True, eq=False)
class BlockMoments:
    """One space of a tie group.

    >>> from fxzip.matching.moments import moments
    >>> x = torch.randn(9, 4)
    >>> halves = torch.arange(4).view(2, 2)
    >>> BlockMoments(moments([x, x]), blocks=(halves, halves)).relabel_only
    False

    Attributes:
        moments: of all its features, K models. With `count == 0` (nothing was observed) the space has no say in how
            blocks are matched, and feature i of a block merges with feature i of the matched ones.
        blocks: for every model k the features of its blocks, int64 [n_blocks, s_k], each feature in exactly one.
        relabel_only: only permutations keep this space exact (q and k of a head).
    """

    moments: Moments
    blocks: tuple[Tensor, ...]
    relabel_only: bool = False

    def __post_init__(self) -> None:
        if len(self.blocks) != len(self.moments.sizes):
            raise InputError(
                f"`blocks` must have one entry per model; got {len(self.blocks)} for {len(self.moments.sizes)} models."
            )
        for k, (blocks, n) in enumerate(zip(self.blocks, self.moments.sizes, strict=True)):
            if not torch.equal(blocks.flatten().sort().values.cpu(), torch.arange(n, device="cpu")):
                raise InputError(
                    f"The blocks of model {k} must hold each of its {n} features exactly once; "
                    f"got {tuple(blocks.shape)} features, {len(blocks.unique())} of them different."
                )


def match_blocks(spaces: Sequence[BlockMoments], method: SpaceMethod) -> tuple[list[Merge], list[Tensor]]:
    """Match the blocks of a tie group jointly, then the features inside them.

    >>> from fxzip.matching import Permute
    >>> from fxzip.matching.moments import moments
    >>> x, halves = torch.randn(99, 4), torch.arange(4).view(2, 2)
    >>> space = BlockMoments(moments([x, x[:, [3, 2, 0, 1]]]), blocks=(halves, halves))
    >>> merges, partners = match_blocks([space], Permute())
    >>> merges[0].assignment(1), partners[1]
    (tensor([3, 2, 0, 1]), tensor([1, 0]))

    Args:
        spaces: the spaces of the group; all have the same number of blocks, in all models.
        method: for the features inside blocks; where `relabel_only`, `method.relabelling()` serves.

    Returns:
        The merges, one per space, in order: each keeps the features of model 0, in its layout, so merged block b has
        the indices `blocks[0][b]`. And for each model the block that went with each block of model 0, int64 [n_blocks].

    Raises:
        InputError: the numbers of blocks differ, or an unobserved space has blocks of different sizes.
        DataError: the moments are not finite.
    """
    counts = [[len(blocks) for blocks in space.blocks] for space in spaces]
    if len({count for row in counts for count in row}) > 1:
        raise InputError(
            "Blocks are matched one to one, so all spaces of a tie group need the same number of them in all models; "
            f"got {counts} (spaces × models)."
        )

    alike = [similarity(space.moments) if space.moments.count else None for space in spaces]
    models = range(len(spaces[0].blocks))
    partners = [torch.arange(counts[0][0], device="cpu")] + [_match_model(spaces, alike, k) for k in models[1:]]
    merges = [_merge_space(space, table, partners, method) for space, table in zip(spaces, alike, strict=True)]

    return merges, partners


def _match_model(spaces: Sequence[BlockMoments], alike: Sequence[Tensor | None], k: int) -> Tensor:
    """The block of model k that goes with each block of model 0, int64 [n_blocks]."""
    tables = [_cross(space, table, k) for space, table in zip(spaces, alike, strict=True) if table is not None]
    if not tables:
        return torch.arange(len(spaces[0].blocks[0]), device="cpu")
    return best_blocks(tables)


def best_blocks(tables: Sequence[Tensor]) -> Tensor:
    """The one-to-one pairs of blocks with the greatest total of `_value` over all tables, each [n, n, s_0, s_k].

    >>> best_blocks([torch.tensor([[0.0, 2.0], [1.0, 0.0]])[:, :, None, None]])
    tensor([1, 0])
    """
    n = len(tables[0])
    score = torch.stack([_bound(table) for table in tables]).sum(0)
    solved = torch.tensor([all(1 in (t.shape[2], t.shape[3]) for t in tables)], device="cpu").expand(n, n).clone()

    while True:
        rows, columns = best_pairs(score)
        for a, b in zip(rows.tolist(), columns.tolist(), strict=True):
            if not solved[a, b]:
                score[a, b] = sum(_value(table[a, b]) for table in tables)
        if solved[rows, columns].all():
            return columns
        solved[rows, columns] = True


def _cross(space: BlockMoments, alike: Tensor, k: int) -> Tensor:
    """Similarity of the blocks of model 0 and of model k: [n_blocks, n_blocks, s_0, s_k]."""
    first, other = space.blocks[0], space.blocks[k] + space.moments.offsets()[k]
    table = alike.cpu()  # where blocks are counted and paired
    return table[first.flatten()][:, other.flatten()].view(*first.shape, *other.shape).transpose(1, 2)


def _value(block: Tensor) -> float:
    """Mean similarity of the best one-to-one pairs of two blocks, from [s_0, s_k]."""
    return float(block[best_pairs(block)].mean())


def _bound(table: Tensor) -> Tensor:
    """An upper bound of `_value` for all pairs of blocks, [n_blocks, n_blocks]; equal where a block has one feature."""
    rows, columns = table.amax(3).mean(2), table.amax(2).mean(2)
    s_0, s_k = table.shape[2:]
    if s_0 == s_k:
        return torch.minimum(rows, columns)
    return rows if s_0 < s_k else columns


def _merge_space(space: BlockMoments, alike: Tensor | None, partners: Sequence[Tensor], method: SpaceMethod) -> Merge:
    """The merge of one space, given the partner blocks."""
    matched = [blocks[partner.to(blocks.device)] for blocks, partner in zip(space.blocks, partners, strict=True)]
    widths = [blocks.shape[1] for blocks in matched]
    if alike is None and len(set(widths)) > 1:
        raise InputError(
            "A space that was never observed can only be merged position by position, which needs blocks of one size; "
            f"got blocks of {widths} features. Pass `data` that reaches this space."
        )

    if alike is None or max(widths) == 1:
        return _merge_by_position(space, alike, matched)

    inner = method.relabelling() if space.relabel_only else method
    return _merge_inside(space, alike, matched, inner)


def _merge_by_position(space: BlockMoments, alike: Tensor | None, matched: Sequence[Tensor]) -> Merge:
    """Feature i of each block merges with feature i of its partners. Blocks of one feature leave no other choice."""
    offsets, sizes = space.moments.offsets(), space.moments.sizes
    labels = torch.empty(sum(sizes), dtype=torch.int64, device=matched[0].device)
    for blocks, offset in zip(matched, offsets[:-1], strict=True):
        labels[blocks.flatten() + offset] = matched[0].flatten()
    return cluster_merge(labels, sizes, alike)


def _merge_inside(space: BlockMoments, alike: Tensor, matched: Sequence[Tensor], method: SpaceMethod) -> Merge:
    """The block diagonal merge: `method` on each tuple of matched blocks."""
    moments = space.moments
    matched = [blocks.to(alike.device) for blocks in matched]
    offsets, widths = moments.offsets(), tuple(blocks.shape[1] for blocks in matched)
    features = torch.cat([blocks + offset for blocks, offset in zip(matched, offsets[:-1], strict=True)], dim=1)
    totals, outers = moments.total[features], moments.outer[features[:, :, None], features[:, None, :]]
    samples = [None if moments.samples is None else moments.samples[:, row] for row in features]
    marks = [None if moments.marks is None else moments.marks[row.cpu()] for row in features]
    parts = [
        method(Moments(moments.count, total, outer, widths, drawn, own), widths[0])
        for total, outer, drawn, own in zip(totals, outers, samples, marks, strict=True)
    ]
    rows, columns = matched[0][:, :, None], features[:, None, :]
    merge = alike.new_zeros(moments.sizes[0], sum(moments.sizes))
    unmerge = alike.new_zeros(sum(moments.sizes), moments.sizes[0])
    merge[rows, columns] = torch.stack([part.merge for part in parts])
    unmerge[columns.mT, rows.mT] = torch.stack([part.unmerge for part in parts])
    whole = Merge(merge, unmerge, moments.sizes, sum(part.correlation for part in parts) / len(parts))
    labels = whole.labels()

    return whole if labels is None else replace(whole, correlation=mean_similarity(labels, alike))

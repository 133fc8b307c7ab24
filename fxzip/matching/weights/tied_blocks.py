"""Matching the weights of a tie group: whole blocks change places, in all its spaces alike, and features inside them.

With the other spaces as they are, the objective of weight matching is, over the spaces g of the group,

    Σ_b [ Σ_g Σ_i T_g[b, π(b), i, ρ_g(i)]  +  Σ_products Σ_{i, j} ⟨A[b, i, j], B[π(b), ρ_r(i), ρ_c(j)]⟩ ]

T: inner products of slices that do not depend on the group otherwise; products: grouped kernels, whose rows and columns
both lie in the group. Without products the inner problem of each pair of blocks is linear, and the result exact. With
them rows and columns take turns until nothing is gained, for every pair of blocks, starting from the best under T
alone (for the pairs in use: from what they have), so the result is never worse than what was there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..assignment import best_pairs
from ..blockwise import best_blocks

_ROUNDS = 20


@dataclass(frozen=True, eq=False)
class Product:
    """A grouped kernel by blocks, [n_blocks, rows, columns, t]; rows in space `row`, columns in space `column`."""

    row: int
    column: int
    first: Tensor
    other: Tensor


@dataclass(frozen=True, eq=False)
class BlockAssignment:
    """For each block of model 0 the block of model k, [n_blocks], and by space the features inside, [n_blocks, s_0]."""

    partner: Tensor
    inner: Mapping[int, Tensor]


def match_tie(tables: Mapping[int, Tensor], products: Sequence[Product], now: BlockAssignment) -> BlockAssignment:
    """The best assignment of a tie group's blocks and of the features inside them.

    >>> tables = {0: torch.eye(4).flip(0).reshape(2, 2, 2, 2).transpose(1, 2)}
    >>> found = match_tie(tables, [], BlockAssignment(torch.arange(2), {0: torch.arange(2).expand(2, 2)}))
    >>> found.partner, found.inner[0]
    (tensor([1, 0]), tensor([[1, 0],
            [1, 0]]))

    Args:
        tables: T by space, [n_blocks, n_blocks, s_0, s_k]; not empty.
        products: of grouped kernels.
        now: the present assignment.
    """
    if not products:
        weighed = [table * min(table.shape[2:]) for table in tables.values()]
        partner = best_blocks(weighed)
        index = torch.arange(len(partner), device="cpu")
        return BlockAssignment(partner, {g: _pairs(table[index, partner]) for g, table in tables.items()})

    inner = {g: _pairs(table) for g, table in tables.items()}
    index = torch.arange(len(now.partner), device="cpu")

    for g, held in now.inner.items():
        inner[g][index, now.partner] = held

    value = _value(tables, products, inner)
    for _ in range(_ROUNDS):
        for g in tables:
            inner[g] = _pairs(tables[g] + _given(g, products, inner))
        value, before = _value(tables, products, inner), value
        if bool((value <= before + 1e-9 * before.abs()).all()):
            break

    partner = best_pairs(value)[1]
    return BlockAssignment(partner, {g: held[index, partner] for g, held in inner.items()})


def _pairs(tables: Tensor) -> Tensor:
    """The best one-to-one pairs of each table [..., s_0, s_k]: int64 [..., s_0], -1 for none."""
    flat = tables.reshape(-1, *tables.shape[-2:]).cpu().numpy()
    result = torch.full(flat.shape[:2], -1, device="cpu")
    if flat.shape[1:] == (1, 1):
        return torch.zeros_like(result).reshape(tables.shape[:-1])
    for own, table in zip(result, flat, strict=True):
        rows, columns = linear_sum_assignment(table, maximize=True)
        own[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return result.reshape(tables.shape[:-1])


def _given(space: int, products: Sequence[Product], inner: Mapping[int, Tensor]) -> Tensor:
    """What the products add to the table of a space, the other side of each being as it is."""
    total = torch.zeros((), device="cpu")
    for product in products:
        if space == product.row:
            total = total + _contracted(product.first, product.other, inner[product.column])
        if space == product.column:
            turned = product.first.transpose(1, 2), product.other.transpose(1, 2)
            total = total + _contracted(*turned, inner[product.row])
    return total


def _contracted(first: Tensor, other: Tensor, inner: Tensor) -> Tensor:
    """Σ_j ⟨first[a, i, j], other[b, l, inner[a, b, j]]⟩: [n_blocks, n_blocks, i, l], float64."""
    rows = []
    for own, index in zip(first, inner, strict=True):
        gap = (index < 0)[:, None, :, None]
        where = index.clamp(min=0)[:, None, :, None].expand(-1, other.shape[1], -1, other.shape[3])
        taken = other.gather(2, where.to(other.device)).masked_fill(gap.to(other.device), 0)
        rows.append(torch.einsum("ijt,bljt->bil", own, taken).double().cpu())
    return torch.stack(rows)


def _value(tables: Mapping[int, Tensor], products: Sequence[Product], inner: Mapping[int, Tensor]) -> Tensor:
    """The objective of each pair of blocks, [n_blocks, n_blocks]."""
    total = torch.zeros((), device="cpu")
    for g, table in tables.items():
        total = total + _picked(table, inner[g])
    for product in products:
        total = total + _picked(_contracted(product.first, product.other, inner[product.column]), inner[product.row])
    return total


def _picked(table: Tensor, inner: Tensor) -> Tensor:
    return table.gather(-1, inner.clamp(min=0)[..., None])[..., 0].masked_fill(inner < 0, 0).sum(-1)

"""Coordinate descent of weight matching: one model against a reference, space after space.

With all spaces but one as they are, the objective Σ_W ⟨R, π(W)⟩ is Σ_i C[i, π(i)], where C holds the inner products of
the slices of R and of W along that space: a linear assignment problem. The spaces of a tie group are one coordinate
(see `ties`). Where one parameter has a coordinate on two axes, the other is taken as it is, and the step is made only
if the true objective grows. So it never falls, and the descent ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..assignment import best_pairs
from ..problem import Problem, Run, Space, Weight
from .tied_blocks import BlockAssignment, Product, match_tie

Matching = dict[int, Tensor]  # space -> int64 [n_0], see `problem.Assignment`
_LEAST = 1e-6  # gain, relative to what the step is about, below which it is rounding


class Descent:
    """Model `k` on its way to a reference in model 0's layout; `steps` counts the coordinates that moved."""

    def __init__(self, problem: Problem, k: int, reference: Sequence[Tensor], start: Mapping[int, Tensor]) -> None:
        self.problem, self.k, self.reference = problem, k, reference
        self.matching: Matching = dict(start)
        self.steps = 0
        self.coordinates = problem.ties()
        self.touching = [
            [w for w, weight in enumerate(problem.weights) if not weight.spaces.isdisjoint(spaces)]
            for spaces in self.coordinates
        ]
        self.curved = [self._is_curved(c) for c in range(len(self.coordinates))]
        self.placed = [weight.aligned(k, self.matching) for weight in problem.weights]

    def _is_curved(self, c: int) -> bool:
        """Whether a parameter has spaces of this coordinate on two axes: its best assignment moves with it."""
        spaces = set(self.coordinates[c])
        weights = (self.problem.weights[w] for w in self.touching[c])
        return any(sum(not spaces.isdisjoint(run.slots) for run in weight.runs) > 1 for weight in weights)

    def objective(self) -> float:
        """Σ ⟨R, W as matched⟩."""
        return sum(_inner(r, own) for r, own in zip(self.reference, self.placed, strict=True))

    def run(self, generator: torch.Generator, sweeps: int) -> Descent:
        """Visit coordinates in random order until none gains. A visit is due when a parameter it shares has changed."""
        due = set(range(len(self.coordinates)))
        for _ in range(sweeps):
            for c in torch.randperm(len(self.coordinates), generator=generator, device="cpu").tolist():
                if c in due:
                    due.discard(c)
                    if self._step(c):
                        changed = set(self.touching[c])
                        due |= {d for d, held in enumerate(self.touching) if d != c and not changed.isdisjoint(held)}
                        due |= {c} if self.curved[c] else set()
            if not due:
                break

        return self

    def _step(self, c: int) -> bool:
        """Match one coordinate anew; keep it if the objective grows."""
        spaces, held = self.coordinates[c], self.touching[c]
        tables = {s: self._table(s, held) for s in spaces}
        products = [
            product_of(self.problem, self.problem.weights[w], self.reference[w], self.k)
            for w in held
            if self.problem.weights[w].groups > 1 and self.problem.weights[w].spaces <= set(spaces)
        ]
        found = self.matching | assigned(self.problem, spaces, tables, products, self.k, self.matching)
        if all(torch.equal(found[s], self.matching[s]) for s in spaces):
            return False

        placed: dict[int, Tensor] = {}
        if self.curved[c]:
            placed = {w: self.problem.weights[w].aligned(self.k, found) for w in held}
            after = [_inner(self.reference[w], own) for w, own in placed.items()]
            before = [_inner(self.reference[w], self.placed[w]) for w in held]
        else:
            after, before = ([_total(tables[s], held[s]) for s in spaces] for held in (found, self.matching))

        if sum(after) - sum(before) <= _LEAST * sum(map(abs, after)):
            return False

        self.matching, self.steps = found, self.steps + 1
        for w in held:
            self.placed[w] = placed[w] if placed else self.problem.weights[w].aligned(self.k, found)

        return True

    def _table(self, space: int, held: Sequence[int]) -> Tensor:
        """C [n_0, n_k]. With equal widths the parameters as they are placed serve, and C comes in their order."""
        weights, reference = [self.problem.weights[w] for w in held], [self.reference[w] for w in held]
        own, matched = self.problem.spaces[space], self.matching[space]
        if own.sizes[0] != own.sizes[self.k] or bool((matched < 0).any()):
            return table(weights, reference, space, self.k, self.matching, own)
        placed = [self.placed[w] for w in held]
        found = _summed(weights, reference, placed, space, 0, own)
        return torch.empty_like(found).index_copy_(1, matched, found)


def _inner(first: Tensor, other: Tensor) -> float:
    return float((first.double() * other).sum())


def _total(own: Tensor, matching: Tensor) -> float:
    """Σ_i C[i, π(i)]."""
    return float(own.gather(1, matching.clamp(min=0)[:, None])[:, 0].masked_fill(matching < 0, 0).sum())


def slices(value: Tensor, axis: int, slots: Tensor) -> Tensor:
    """The slice of each feature along an axis, flat: [n, occurrences · rest] from slots [occurrences, n].

    >>> slices(torch.arange(6).view(2, 3), 1, torch.tensor([[2, 0]]))
    tensor([[2, 5],
            [0, 3]])
    """
    times, n = slots.shape
    moved = value.movedim(axis, 0)
    if times == 1 and n == len(moved) and torch.equal(slots[0], torch.arange(n, device=slots.device)):
        return moved.reshape(n, -1)
    taken = moved.index_select(0, slots.reshape(-1))
    return taken.reshape(times, n, -1).transpose(0, 1).reshape(n, -1)


def table(
    weights: Sequence[Weight], reference: Sequence[Tensor], space: int, k: int, matching: Mapping[int, Tensor],
    own: Space,
) -> Tensor:  # fmt: skip
    """C [n_0, n_k] in float64, all other axes as matched; grouped kernels are left out."""
    device = reference[0].device if reference else "cpu"
    total = torch.zeros(own.sizes[0], own.sizes[k], dtype=torch.float64, device=device)
    for weight, target in zip(weights, reference, strict=True):
        for run in weight.runs if weight.groups == 1 else ():
            if space in run.slots:
                value = weight.aligned(k, matching, skip=run)
                first = slices(target, run.axis, run.slots[space][0])
                total += first @ slices(value, run.axis, run.slots[space][k]).T
    return total.cpu()


def _summed(
    weights: Sequence[Weight], reference: Sequence[Tensor], placed: Sequence[Tensor], space: int, k: int, own: Space
) -> Tensor:
    """C [n_0, n_k] of parameters that are all in the layout of model k, by one product for each run."""
    total = torch.zeros((), device="cpu")
    for weight, target, value in zip(weights, reference, placed, strict=True):
        for run in weight.runs if weight.groups == 1 else ():
            if space in run.slots:
                slots = run.slots[space]
                first, other = slices(target, run.axis, slots[0]), slices(value, run.axis, slots[k]).T
                total = first @ other if total.ndim == 0 else total.addmm_(first, other)
    return torch.zeros(own.sizes[0], own.sizes[k], device="cpu").double() if total.ndim == 0 else total.double().cpu()


def assigned(
    problem: Problem, spaces: Sequence[int], tables: Mapping[int, Tensor], products: Sequence[Product], k: int,
    now: Mapping[int, Tensor],
) -> Matching:  # fmt: skip
    """The matching of one coordinate that is best under its tables."""
    first = problem.spaces[spaces[0]]
    if first.tie is None:
        rows, columns = best_pairs(tables[spaces[0]])
        return {spaces[0]: torch.full((first.sizes[0],), -1, device="cpu").scatter_(0, rows, columns)}

    blocks = {s: (problem.spaces[s].blocks[0].cpu(), problem.spaces[s].blocks[k].cpu()) for s in spaces}
    cut = {s: tables[s][a][:, :, b].permute(0, 2, 1, 3) for s, (a, b) in blocks.items()}
    found = match_tie(cut, products, _by_blocks(blocks, now))

    result = {}
    for s, (a, b) in blocks.items():
        mine = b[found.partner].gather(1, found.inner[s].clamp(min=0))
        held = torch.full((problem.spaces[s].sizes[0],), -1, device="cpu")
        held[a] = torch.where(found.inner[s] >= 0, mine, -1)
        result[s] = held

    return result


def _by_blocks(blocks: Mapping[int, tuple[Tensor, Tensor]], now: Mapping[int, Tensor]) -> BlockAssignment:
    """A matching of a tie group as one of blocks, and of features inside."""
    inner, partner = {}, torch.zeros(0, device="cpu")
    for s, (a, b) in blocks.items():
        place = torch.empty(b.numel(), dtype=torch.int64, device="cpu")
        place[b.reshape(-1)] = torch.arange(b.numel(), device="cpu")
        held = now[s][a]
        at = place[held.clamp(min=0)]
        partner = torch.where(held >= 0, at // b.shape[1], -1).amax(1)
        inner[s] = torch.where(held >= 0, at % b.shape[1], -1)

    return BlockAssignment(partner, inner)


def product_of(problem: Problem, weight: Weight, target: Tensor, k: int) -> Product:
    """A grouped kernel by blocks of its tie group."""
    rows, columns = weight.runs
    (row,), (column,) = rows.slots, columns.slots

    def cut(value: Tensor, model: int) -> Tensor:
        up, across = (
            run.slots[space][model][0][problem.spaces[space].blocks[model].to(value.device)]
            for run, space in ((rows, row), (columns, column))
        )
        across = across % value.shape[1]
        return value.flatten(2)[up[:, :, None], across[:, None, :]] if value.ndim > 2 else (
            value[up[:, :, None], across[:, None, :]][..., None]
        )  # fmt: skip

    return Product(row, column, cut(target, 0), cut(weight.values[k], k))


def transformed(weight: Weight, k: int, matrix: Callable[[int, Run], Tensor], skip: Run | None = None) -> Tensor:
    """Model k's value in model 0's layout, mixed by `matrix(space, run)`, [n_0, n_k], on all runs but `skip`."""
    value = weight.values[k]
    for run in weight.runs:
        if run is skip:
            continue
        moved = value.movedim(run.axis, 0)
        width = run.rest[0].numel() + sum(slots[0].numel() for slots in run.slots.values())
        result = moved.new_zeros(width, *moved.shape[1:])
        result[run.rest[0]] = moved[run.rest[k]]
        for space, slots in run.slots.items():
            mixing = matrix(space, run).to(moved)
            for first, own in zip(slots[0], slots[k], strict=True):
                result[first] = (mixing @ moved[own].reshape(len(own), -1)).reshape(len(first), *moved.shape[1:])
        value = result.movedim(0, run.axis)

    return value

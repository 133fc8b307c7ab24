"""Spaces of which the data showed nothing: matched by weights, beside spaces that were matched by what was observed.

Prompts, learned queries, the inner features of W = U V: what lies between parameters alone may never be seen as
features of inputs. The slices of weights along such a space are evidence all the same, once the features on the other
axes are in the order of model 0. For each model k the unseen spaces are matched in turn, as in weight matching (see
`weights`): from sorted slices first, then with all other axes as matched, until nothing moves. Seen spaces stay
as the data say. In a tie group of which some spaces were seen, blocks stay together as these say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .activations.permute import Permute
from .merge import Merge
from .problem import Problem, Space
from .weights.descent import Matching, assigned, table
from .weights.signatures import signature_table
from .weights.weight_matching import identity, merge_of

_ROUNDS = 20


def match_unseen(problem: Problem, merges: Mapping[int, Merge]) -> dict[int, Merge]:
    """Merges of the spaces without moments.

    Args:
        problem: with weights.
        merges: of the others, as the method found them.
    """
    unseen = {s for s, space in enumerate(problem.spaces) if space.moments is None}
    weights = [weight for weight in problem.weights if not weight.spaces.isdisjoint(unseen)]
    near = {s for weight in weights for s in weight.spaces} - unseen
    seen = _relabelled(problem, near, merges)
    matchings = [identity(problem, 0)]

    for k in range(1, problem.models):
        matching = identity(problem, k) | {s: _placed(merge, k) for s, merge in seen.items()}
        matchings.append(_settled(Problem(problem.spaces, tuple(weights)), unseen, k, matching, merges))

    return {s: merge_of(problem, s, matchings) for s in sorted(unseen)}


def _relabelled(problem: Problem, near: Collection[int], merges: Mapping[int, Merge]) -> dict[int, Merge]:
    """One-to-one merges of seen spaces: those at hand, or else those of the best pairs."""
    found = {s: merges[s] for s in near if all(merges[s].bijective(k) for k in range(problem.models))}
    for spaces in problem.ties():
        if not set(spaces) & (set(near) - set(found)):
            continue
        own = Problem(tuple(problem.spaces[s] for s in spaces))
        found |= {s: merge for s, merge in zip(spaces, Permute().match(own), strict=True) if s in near}
    return found


def _placed(merge: Merge, k: int) -> Tensor:
    """The feature of model k in the place of each feature of model 0, -1 for none, int64 [n_0]."""
    first, own = merge.assignment(0), merge.assignment(k)
    assert first is not None
    assert own is not None
    holder = torch.full((merge.size,), -1, device="cpu")
    holder[own.flip(0).cpu()] = torch.arange(len(own) - 1, -1, -1, device="cpu")
    return holder[first.cpu()]


def _settled(
    problem: Problem, unseen: Collection[int], k: int, start: Matching, merges: Mapping[int, Merge]
) -> Matching:
    """The matching with the unseen spaces of model k matched by weights."""
    matching = dict(start)
    together: dict[tuple[str, int], list[int]] = defaultdict(list)
    for s in sorted(unseen):
        tie = problem.spaces[s].tie
        together["alone" if tie is None else "tie", s if tie is None else tie].append(s)
    firm = {key: _firm(problem, key[1], unseen, k, merges) for key in together if key[0] == "tie"}

    def found(key: tuple[str, int], tables: dict[int, Tensor]) -> Matching:
        partner = firm.get(key)
        if partner is not None:
            tables = {s: _held(held, problem.spaces[s], k, partner) for s, held in tables.items()}
        return assigned(problem, together[key], tables, [], k, matching)

    for key, spaces in together.items():
        matching |= found(key, {s: signature_table(problem.weights, s, k) for s in spaces})
    reference = [weight.values[0] for weight in problem.weights]
    for _ in range(_ROUNDS):
        moved = False
        for key, spaces in together.items():
            tables = {s: table(problem.weights, reference, s, k, matching, problem.spaces[s]) for s in spaces}
            better = found(key, tables)
            moved |= any(not torch.equal(own, matching[s]) for s, own in better.items())
            matching |= better
        if not moved:
            break
    return matching


def _firm(problem: Problem, tie: int, unseen: Collection[int], k: int, merges: Mapping[int, Merge]) -> Tensor | None:
    """The block of model k that goes with each block of model 0, if a seen space of the tie group says so."""
    for s, space in enumerate(problem.spaces):
        if space.tie == tie and s not in unseen:
            return _partner(space, merges[s], k)
    return None


def _partner(space: Space, merge: Merge, k: int) -> Tensor:
    first, own = space.blocks[0].cpu(), space.blocks[k].cpu()
    rows = merge.U(k).cpu().abs()[own].sum(1)  # [blocks of k, merged features]
    return rows[:, first].sum(2).argmax(0)


def _held(found: Tensor, space: Space, k: int, partner: Tensor) -> Tensor:
    """A table in which only pairs of features in blocks that go together can be chosen."""
    first, own = (torch.empty(space.sizes[model], dtype=torch.int64, device="cpu") for model in (0, k))
    first[space.blocks[0].cpu()] = partner[:, None]
    own[space.blocks[k].cpu()] = torch.arange(len(space.blocks[k]), device="cpu")[:, None]
    gap = 1.0 + float(found.abs().max())
    return found + 4 * gap * found.shape[0] * (first[:, None] == own)

"""How many features each space keeps by need, at a given cost.

Space s with m_s features kept loses the energy L_s(m_s), the geometric mean of what is lost if readers make the best of
all features that are left (`matching/energy.py`: what a refit could get in a linear network) and if they read each
feature back from its own cluster (`matching/clusterwise.py`: what they have at least). The network takes the FLOPs
C(m). Starting with all features of all models, the space that loses the least per FLOP saved gives up some, until C is
what is wanted: the greedy solution of  min Σ_s r_s L_s(m_s)  with  C(m) ≤ `max_cost` · C of the first model,  where r_s
is the number of weights that read the space, each of which sees the loss.

The heads' own spaces (`branches.py`) are among them. In the trunk a feature serves all models, but the weights of all
models read it; in a head a model's features meet that model's weights only. So an early cut with narrow heads may lose
less than a late one at the same cost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .analysis.relabel import group_run
from .branches import Alone
from .errors import CostError
from .matching import Energy
from .matching.clusterwise import cluster_losses, energies
from .matching.energy import energy_losses, reading
from .moments import Moments
from .plan import head_nodes, head_params, problem_of, reaches, unmerged_spaces
from .trunk import Trunk

Flops = Sequence[Mapping[str, int]]
Key = tuple[int, int]  # a space: number of the model whose head it is in, or TRUNK; its own number there
TRUNK = -1


def by_need(
    trunk: Trunk, statistics: Mapping[int, Moments], free: Sequence[int], max_cost: float, flops: Flops,
    alone: Sequence[Alone | None], heads: Sequence[Collection[int]],
) -> dict[Key, int]:  # fmt: skip
    """Give up features where that loses the least per FLOP saved, until the cost is right; then use what is left.

    Args:
        trunk: what is shared, with the moments of its spaces.
        free: its spaces that may have another size, by number.
        max_cost: FLOPs of the zipped network relative to the first model.
        flops: of every node of every model.
        alone: every model by itself; `heads`: of each the spaces that its head may narrow.

    Raises:
        CostError: what has to keep its size takes more than `max_cost`.
    """
    losses = _losses(TRUNK, trunk, statistics, free)
    base = {(TRUNK, s): trunk.spaces[0].spaces[s].size for s in free}
    for k, (own, narrow) in enumerate(zip(alone, heads, strict=True)):
        if own is not None:
            losses |= _losses(k, own.trunk, own.statistics, narrow)
            base |= {(k, s): own.trunk.spaces[0].spaces[s].size for s in narrow}
    costs = _Costs(trunk, flops, [None if own is None else own.trunk for own in alone], heads)
    kept = {s: len(losses[s]) - 1 for s in base}
    budget, one = max_cost * sum(flops[0].values()), sum(flops[0].values())
    total = costs.total({s: kept[s] / base[s] for s in base})

    def steps(sign: int) -> list[tuple[float, Key, int, float]]:
        """(loss per FLOP, space, its new size, new total) of all steps by a sixteenth of a space, cheapest first."""
        ratio = {s: kept[s] / base[s] for s in base}
        result = []
        for s in base:
            size = min(kept[s] + sign * math.ceil(base[s] / 16), len(losses[s]) - 1)
            if size < 1 or size == kept[s]:
                continue
            saved = costs.saved(ratio, s, size / base[s])
            if sign * saved < 0:
                result.append(((losses[s][size] - losses[s][kept[s]]) / saved, s, size, total - saved))
        return sorted(result, key=lambda step: step[0], reverse=sign > 0)

    while total > budget:
        possible = steps(-1)
        if not possible:
            raise CostError(
                f"`max_cost={max_cost}` cannot be reached: what has to keep its size takes {total / one:.2f} of the "
                "first model's FLOPs. Raise it, or choose a later cut."
            )
        _, space, kept[space], total = possible[0]
    while affordable := [step for step in steps(+1) if step[3] <= budget]:
        _, space, kept[space], total = affordable[0]
    return kept


def _losses(
    part: int, trunk: Trunk, statistics: Mapping[int, Moments], free: Iterable[int]
) -> dict[Key, npt.NDArray[np.float64]]:
    """For each space r_s L_s(m), m = 0, ..., N."""
    problem = problem_of(trunk, statistics, Energy(), reaches(trunk))
    result = {}
    for s in free:
        space = problem.spaces[s]
        assert space.moments is not None
        readers = max((len(own) for own in space.readers), default=1)
        told = energy_losses(space.moments, reading(space.moments, space.readers), Energy().floor)
        kept = cluster_losses(space.moments, energies(space.moments, space.readers), Energy().floor)
        result[part, s] = max(readers, 1) * np.sqrt(told * kept)
    return result


class _Costs:
    """FLOPs as a function of the spaces' sizes relative to what they were.

    A call with a parameter takes FLOPs in proportion to the parameter's length along each of its labelled axes; a run
    that is shared out among several spaces has the length of all of them. A head that needs features in its own basis
    takes what it takes.
    """

    def __init__(
        self, trunk: Trunk, flops: Flops, alone: Sequence[Trunk | None], heads: Sequence[Collection[int]]
    ) -> None:
        self.fixed = 0
        self._calls: list[_Scaled] = []
        self._of: dict[Key, list[int]] = defaultdict(list)
        inside = set(trunk.nodes)
        for node, cost in flops[0].items():
            if node in inside:
                self._add(cost, _lengths(trunk, 0, trunk.labellings[0].touches[node], TRUNK))
        for k, own in enumerate(flops):
            inside = set(trunk.names(k).values())
            self.fixed += sum(own[name] for name in trunk.alignment.stem(k) if name in own and name not in inside)
            reach, params = reaches(trunk)[k], head_params(trunk, k)
            given = {(TRUNK, s) for s in range(len(trunk.partners[k]))}
            given -= {(TRUNK, s) for s in unmerged_spaces(trunk, k, reach)}
            single = alone[k] if k < len(alone) else None
            given |= {(k, s) for s in heads[k]} if single is not None else set()
            for name in head_nodes(trunk, k):
                cost = own.get(name, 0)
                touched = trunk.labellings[k].touches[name] & params if cost else frozenset()
                lengths = _lengths(trunk, k, touched, TRUNK, reach)
                if single is not None:
                    mine = _lengths(single, 0, touched, k)
                    lengths = [{**shared, **more} for shared, more in zip(lengths, mine, strict=True)]
                self._add(cost, [{s: f for s, f in length.items() if s in given} for length in lengths])

    def _add(self, cost: int, lengths: Sequence[Mapping[Key, float]]) -> None:
        held = [length for length in lengths if length]
        if not cost or not held:
            self.fixed += cost
            return
        for key in {key for length in held for key in length}:
            self._of[key].append(len(self._calls))
        self._calls.append((cost, held))

    def total(self, ratio: Mapping[Key, float]) -> float:
        return self.fixed + sum(_scaled(*call, ratio) for call in self._calls)

    def saved(self, ratio: Mapping[Key, float], space: Key, less: float) -> float:
        """FLOPs saved by making one space that small."""
        after = {**ratio, space: less}
        calls = [self._calls[number] for number in self._of[space]]
        return sum(_scaled(*call, ratio) - _scaled(*call, after) for call in calls)


_Scaled = tuple[int, Sequence[Mapping[Key, float]]]  # FLOPs of a call; for each of its axes spaces with their shares


def _scaled(cost: int, lengths: Sequence[Mapping[Key, float]], ratio: Mapping[Key, float]) -> float:
    return cost * math.prod(1 + sum(f * (ratio.get(s, 1.0) - 1) for s, f in length.items()) for length in lengths)


def _lengths(
    trunk: Trunk, k: int, params: Collection[str], part: int, reach: Tensor | None = None
) -> list[dict[Key, float]]:
    """For each axis of the largest labelled parameter of a call: space -> its share of the places.

    Spaces are those of model k in `trunk`, by their numbers in model 0, as of `part`.
    """
    spaces = trunk.spaces[k]
    numbers = {own: s for s, own in enumerate(trunk.partners[k])}
    labelled = [spaces.labelling.params[name] for name in sorted(params) if name in spaces.labelling.params]
    if not labelled:
        return []
    largest = max(labelled, key=lambda own: math.prod(run.numel() for run in own.fields))
    runs = largest.fields[:1] if largest.groups > 1 and len(group_run(largest)) == largest.groups else largest.fields
    result = []
    for run in runs:
        flat = run.reshape(-1)
        layout = spaces.layout(flat if reach is None else reach[flat].clamp(min=0))
        found = {int(s): int((layout.space == s).sum()) / len(flat) for s in layout.space.unique() if s >= 0}
        result.append({(part, numbers[s]): share for s, share in found.items() if s in numbers})
    return result

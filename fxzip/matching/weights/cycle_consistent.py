"""Cycle-consistent weight matching of any number of models: C2M3.

Crisostomi et al., "C²M³: Cycle-Consistent Multi-Model Merging" (NeurIPS 2024, arXiv 2405.17897). Every model p has a
relabelling P_p of each space into a common universe, so that P_q⁻¹ P_p is consistent round every cycle, and all of them
together are to maximise Σ_{p<q} Σ_W <P_p W_p, P_q W_q>, each W moved along all its axes. Frank and Wolfe: relabellings
are relaxed to doubly stochastic matrices; from the gradient

    ∂/∂P_p = Σ_W slices(Σ_q≠p P_q W_q) · slices(W_p, other axes moved)ᵀ

the best vertex is an assignment problem for each model and space, the step towards it is searched on the line, and the
end is rounded to relabellings. All spaces move at once: the result does not depend on an order of visits, nor on
which model is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from ...errors import InputError
from ..merge import Merge
from ..method import Method
from ..problem import Evidence, Problem, Run, Weight
from .descent import Matching, assigned, slices, transformed
from .weight_matching import WeightMatching, based_on_first, begin, identity, merge_of, weighted

Relaxed = list[dict[int, Tensor]]  # by model, then space: doubly stochastic, [n, n]


@dataclass(frozen=True)
class CycleConsistent(Method):
    """C2M3: one universe that all models are relabelled to, found for all spaces at once.

    >>> import fxzip
    >>> from torch import nn
    >>> a, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 3)
    >>> zipped = fxzip.compile_zip([a, fxzip.relabel(a, x), a], x, method=CycleConsistent())
    >>> torch.allclose(zipped(x)[1], a(x), atol=1e-5)
    True

    Grouped kernels whose groups move as blocks are left out of the objective.

    Attributes:
        start: "signatures" or "identity", as for `WeightMatching`.
        steps: most steps.
        vectors: how much parameters with one axis count, as for `WeightMatching`.
    """

    name: ClassVar[str] = "c2m3"
    one_to_one: ClassVar[bool] = True
    needs: ClassVar[frozenset[Evidence]] = frozenset({"weights"})

    start: str = "signatures"
    steps: int = 50
    vectors: float = 0.01

    def __post_init__(self) -> None:
        WeightMatching(starts=(self.start,), vectors=self.vectors)  # the same names, the same errors

    def match(self, problem: Problem) -> list[Merge]:
        """A merge for every space: every model relabelled.

        Raises:
            InputError: widths differ.
        """
        if any(len(set(space.sizes)) > 1 for space in problem.spaces):
            widths = next(space.sizes for space in problem.spaces if len(set(space.sizes)) > 1)
            raise InputError(
                f"`c2m3` relabels models of equal widths; a space has {list(widths)} features. "
                'Use `method="weights"`, which matches different widths.'
            )
        matchings = self._matchings(weighted(problem, self.vectors))
        return [merge_of(problem, number, matchings) for number in range(len(problem.spaces))]

    def _matchings(self, problem: Problem) -> list[Matching]:
        weights = [weight for weight in problem.weights if weight.groups == 1]
        first = [identity(problem, 0)] + [begin(problem, k, self.start) for k in range(1, problem.models)]
        relaxed: Relaxed = [{s: _vertex(held) for s, held in own.items()} for own in first]
        value = objective(weights, relaxed)

        for _ in range(self.steps):
            slopes = gradients(problem, weights, relaxed)
            aims = [{s: _vertex(held) for s, held in _rounded(problem, own, k).items()} for k, own in enumerate(slopes)]
            moved = _searched(weights, relaxed, aims)
            now = objective(weights, moved)
            if now <= value + 1e-6 * abs(value):
                break
            relaxed, value = moved, now

        ends = [_rounded(problem, own, k) for k, own in enumerate(relaxed)]
        return [based_on_first(own, ends[0]) for own in ends]


def _vertex(matching: Tensor) -> Tensor:
    """A relabelling as a matrix: row i has its 1 at the feature that takes place i."""
    return torch.eye(len(matching), dtype=torch.float64, device="cpu")[matching]


def _rounded(problem: Problem, tables: dict[int, Tensor], k: int) -> Matching:
    """The relabelling of each space that is best under its table."""
    result = identity(problem, k)
    for spaces in problem.ties():
        result |= assigned(problem, spaces, {s: tables[s] for s in spaces}, [], k, result)
    return result


def _between(start: Relaxed, aims: Sequence[dict[int, Tensor]], step: float) -> Relaxed:
    return [
        {s: (1 - step) * own + step * aim[s] for s, own in held.items()}
        for held, aim in zip(start, aims, strict=True)
    ]  # fmt: skip


def _searched(weights: Sequence[Weight], start: Relaxed, aims: Sequence[dict[int, Tensor]]) -> Relaxed:
    """The best point found on the line to the aims, the far end included."""

    def loss(step: float) -> float:
        return -objective(weights, _between(start, aims, step))

    inside = float(minimize_scalar(loss, bounds=(0, 1), method="bounded", options={"xatol": 1e-3}).x)
    return _between(start, aims, min((inside, 1.0), key=loss))


def _looked_up(own: Mapping[int, Tensor]) -> Callable[[int, Run], Tensor]:
    return lambda space, run: own[space]


def _placed(weight: Weight, relaxed: Relaxed) -> list[Tensor]:
    return [transformed(weight, k, _looked_up(own)).double() for k, own in enumerate(relaxed)]


def objective(weights: Sequence[Weight], relaxed: Relaxed) -> float:
    """Σ over pairs of models and parameters of <P_p W_p, P_q W_q>."""
    total = 0.0
    for weight in weights:
        placed = _placed(weight, relaxed)
        total += float(torch.stack(placed).sum(0).square().sum() - sum(own.square().sum() for own in placed)) / 2
    return total


def gradients(problem: Problem, weights: Sequence[Weight], relaxed: Relaxed) -> Relaxed:
    """Derivatives of the objective by every P_p, [n, n] by model and space."""
    result: Relaxed = [
        {
            s: torch.zeros(space.sizes[0], space.sizes[k], dtype=torch.float64, device="cpu")
            for s, space in enumerate(problem.spaces)
        }
        for k in range(problem.models)
    ]
    for weight in weights:
        placed = _placed(weight, relaxed)
        joint = torch.stack(placed).sum(0)
        for k, own in enumerate(relaxed):
            for run in weight.runs:
                value = transformed(weight, k, _looked_up(own), run).double()
                for s, slots in run.slots.items():
                    others = slices(joint - placed[k], run.axis, slots[0])
                    result[k][s] += (others @ slices(value, run.axis, slots[k]).T).cpu()

    return result

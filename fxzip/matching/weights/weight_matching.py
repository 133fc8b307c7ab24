"""Weight matching: features are alike if the weights around them are. Needs no data.

Git Re-Basin (Ainsworth et al., ICLR 2023, arXiv 2209.04836), section 3.2, algorithm 1. For two models the relabelling
of all spaces together is to maximise the inner product of the parameters, Σ_W ⟨W_0, π(W_1)⟩, by coordinate descent over
the spaces (see `descent`). More models (algorithm 2, "merge many"): each in turn is matched with the mean of the
others, until none moves.

The descent stays where it starts if no single space gains, so the start matters. The slice of a feature, *sorted* along
the axes whose features may still change places, does not depend on how these are matched, and by the rearrangement
inequality the inner product of two sorted slices bounds that of the slices under any matching. Matching the sorted
slices of every space by itself, one assignment problem each, maximises this bound; for a relabelled copy it is the
answer. The paper starts from the models as they are.

Biases. What a BatchNorm adds becomes a bias when it is folded into the call in front of it, and all biases of a network
may then weigh as much in the sum as all its kernels. A space where they decide is matched by how active its features
are, not by what they look at. So parameters with one axis count `vectors` times in the sum; the paper, whose networks
have LayerNorms, counts them like all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import OptionError
from ..merge import Merge, cluster_merge
from ..method import Method
from ..problem import Evidence, Problem, Space, Weight
from .descent import Descent, Matching, assigned, table
from .signatures import signature_table

STARTS = ("signatures", "identity")


@dataclass(frozen=True)
class WeightMatching(Method):
    """Git Re-Basin's weight matching, on any graph and for any number of models.

    >>> import fxzip
    >>> from torch import nn
    >>> a, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 3)
    >>> zipped = fxzip.compile_zip(a, fxzip.relabel(a, x), x, method=WeightMatching())
    >>> torch.allclose(zipped(x)[1], a(x), atol=1e-5)
    True

    Attributes:
        seed: of the order in which spaces are visited.
        starts: where descents start: "signatures", "identity" (the models as they are, the paper's), or both; the end
            with the greatest objective is kept.
        sweeps: most visits to all spaces; the descent usually ends long before.
        vectors: how much parameters with one axis (biases, scales) count in the sum; 1: as in the paper.

    Raises:
        OptionError: no start, or an unknown one; `vectors` is not above 0.
    """

    name: ClassVar[str] = "weights"
    one_to_one: ClassVar[bool] = True
    needs: ClassVar[frozenset[Evidence]] = frozenset({"weights"})

    seed: int = 0
    starts: tuple[str, ...] = ("signatures",)
    sweeps: int = 100
    vectors: float = 0.01

    def __post_init__(self) -> None:
        if not self.vectors > 0:
            raise OptionError(
                f"`vectors` must be above 0: biases tell features apart that are alike else; got {self.vectors}."
            )
        if not self.starts or not set(self.starts) <= set(STARTS):
            raise OptionError(f"`starts` must name one or more of {', '.join(map(repr, STARTS))}; got {self.starts!r}.")

    def match(self, problem: Problem) -> list[Merge]:
        """A merge for every space: every model relabelled to fit the first."""
        matchings = match_weights(weighted(problem, self.vectors), self)
        return [merge_of(problem, number, matchings) for number in range(len(problem.spaces))]


def weighted(problem: Problem, vectors: float) -> Problem:
    """The problem with parameters of one axis scaled so that they count `vectors` times in inner products.

    >>> from fxzip.matching.problem import Run
    >>> run = Run(0, {0: (torch.arange(2)[None],) * 2}, (torch.zeros(0).long(),) * 2)
    >>> weighted(Problem((), (Weight("bias", (torch.ones(2), torch.ones(2)), (run,)),)), 0.25).weights[0].values[0]
    tensor([0.5000, 0.5000])
    """
    weights = tuple(
        replace(weight, values=tuple(value * vectors**0.5 for value in weight.values))
        if weight.values[0].ndim == 1 and vectors != 1
        else weight
        for weight in problem.weights
    )
    return replace(problem, weights=weights)


def match_weights(problem: Problem, settings: WeightMatching) -> list[Matching]:
    """For every model, by space, the feature in the place of each feature of model 0."""
    generator = torch.Generator().manual_seed(settings.seed)
    if problem.models == 2:
        reference = [weight.values[0] for weight in problem.weights]
        ends = [
            Descent(problem, 1, reference, begin(problem, 1, start)).run(generator, settings.sweeps)
            for start in settings.starts
        ]
        best = max(ends, key=lambda end: end.objective())
        return [identity(problem, 0), best.matching]

    found = [merge_many(problem, start, generator, settings.sweeps) for start in settings.starts]
    return max(found, key=lambda matchings: agreement(problem, matchings))


def identity(problem: Problem, k: int) -> Matching:
    """Feature i of model k in the place of feature i of model 0, block by block in tie groups, if there is one."""
    result = {}
    for number, space in enumerate(problem.spaces):
        n, own = space.sizes[0], space.sizes[k]
        index = torch.arange(n, device="cpu")
        if space.blocks:
            first, mine = space.blocks[0].cpu(), space.blocks[k].cpu()
            width = min(first.shape[1], mine.shape[1])
            index = torch.full((n,), -1, device="cpu")
            index[first[:, :width]] = mine[:, :width]
        result[number] = torch.where(index < own, index, -1)

    return result


def begin(problem: Problem, k: int, start: str) -> Matching:
    """Where the descent of model k begins."""
    result = identity(problem, k)
    if start == "signatures":
        for spaces in problem.ties():
            tables = {s: signature_table(problem.weights, s, k) for s in spaces}
            result |= assigned(problem, spaces, tables, [], k, result)
    return result


def merge_many(problem: Problem, start: str, generator: torch.Generator, sweeps: int) -> list[Matching]:
    """Each model in turn is matched with the mean of the others (Git Re-Basin, algorithm 2), until none moves."""
    matchings = [begin(problem, k, start) if k else identity(problem, 0) for k in range(problem.models)]
    placed = [[weight.aligned(k, own) for weight in problem.weights] for k, own in enumerate(matchings)]

    still = 0
    for _ in range(sweeps):
        for k in torch.randperm(problem.models, generator=generator, device="cpu").tolist():
            others = [own for j, own in enumerate(placed) if j != k]
            mean = [torch.stack(values).mean(0) for values in zip(*others, strict=True)]
            end = Descent(problem, k, mean, matchings[k]).run(generator, sweeps)
            still = 0 if end.steps else still + 1
            if end.steps:
                matchings[k] = end.matching
                placed[k] = [weight.aligned(k, end.matching) for weight in problem.weights]
        if still >= problem.models:
            break

    return [based_on_first(own, matchings[0]) for own in matchings]


def based_on_first(own: Mapping[int, Tensor], first: Mapping[int, Tensor]) -> Matching:
    """The matching seen from model 0, which has itself been relabelled by `first`."""
    return {space: torch.empty_like(held).scatter_(0, first[space], held) for space, held in own.items()}


def agreement(problem: Problem, matchings: Sequence[Mapping[int, Tensor]]) -> float:
    """Σ over pairs of models and over parameters of the inner product of the aligned models."""
    total = 0.0
    for weight in problem.weights:
        placed = [weight.aligned(k, own).double() for k, own in enumerate(matchings)]
        joint = torch.stack(placed).sum(0)
        total += float(joint.square().sum() - sum(value.square().sum() for value in placed)) / 2
    return total


def merge_of(problem: Problem, number: int, matchings: Sequence[Mapping[int, Tensor]]) -> Merge:
    """The merge of a space under a matching. Features of a wider model that have no place join their likest slot.

    Its `correlation` is the mean cosine of the slices of model 0's features and of those in their place.
    """
    space = problem.spaces[number]
    weights = [weight for weight in problem.weights if number in weight.spaces]
    labels, cosines = [torch.arange(space.sizes[0], device="cpu")], []

    for k, matching in enumerate(matchings[1:], 1):
        here = (matching[number] >= 0).nonzero().flatten()
        own = torch.full((space.sizes[k],), -1, device="cpu").scatter_(0, matching[number][here], here)
        rest = (own < 0).nonzero().flatten()
        if len(rest):
            own[rest] = _likest(space, weights, number, k, matching)[rest]
        labels.append(own)
        cosines.append(_cosines(space, weights, number, k, matching)[here])

    merge = cluster_merge(torch.cat(labels), space.sizes, None)
    return replace(merge, correlation=float(torch.cat(cosines).mean()))


def _cosines(space: Space, weights: Sequence[Weight], number: int, k: int, matching: Mapping[int, Tensor]) -> Tensor:
    """The cosine of the slices of each feature of model 0 and of that in its place in model k, [n_0]; 1 without any."""
    sums = torch.zeros(3, space.sizes[0], dtype=torch.float64, device="cpu")
    for weight in weights:
        first, other = weight.values[0], weight.aligned(k, matching)
        for place, run in enumerate(weight.runs):
            if number in run.slots:
                slots = run.slots[number][0]
                for total, value in zip(sums, (first * other, first.square(), other.square()), strict=True):
                    total += _along(value, weight, place)[slots].sum(0).cpu()

    size = (sums[1] * sums[2]).sqrt()
    return torch.where(size > 0, sums[0] / size.clamp(min=torch.finfo(size.dtype).tiny), (sums[1] == sums[2]).double())


def _along(value: Tensor, weight: Weight, place: int) -> Tensor:
    """Sums over all axes but that of a run, float64."""
    if weight.groups > 1 and place == 1:
        split = value.reshape(weight.groups, -1, value.shape[1], value[0, 0].numel())
        return split.sum((1, 3), dtype=torch.float64).flatten()
    moved = value.movedim(weight.runs[place].axis, 0)
    return moved.reshape(len(moved), -1).sum(1, dtype=torch.float64)


def _likest(space: Space, weights: Sequence[Weight], number: int, k: int, matching: Mapping[int, Tensor]) -> Tensor:
    """The slot of model 0 whose slice has the greatest cosine with each feature of model k, [n_k].

    In tie groups the slot lies inside the block that the feature's block went to.
    """
    alike = table(weights, [weight.values[0] for weight in weights], number, k, matching, space)
    size = torch.zeros(space.sizes[0], dtype=torch.float64, device="cpu")

    for weight in weights:
        for place, run in enumerate(weight.runs if weight.groups == 1 else ()):
            if number in run.slots:
                size += _along(weight.values[0].square(), weight, place)[run.slots[number][0]].sum(0).cpu()

    alike = alike / size.sqrt().clamp(min=torch.finfo(size.dtype).tiny)[:, None]
    if space.blocks:
        block = torch.empty(space.sizes[k], dtype=torch.int64, device="cpu")
        block[space.blocks[k].cpu()] = torch.arange(len(space.blocks[k]), device="cpu")[:, None]
        mine = torch.where(matching[number] >= 0, block[matching[number].clamp(min=0)], -1)
        home = torch.empty(space.sizes[0], dtype=torch.int64, device="cpu")
        for slots in space.blocks[0].cpu():
            home[slots] = mine[slots].amax()
        alike = alike.masked_fill(home[:, None] != block, -torch.inf)

    return alike.argmax(0)

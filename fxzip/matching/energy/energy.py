"""Clusters that lose the least energy: for a refit, which finds the best use of whatever features there are.

An output o that reads the space with weights w_o has the energy w_oᵀ C w_o, C the covariance of the features. Zipping
by correlation alone spends as many features on what nobody reads as on what everybody does, and takes a feature for
lost when no other is like it, though several together may tell what it was. Here features are standardised, z, with

    R       their correlation, with a ridge,
    G       Σ_o w_o w_oᵀ / (w_oᵀ R w_o), averaged over the outputs of a reader, summed over readers: a block per model,
            scaled so that all outputs of the model have the energy tr G R = 1.

Least squares reads an output from features y = K z as well as E‖o - B y‖² allows. Merging two of them, r and s, into
p y_r + q y_s takes the direction u = q e_r - p e_s away, and what can no longer be told of the outputs is

    lost(u)  =  uᵀ Q u / uᵀ P u,      P = cov(y)⁻¹,   Q = P cov(y, o) cov(o, y) P,      at first P = R⁻¹, Q = G.

For each pair the best p, q ≥ 0 solve a quadratic equation; p = 0 gives r up. The pair that loses the least goes first;
P and Q lose a rank each. A twentieth of what the pair would lose if nothing else told of it (see `clusterwise.py`) is
added: it decides where there are too few positions to tell what others tell. Equal features go first: `elimination.py`.
Directions with p, q of opposite signs do not count: a ReLU does not pass a feature and its negative alike. The merged
feature is the average of its members with the coefficients that this gives, so that what matters is kept as it is and
what does not lends it little. U stays the membership: coefficients are the refit's.

The pruning literature knows the criterion, for the selection of features, as reconstruction of the next layer's input
(ThiNet, arXiv 1707.06342) and as backward elimination in regression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import OptionError
from ..clusters import in_first_layout
from ..linalg import ridged_cholesky
from ..merge import Merge, cluster_merge
from ..method import Method
from ..moments import Moments
from ..problem import Evidence, Problem
from ..similarities import similarity
from .clusterwise import Floats
from .elimination import Elimination


@dataclass(frozen=True)
class Energy(Method):
    """Zipping by lost energy: within and across models, for any number of models of any widths.

    >>> from fxzip.matching.problem import Space
    >>> from fxzip.matching.moments import moments
    >>> x = torch.randn(99, 3)
    >>> [merge] = Energy().match(Problem((Space((3, 3), moments=moments([x, x[:, [2, 0, 1]]])),)))
    >>> merge.assignment(1)
    tensor([2, 0, 1])

    O(N³) time for N features in all, mostly in products of matrices; O(N²) memory.

    Attributes:
        floor: energy that every feature has on its own, relative to the mean: features that no weight reads are not
            free to be lost.
        ridge: added to the correlations: how much of a feature the others must leave unexplained to count.

    Spaces in which only relabellings are legal are matched as by `permute`.
    """

    name: ClassVar[str] = "energy"
    needs: ClassVar[frozenset[Evidence]] = frozenset({"moments", "readers"})

    floor: float = 0.01
    ridge: float = 1e-5

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise OptionError(f"`Energy` needs `ridge` > 0; got ridge={self.ridge}. The default is 1e-5.")
        if not self.floor >= 0:
            raise OptionError(f"`Energy` needs `floor` >= 0; got floor={self.floor}. The default is 0.01.")

    def match(self, problem: Problem) -> list[Merge]:
        """A merge for every space of the problem.

        Raises:
            DataError: the moments are not finite.
        """
        merges: dict[int, Merge] = {}
        for together in problem.ties():
            space = problem.spaces[together[0]]
            if space.tie is None and space.legality == "free" and space.moments is not None:
                read = reading(space.moments, space.readers)
                merges[together[0]] = energy_merge(space.moments, read, space.size, self.floor, self.ridge)
            else:
                others = Problem(tuple(problem.spaces[number] for number in together))
                merges.update(zip(together, self.relabelling().match(others), strict=True))
        return [merges[number] for number in range(len(problem.spaces))]


def reading(moments: Moments, readers: Sequence[Sequence[Tensor]]) -> Tensor:
    """G, float64 [N, N]: how standardised features are read (see the module).

    >>> from fxzip.matching.moments import moments
    >>> x = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, -2.0], [-1.0, 2.0]])
    >>> reading(moments([x]), [[torch.tensor([[[1.0, 0.5]]])]])  # the second feature has twice the deviation
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]], dtype=torch.float64)

    Args:
        moments: of the space.
        readers: for each model the weights of every parameter that reads the space, [outputs, taps, n_k]. Without any,
            each feature of a model is read alone, all alike.
    """
    correlation = moments.correlation
    deviation = moments.covariance.diagonal().clamp(min=0).sqrt() * moments.alive
    result, tiny = torch.zeros_like(correlation), torch.finfo(torch.float64).tiny
    starts = moments.offsets()
    for k, size in enumerate(moments.sizes):
        own = slice(starts[k], starts[k] + size)
        block, R = result[own, own], correlation[own, own]
        for weights in readers[k] if readers else ():
            scaled = weights.to(deviation) * deviation[own]
            energy = ((scaled @ R) * scaled).sum((1, 2)).clamp(min=tiny)
            rows = (scaled / (energy * len(scaled)).sqrt()[:, None, None]).flatten(0, 1)
            block += rows.T @ rows
        whole = float((block * R).sum())
        if whole > 0:
            block /= whole
        else:
            block += torch.eye(size, dtype=torch.float64, device=block.device) / max(size, 1)
    return result


def energy_merge(moments: Moments, read: Tensor, size: int, floor: float, ridge: float = 1e-5) -> Merge:
    """The merge of N features to `size` that loses little of the energy with which they are read (see the module)."""
    alike = similarity(moments)
    found = _eliminated(moments, alike, read, floor, ridge)
    for _ in range(len(read) - size):
        found.step()
    labels = in_first_layout(torch.as_tensor(found.cluster, device=alike.device), moments.sizes)
    merge = cluster_merge(labels, moments.sizes, alike)
    deviation = moments.covariance.diagonal().clamp(min=0).sqrt()
    weight = torch.as_tensor(found.coefficients, device=alike.device)
    weight = weight / torch.where(moments.alive, deviation, torch.inf)
    total = torch.zeros(size, dtype=torch.float64, device=alike.device).index_add_(0, labels, weight)
    own = torch.where(total[labels] > 0, weight / total[labels].clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    index = torch.arange(len(labels), device=alike.device)
    silent = total[labels] == 0
    matrix = torch.zeros_like(merge.merge)
    matrix[labels, index] = torch.where(silent, merge.merge[labels, index], own)
    return replace(merge, merge=matrix)


def energy_losses(moments: Moments, read: Tensor, floor: float, ridge: float = 1e-5) -> Floats:
    """Energy lost with m features kept, for m = 0, ..., N: float64 [N + 1], falling to 0; of K models all is about K.

    >>> from fxzip.matching.moments import moments
    >>> x = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    >>> energy_losses(moments([x, x]), torch.eye(4) / 2, 0.0, 1e-9).round(6).tolist()  # two pairs, uncorrelated
    [2.0, 1.0, 0.0, 0.0, 0.0]
    """
    found = _eliminated(moments, similarity(moments), read, floor, ridge)
    losses = np.zeros(len(read) + 1)
    for size in range(len(read) - 1, 0, -1):
        losses[size] = losses[size + 1] + found.step()
    with_floor = read.diagonal() + floor * float(read.diagonal().mean())
    whole = (read * moments.correlation).sum() - read.diagonal().sum() + with_floor.sum()
    losses[0] = max(float(whole), losses[1])
    return losses


def _eliminated(moments: Moments, alike: Tensor, read: Tensor, floor: float, ridge: float) -> Elimination:
    one = torch.eye(len(read), dtype=torch.float64, device=read.device)
    factor, _ = ridged_cholesky(moments.correlation, ridge)
    G = read.double() + floor * float(read.diagonal().mean()) * one
    return Elimination(*(value.cpu().numpy() for value in (alike.double(), torch.cholesky_inverse(factor), G)))

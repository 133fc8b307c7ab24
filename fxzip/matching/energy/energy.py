"""Clusters that leave the least variance unexplained: for a refit, which finds the best use of whatever features stay.

An output o with downstream weights w_o has the variance w_oᵀ C w_o, C the covariance of the features. Zipping by
correlation alone spends as many features on what no weight sums over as on what all do, and counts a feature as lost
when no other is like it, though several together may explain it. Here features are standardised, z, with

    R       their correlation, with a ridge,
    G       Σ_o w_o w_oᵀ / (w_oᵀ R w_o), averaged over the outputs of a weight, summed over weights: a block per model,
            scaled so that all outputs of the model have the variance tr G R = 1.

Least squares explains an output by features y = K z as well as E‖o - B y‖² allows. Merging two of them, r and s, into
p y_r + q y_s takes the direction u = q e_r - p e_s away, and the variance of the outputs that is unexplained then is

    uᵀ Q u / uᵀ P u,      P = cov(y)⁻¹,   Q = P cov(y, o) cov(o, y) P,      at first P = R⁻¹, Q = G.

For each pair the best p, q ≥ 0 solve a quadratic equation; p = 0 gives r up. The pair that costs the least goes first;
P and Q lose a rank each. A twentieth of the reconstruction error of the pair by itself (see `clusterwise.py`) is added:
it decides where there are too few positions to know what explains what. Equal features go first: `elimination.py`.
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
from .merge_order import MergeOrder, merge_order


@dataclass(frozen=True)
class Energy(Method):
    """Zipping by unexplained variance: within and across models, for any number of models of any widths.

    >>> from fxzip.matching.problem import Space
    >>> from fxzip.matching.moments import moments
    >>> x = torch.randn(99, 3)
    >>> [merge] = Energy().match(Problem((Space((3, 3), moments=moments([x, x[:, [2, 0, 1]]])),)))
    >>> merge.assignment(1)
    tensor([2, 0, 1])

    O(N³) time for N features in all, mostly in products of matrices; O(N²) memory.

    Attributes:
        floor: variance that every feature counts for by itself, relative to the mean: features that no weight sums over
            are not free to be lost.
        ridge: added to the correlations: how much of a feature the others must leave unexplained to count.

    Spaces in which only relabellings are legal are matched as by `permute`.
    """

    name: ClassVar[str] = "energy"
    needs: ClassVar[frozenset[Evidence]] = frozenset({"moments", "downstream"})

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
                metric = downstream_metric(space.moments, space.downstream)
                merges[together[0]] = energy_merge(space.moments, metric, space.size, self.floor, self.ridge)
            else:
                others = Problem(tuple(problem.spaces[number] for number in together))
                merges.update(zip(together, self.relabelling().match(others), strict=True))

        return [merges[number] for number in range(len(problem.spaces))]


def downstream_metric(moments: Moments, downstream: Sequence[Sequence[Tensor]]) -> Tensor:
    """G, float64 [N, N]: how much standardised features matter to the outputs of downstream weights (see the module).

    >>> from fxzip.matching.moments import moments
    >>> x = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, -2.0], [-1.0, 2.0]])
    >>> downstream_metric(moments([x]), [[torch.tensor([[[1.0, 0.5]]])]])  # the second varies twice as much
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]], dtype=torch.float64)

    Args:
        moments: of the space.
        downstream: for each model the weights of every parameter that sums over the space, [outputs, taps, n_k].
            Without any, each feature of a model is an output of its own.
    """
    correlation = moments.correlation
    std = moments.covariance.diagonal().clamp(min=0).sqrt() * moments.alive
    result, tiny = torch.zeros_like(correlation), torch.finfo(torch.float64).tiny
    starts = moments.offsets()

    for k, size in enumerate(moments.sizes):
        own = slice(starts[k], starts[k] + size)
        block, R = result[own, own], correlation[own, own]
        for weights in downstream[k] if downstream else ():
            scaled = weights.to(std) * std[own]
            variance = ((scaled @ R) * scaled).sum((1, 2)).clamp(min=tiny)
            rows = (scaled / (variance * len(scaled)).sqrt()[:, None, None]).flatten(0, 1)
            block += rows.T @ rows
        whole = float((block * R).sum())
        if whole > 0:
            block /= whole
        else:
            block += torch.eye(size, dtype=torch.float64, device=block.device) / max(size, 1)

    return result


def energy_merge(moments: Moments, metric: Tensor, size: int, floor: float, ridge: float = 1e-5) -> Merge:
    """The merge of N features to `size` that leaves little variance of the outputs unexplained (see the module)."""
    alike = similarity(moments)
    cluster, coefficients = _order(moments, alike, metric, floor, ridge, size).clusters(size)
    labels = in_first_layout(torch.as_tensor(cluster, device=alike.device), moments.sizes)
    merge = cluster_merge(labels, moments.sizes, alike)
    std = moments.covariance.diagonal().clamp(min=0).sqrt()
    weight = torch.as_tensor(coefficients, device=alike.device)
    weight = weight / torch.where(moments.alive, std, torch.inf)
    total = torch.zeros(size, dtype=torch.float64, device=alike.device).index_add_(0, labels, weight)
    own = torch.where(total[labels] > 0, weight / total[labels].clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    index = torch.arange(len(labels), device=alike.device)
    silent = total[labels] == 0
    matrix = torch.zeros_like(merge.merge)
    matrix[labels, index] = torch.where(silent, merge.merge[labels, index], own)

    return replace(merge, merge=matrix)


def unexplained_variance(moments: Moments, metric: Tensor, floor: float, ridge: float = 1e-5) -> Floats:
    """Unexplained variance with m features kept, for m = 0, ..., N: float64 [N + 1], falling to 0; of K models all is
    about K.

    >>> from fxzip.matching.moments import moments
    >>> x = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    >>> unexplained_variance(moments([x, x]), torch.eye(4) / 2, 0.0, 1e-9).round(6).tolist()  # two pairs, uncorrelated
    [2.0, 1.0, 0.0, 0.0, 0.0]
    """
    steps = _order(moments, similarity(moments), metric, floor, ridge, 1).steps
    losses = np.zeros(len(metric) + 1)
    for size, step in zip(range(len(metric) - 1, 0, -1), steps, strict=True):
        losses[size] = losses[size + 1] + step.lost
    with_floor = metric.diagonal() + floor * float(metric.diagonal().mean())
    whole = (metric * moments.correlation).sum() - metric.diagonal().sum() + with_floor.sum()
    losses[0] = max(float(whole), losses[1])
    return losses


def _order(moments: Moments, alike: Tensor, metric: Tensor, floor: float, ridge: float, size: int) -> MergeOrder:
    """The order in which features are merged until `size` are left, or fewer."""
    correlation = moments.correlation
    one = torch.eye(len(metric), dtype=torch.float64, device=metric.device)
    G = metric.double() + floor * float(metric.diagonal().mean()) * one

    def precision() -> Floats:
        return _numpy(torch.cholesky_inverse(ridged_cholesky(correlation, ridge)[0]))

    return merge_order(_numpy(alike.double()), _numpy(correlation), _numpy(G), ridge, size, precision)


def _numpy(value: Tensor) -> Floats:
    result: Floats = value.cpu().numpy()
    return result

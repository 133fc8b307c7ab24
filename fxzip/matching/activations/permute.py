"""Alignment by linear assignment: every model is relabelled to fit the first.

For models 0 and k with similarity C_k [n_0, n_k], find the one-to-one pairs π that maximise Σ C_k[i, π(i)]: activation
matching of Git Re-Basin (Ainsworth et al., arXiv 2209.04836, section 3.1), and the permute baseline of ZipIt!.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import OptionError
from ..assignment import best_pairs
from ..merge import Merge, cluster_merge
from ..method import SpaceMethod
from ..moments import Moments
from ..similarities import similarity


@dataclass(frozen=True)
class Permute(SpaceMethod):
    """Match each model k ≥ 1 to the first, one to one, at the greatest total correlation.

    >>> from fxzip.matching.moments import moments
    >>> x = torch.randn(99, 3)
    >>> Permute()(moments([x, x[:, [2, 0, 1]]])).assignment(1)
    tensor([2, 0, 1])

    With equal widths every U_k is a permutation. A model narrower than the first leaves some merged features to the
    others alone. Of a wider one the best n_0 features are matched; each of the rest joins the cluster of the
    feature that it is most similar to, among those of model 0 and those of its own model that are matched. U
    stays 0/1 and M is the mean over the members, the least-squares code for this U. Then U_k is no permutation:
    see `Merge.bijective`. O(K n³) time in the worst case, O(N²) memory.
    """

    name: ClassVar[str] = "permute"
    one_to_one: ClassVar[bool] = True

    def __call__(self, moments: Moments, size: int | None = None) -> Merge:
        """The merge to the n_0 features of the first model.

        Args:
            moments: of the space, N features of K models.
            size: features to keep, n_0 by default. With more, the features of the other models that fit their partners
                least stay apart (PLeaS, arXiv 2407.02447, section 3.1).

        Raises:
            OptionError: `size` is not between n_0 and N.
            DataError: nothing was observed, or the moments are not finite.
        """
        n = moments.sizes[0]
        if size is not None and not n <= size <= sum(moments.sizes):
            raise OptionError(
                f"`permute` keeps the features of the first model, and apart what matches badly: `size` must be "
                f'{n} to {sum(moments.sizes)}; got {size}. Use `method="zip"` to merge to fewer.'
            )

        alike = similarity(moments)
        labels = [torch.arange(n, device=alike.device)]

        for start, end in pairwise(moments.offsets()[1:]):
            labels.append(_align(alike[:n, start:end], alike[start:end, start:end]))

        return cluster_merge(_apart(torch.cat(labels), alike, n, (size or n) - n), moments.sizes, alike)


def _apart(labels: Tensor, alike: Tensor, first: int, count: int) -> Tensor:
    """The `count` features behind the first model's that are least like the rest of their cluster get one of their own.

    >>> alike = torch.tensor([[1.0, 0.0, 0.9, 0.0], [0.0, 1.0, 0.0, 0.1], [0.9, 0.0, 1.0, 0.0], [0.0, 0.1, 0.0, 1.0]])
    >>> _apart(torch.tensor([0, 1, 0, 1]), alike, 2, 1)
    tensor([0, 1, 0, 2])
    """
    if not count:
        return labels

    same = labels[:, None] == labels[None, :]
    same.fill_diagonal_(False)
    fit = torch.where(same, alike, 0).sum(1) / same.sum(1).clamp(min=1)
    lone = fit[first:].argsort(stable=True)[:count].sort().values + first
    labels = labels.clone()
    labels[lone] = int(labels.max()) + 1 + torch.arange(count, device=labels.device)

    return labels


def _align(cross: Tensor, own: Tensor) -> Tensor:
    """The merged feature of each feature of one model: int64 [n_k], from its similarity to model 0 and to itself."""
    n, n_k = cross.shape
    rows, columns = best_pairs(cross)
    labels = torch.full((n_k,), -1, dtype=torch.int64, device=cross.device)
    labels[columns] = rows
    rest = (labels < 0).nonzero().flatten()
    if len(rest):
        placed = torch.cat([cross, own[columns]])
        slot = torch.cat([torch.arange(n, device=cross.device), rows])
        labels[rest] = slot[placed[:, rest].argmax(0)]

    return labels

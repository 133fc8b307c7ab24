"""Clusters of features: how many there are to be, and which merged feature each of them becomes.

Layout. Merged feature i sits where model 0 has its feature i whenever possible: a cluster takes the slot of its
smallest feature of model 0; clusters without one fill the slots that are left, in the order of their first member.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OptionError
from .moments import Moments


def kept(size: int | None, moments: Moments, name: str) -> int:
    """How many features the method of that name is to keep: `size`, by default those of the first model.

    >>> from fxzip.matching.moments import moments
    >>> kept(None, moments([torch.ones(4, 3), torch.ones(4, 5)]), "zip")
    3

    Raises:
        OptionError: it is not between 1 and all features there are.
    """
    total = sum(moments.sizes)
    size = moments.sizes[0] if size is None else size
    if not 1 <= size <= total:
        raise OptionError(f"`{name}` can keep 1 to {total} of the {total} features of this space; got `size` {size}.")
    return size


def in_first_layout(clusters: Tensor, sizes: Sequence[int]) -> Tensor:
    """Renumber clusters so that merged features keep the layout of model 0, as far as possible (see the module).

    >>> in_first_layout(torch.tensor([7, 7, 3, 3, 9]), sizes=(3, 2))
    tensor([0, 0, 2, 2, 1])

    Args:
        clusters: int64 [N], any ids.
        sizes: (n_1, ..., n_K).

    Returns:
        int64 [N], the ids 0..m-1, as `Merge.from_clusters` wants them.
    """
    ids, dense = clusters.unique(return_inverse=True)
    m, index = len(ids), torch.arange(len(clusters), device=clusters.device)
    first = torch.full_like(ids, len(clusters)).scatter_reduce(0, dense, index, "amin")
    seated = first < min(sizes[0], m)
    free = torch.ones(m, dtype=torch.bool, device=clusters.device)
    free[first[seated]] = False
    slots = first.clone()
    standing = (~seated).nonzero().flatten()
    slots[standing[first[standing].argsort()]] = free.nonzero().flatten()

    return slots[dense]

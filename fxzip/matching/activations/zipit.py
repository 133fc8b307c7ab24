"""Greedy zipping: merge the two most similar features, again and again, within models and across them.

ZipIt! (Stoica et al., ICLR 2024, arXiv 2305.03053), section 4.1 and, for α, β and more than two models, section 4.3.
S [N, N] is the similarity of all features of all models. Until `size` clusters are left:

    i < j    the pair with the greatest S[i, j]; of equal ones the first, by i, then by j
    S[i, ·]  becomes α · min(S[i, ·], S[j, ·]), j goes; the cluster counts for the model of i from here on
    β        a model may merge within itself ⌊β · ⌊merges / K⌋⌋ times; after that, pairs within it are forbidden

The textbook loop looks for the maximum in all of S at every merge: O(N³). Here every row i remembers its greatest
S[i, j], j > i, and where it is. A merge costs O(N) to write and to compare, plus a new look, O(N), at a row
whose partner went away, and that only once the row's old maximum, an upper bound, comes first in line. That is O(N²) as
long as few rows share a partner, which is what features do; O(N³) in the worst case. The result is the same to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ...errors import OptionError
from ..clusters import in_first_layout, kept
from ..merge import Merge, cluster_merge
from ..method import SpaceMethod
from ..moments import Moments
from ..similarities import model_index, similarity

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Zip(SpaceMethod):
    """ZipIt!'s greedy matching, for any number of models of any widths.

    >>> from fxzip.matching.moments import moments
    >>> x = torch.randn(99, 3)
    >>> Zip(alpha=0.3, beta=0.125)(moments([x, x[:, [2, 0, 1]]])).assignment(1)
    tensor([2, 0, 1])

    O(N²) time for N features in all (O(N³) in the worst case, see the module), O(N²) memory.

    Attributes:
        alpha: in (0, 1]. Similarities of a merged feature are multiplied by it at every merge: below 1 it keeps
            clusters small.
        beta: in [0, 1]. How much of a model's share of the merges may be within the model; 0: none. (The paper's code
            still grants one when the budget rounds to zero.)

    Should no legal pair be left before `size` is reached, which takes models of different widths, the remaining
    clusters are compared afresh by the least similarity of their members, and without β.
    """

    name: ClassVar[str] = "zip"

    alpha: float = 1.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise OptionError(f"`Zip` needs 0 < alpha <= 1; got alpha={self.alpha}. Without discount it is alpha=1.")
        if not 0 <= self.beta <= 1:
            raise OptionError(
                f"`Zip` needs 0 <= beta <= 1; got beta={self.beta}. To merge across models only, pass beta=0."
            )

    def __call__(self, moments: Moments, size: int | None = None) -> Merge:
        """The merge of N features of K models to `size` features.

        Args:
            moments: of the space.
            size: features to keep; the width of the first model by default.

        Raises:
            OptionError: `size` is not between 1 and N.
            DataError: nothing was observed, or the moments are not finite.
        """
        sizes, size = moments.sizes, kept(size, moments, self.name)
        alike = similarity(moments)
        clusters = zip_clusters(alike.cpu().numpy(), sizes, size, self.alpha, self.beta)
        labels = in_first_layout(torch.as_tensor(clusters, device=alike.device), sizes)
        return cluster_merge(labels, sizes, alike)


def zip_clusters(alike: Floats, sizes: tuple[int, ...], size: int, alpha: float, beta: float) -> Ints:
    """Cluster of every feature, named by its first member: int64 [N], `size` different ids.

    >>> zip_clusters(np.array([[1.0, 0.1, 0.8], [0.1, 1.0, 0.2], [0.8, 0.2, 1.0]]), (2, 1), 2, 1.0, 1.0)
    array([0, 1, 0])

    Args:
        alike: symmetric similarity, [N, N]; not changed. Where rounding makes a difference the upper half counts.
        sizes: (n_1, ..., n_K).
        size: clusters to keep.
        alpha: as in `Zip`.
        beta: as in `Zip`.
    """
    merges = len(alike) - size
    budget = int(merges // len(sizes) * beta + 1e-4)
    zipper = _Zipper(alike, model_index(sizes).numpy(), alpha, [budget] * len(sizes))
    left = zipper.run(merges)
    clusters = zipper.cluster
    if left:
        ids, clusters = np.unique(clusters, return_inverse=True)
        order = np.argsort(clusters, kind="stable")
        starts = np.searchsorted(clusters[order], np.arange(len(ids)))
        least = np.minimum.reduceat(np.minimum.reduceat(alike[np.ix_(order, order)], starts, 0), starts, 1)
        zipper = _Zipper(least, np.arange(len(ids)), alpha, [])
        zipper.run(left)
        clusters = ids[zipper.cluster[clusters]]

    return clusters


class _Zipper:
    """The greedy loop and what it remembers. S lives in its upper half; an empty budget list means no β."""

    def __init__(self, alike: Floats, origin: Ints, alpha: float, budget: list[int]) -> None:
        n = len(alike)
        # A row length that is no power of two: writing columns would otherwise fall into a single cache set.
        self.S = np.empty((n, n + 8 + n % 2))[:, :n]
        self.S[:] = alike
        np.fill_diagonal(self.S, -np.inf)
        self.alpha, self.origin, self.budget = alpha, origin, budget
        self.cluster: Ints = np.arange(n)
        self.best = np.full(n, -np.inf)  # max over j > i of S[i, j], or an upper bound of it where `stale`
        self.partner = np.full(n, n)  # the first j that attains it
        self.stale = np.zeros(n, dtype=bool)

        for model, allowed in enumerate(budget):
            if allowed == 0:
                self._forbid(model)

        for i in range(n - 1):
            self._look(i)

    def run(self, merges: int) -> int:
        """Merge so many times; how many merges are left when no legal pair is."""
        while merges:
            i = int(self.best.argmax())
            if self.best[i] == -np.inf:
                break
            if self.stale[i]:
                self._look(i)
            else:
                self._merge(i, int(self.partner[i]))
                merges -= 1
        return merges

    def _look(self, i: int) -> None:
        """Find the partner of row i anew."""
        tail = self.S[i, i + 1 :]
        j = int(tail.argmax())
        self.best[i], self.partner[i], self.stale[i] = tail[j], i + 1 + j, False

    def _row(self, i: int) -> Floats:
        """S[i, ·] in full, -inf at i and at clusters that are gone."""
        return np.concatenate([self.S[:i, i], self.S[i, i:]])

    def _merge(self, i: int, j: int) -> None:
        """Cluster j > i joins cluster i."""
        row = np.minimum(self._row(i), self._row(j))
        row *= self.alpha
        self.S[i, i + 1 :] = row[i + 1 :]
        self.S[:i, i] = row[:i]
        self.S[:j, j] = -np.inf
        self.S[j] = -np.inf
        self.cluster[self.cluster == j] = i
        self.best[j], self.stale[j] = -np.inf, False
        partner = self.partner[:j]
        self.stale[:j] |= (partner == i) | (partner == j)
        self._look(i)
        self._rise(row[:i], i)
        if self.origin[i] == self.origin[j] and self.budget:
            self._spend(int(self.origin[i]))

    def _rise(self, row: Floats, i: int) -> None:
        """α raises negative similarities: rows above i whose maximum that changes."""
        best: Any = self.best[:i]
        higher = row > best
        tie = (row == best) & (i < self.partner[:i]) & ~self.stale[:i]
        changed = (higher | tie) & (row > -np.inf)
        if changed.any():
            best[changed] = row[changed]
            self.partner[:i][changed] = i
            self.stale[:i][changed] = False

    def _spend(self, model: int) -> None:
        self.budget[model] -= 1
        if self.budget[model] <= 0:
            self._forbid(model)

    def _forbid(self, model: int) -> None:
        """No more pairs of two clusters that both count for this model."""
        members = np.flatnonzero(self.origin == model)
        members = members[self.cluster[members] == members]
        self.S[np.ix_(members, members)] = -np.inf
        self.stale[members] = self.best[members] > -np.inf

"""The greedy loop of `energy.py`: features go one at a time, as a part of another one or altogether."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .clusterwise import Floats, Ints, pair_losses


class Step(NamedTuple):
    """One cluster becomes a part of another.

    Attributes:
        gone, into: the two.
        share: of the one that is gone in the other, per unit of it.
        size: of what comes of both, by which coefficients are divided.
        lost: the variance of the outputs that this leaves unexplained.
    """

    gone: int
    into: int
    share: float
    size: float
    lost: float

    def apply(self, cluster: Ints, coefficients: Floats) -> None:
        """Bring the cluster of each feature, and its coefficient there, up to date, in place; [features] both."""
        mine, theirs = cluster == self.gone, cluster == self.into
        coefficients[mine] *= self.share
        coefficients[theirs] /= self.size
        cluster[mine] = self.into


class Elimination:
    """Clusters of N features, and the variance of the outputs that merging two of them leaves unexplained.

    A row stands for a cluster, and remembers the partner with which it costs the least; what is remembered is looked up
    anew when it comes first in line, for losses hardly ever fall as features go, and with it that of the `_BESIDE` next
    in line, which takes hardly longer. A pair goes if it loses at most a
    twentieth more than what any other row remembers. Pairs that are equal but for float32's rounding go before all
    others, whatever the ridge and however much they are read: the more alike the sooner, to which unlike `samples` of
    features that are alike on the data count.

    P and Q are kept for the features as they were at first: row r stands for `scale[r]` times that. Updates of rank one
    are collected in `y` and `x`, P - Σ y yᵀ and Q - Σ (x yᵀ + y xᵀ), and applied `_TOGETHER` at a time, as products of
    matrices; rows of clusters that are gone are then dropped once they are a quarter of all.

    Args:
        alike: how alike features are, [N, N], 1 on the diagonal.
        P, Q: see `energy.py`, [N, N].

    Attributes:
        cluster: the cluster of each feature, [N].
        coefficients: of each feature in its cluster, ≥ 0, [N].
        done: the steps so far.
    """

    _TOGETHER = 32
    _BESIDE = 16
    _SLACK = 0.05
    _ALONE = 0.05
    _ROUNDING = 3e-6

    def __init__(self, alike: Floats, P: Floats, Q: Floats) -> None:
        n = len(alike)
        self.cluster: Ints = np.arange(n)
        self.coefficients = np.ones(n)
        self.done: list[Step] = []
        self.ids: Ints = np.arange(n)  # the cluster that a row stands for
        self.alike, self.P, self.Q = _odd_rows(alike), P.copy(), Q.copy()
        self.dP, self.dQ, self.scale = P.diagonal().copy(), Q.diagonal().copy(), np.ones(n)
        self.p, self.q = self.dP.copy(), self.dQ.copy()  # diagonals, of the rows as they are
        self.kept = Q.diagonal().copy()
        self.x, self.y, self.waiting = np.zeros((n, self._TOGETHER)), np.zeros((n, self._TOGETHER)), 0
        self.gone = np.zeros(n, dtype=bool)
        self.steps = 0
        self.seen = np.zeros(n, dtype=np.int64)
        self.loss, self.lost, self.slope = np.full(n, np.inf), np.zeros(n), np.zeros(n)
        self.partner: Ints = np.zeros(n, dtype=np.int64)  # as a cluster: rows are renumbered
        if n > 1:
            for start in range(0, n, self._BESIDE):
                self._look(np.arange(start, min(start + self._BESIDE, n)))

    def step(self) -> float:
        """Merge the pair that costs the least. Out: the variance that this leaves unexplained."""
        r = int(self.loss.argmin())
        while self.seen[r] != self.steps:
            self._look(self._next())
            r = int(np.where(self.seen == self.steps, self.loss, np.inf).argmin())
            if self.loss[r] <= (1 + self._SLACK) * self.loss.min():
                break
            r = int(self.loss.argmin())
        lost = max(float(self.lost[r]), 0.0)
        self._merge(r, int(np.searchsorted(self.ids, self.partner[r])), -float(self.slope[r]), lost)
        return lost

    def _next(self) -> Ints:
        """The rows that come first in line and are to be looked up anew."""
        loss = np.where(self.seen == self.steps, np.inf, self.loss)
        rows: Ints = np.argsort(loss, kind="stable")[: self._BESIDE]
        return rows[np.isfinite(loss[rows])]

    def _rows(self, rows: Ints) -> tuple[Floats, Floats]:
        """Rows of P and of Q, with what is waiting."""
        x, y = self.x[:, : self.waiting], self.y[:, : self.waiting]
        return self.P[rows] - y[rows] @ y.T, self.Q[rows] - x[rows] @ y.T - y[rows] @ x.T

    def _look(self, rows: Ints) -> None:
        """The best that can be done with each row r: u = e_r + t e_s with t ≤ 0, that is q = 1, p = -t.

        The loss has the derivative (a t² + b t + c) · positive in t, so its minimum is the greater root for a > 0 and
        the smaller one for a < 0.
        """
        scale = self.scale * self.scale[rows, None]
        P, Q = self._rows(rows)
        P *= scale
        Q *= scale
        p, q = self.p, self.q
        p_r, q_r = p[rows, None], q[rows, None]
        a, b, c = q * P - p * Q, q * p_r - p * q_r, Q * p_r - P * q_r

        with np.errstate(all="ignore"):
            alone = q_r / p_r
            root = np.sqrt(np.maximum(b * b - 4 * a * c, 0.0))
            positive = b > 0  # either form of the root, whichever does not cancel
            t = np.where(positive, -2 * c, root - b) / np.where(positive, root + b, 2 * a)
            losses = (q_r + (2 * Q + q * t) * t) / (p_r + (2 * P + p * t) * t)
            better = (t <= 0) & (losses >= 0) & (losses < alone * (1 - 1e-6))

        losses = np.where(better, losses, alone)
        apart = self._apart(rows)
        total = np.minimum(losses, apart) + self._ALONE * apart

        with np.errstate(all="ignore"):
            share = apart / np.minimum(self.kept, self.kept[rows, None])

        total = np.where(share < self._ROUNDING, 1e-20 * share, total)
        total[:, self.gone] = np.inf
        each = np.arange(len(rows))
        total[each, rows] = np.inf
        total = np.fmax(total, 0.0)  # rounding may leave less, and `step` would not end
        total = total.astype(np.float32)  # r with s loses what s with r does, to the bit
        best = total.argmin(1)
        self.loss[rows], self.lost[rows] = total[each, best], losses[each, best]
        self.slope[rows] = np.where(better, t, 0.0)[each, best]
        self.partner[rows], self.seen[rows] = self.ids[best], self.steps

    def _apart(self, rows: Ints) -> Floats:
        """What merging rows with each other row loses if both are read from their cluster alone, [rows, N]."""
        kept = self.kept[rows, None]
        return pair_losses(kept, self.kept, np.sqrt(kept * self.kept) * self.alike[rows])

    def _merge(self, r: int, s: int, p: float, lost: float) -> None:
        """Row r joins row s, as p times itself; or s joins r, as 1/p: the greater part stays, so that no row's scale
        grows by more than a factor of two, and with it the rounding of what is left of P and Q."""
        if p > 1 + 1e-6:
            r, s, p = s, r, 1 / p

        v_r, v_s = self.scale[r], -p * self.scale[s]
        (P_r, P_s), (Q_r, Q_s) = self._rows(np.array([r, s]))
        Pv, Qv = v_r * P_r + v_s * P_s, v_r * Q_r + v_s * Q_s
        norm, read = float(v_r * Pv[r] + v_s * Pv[s]), float(v_r * Qv[r] + v_s * Qv[s])
        y = Pv / np.sqrt(norm)
        x = (Qv - Pv * (read / (2 * norm))) / np.sqrt(norm)
        self.dP -= y * y
        self.dQ -= 2 * x * y
        self.x[:, self.waiting], self.y[:, self.waiting] = x, y
        self.waiting += 1
        self.kept[s] += self.kept[r] - self._apart(np.array([r]))[0, s]
        A = self.alike
        size = np.sqrt(1 + p * p + 2 * p * A[r, s])
        row = (p * A[r] + A[s]) / size
        A[s], A[:, s], A[s, s] = row, row, 1.0
        self.scale[s] *= size
        self.done.append(Step(int(self.ids[r]), int(self.ids[s]), float(p / size), float(size), lost))
        self.done[-1].apply(self.cluster, self.coefficients)
        self.gone[r], self.loss[r] = True, np.inf
        self.steps += 1
        id_s = self.ids[s]
        if self.waiting == self._TOGETHER:
            self._settle()

        square = self.scale * self.scale
        self.p, self.q = self.dP * square, self.dQ * square
        self._look(np.searchsorted(self.ids, [id_s]))

    def _settle(self) -> None:
        """Apply what is waiting, and drop the rows of clusters that are gone if they are many."""
        x, y = torch.from_numpy(self.x[:, : self.waiting]), torch.from_numpy(self.y[:, : self.waiting])
        torch.from_numpy(self.P).addmm_(y, y.T, alpha=-1)
        torch.from_numpy(self.Q).addmm_(torch.cat([x, y], 1), torch.cat([y, x], 1).T, alpha=-1)
        self.waiting = 0
        if 4 * int(self.gone.sum()) < len(self.gone):
            return

        keep = np.flatnonzero(~self.gone)
        both = np.ix_(keep, keep)
        self.P, self.Q, self.alike = self.P[both], self.Q[both], _odd_rows(self.alike[both])

        for name in ("ids", "dP", "dQ", "scale", "kept", "gone", "seen", "loss", "lost", "slope", "partner"):
            setattr(self, name, getattr(self, name)[keep])

        self.x, self.y = self.x[keep], self.y[keep]


def _odd_rows(matrix: Floats) -> Floats:
    """A copy whose rows lie an odd number of cache lines apart: writing columns would fall into a single set else."""
    n = len(matrix)
    result = np.empty((n, 8 * (n // 16 * 2 + 3)))[:, :n]
    result[:] = matrix
    return result

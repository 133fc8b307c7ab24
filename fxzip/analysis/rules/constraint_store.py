"""The constraint store: what every rule is written in.

A relabelling π moves the elements of a tensor such that those labelled l land where π(l) was, and rules record in a
`ConstraintStore` what π has to respect:

* equal(a, b): a and b are one feature.
* block(b, m): π maps the members m of block b onto the members of block π(b).
* pin(l): π(l) = l.

Two fields that meet on common axes S = A(f) ∩ A(g) are related by `relate`: equal where A(f) = A(g) = S, the coarser a
block of the finer where one contains the other, and both members of a new block over S otherwise. A field that meets
unlabelled values on axes S keeps its place there (`fix`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from .axis_labels import FIXED, VOID, AxisLabels, all_features, compress, joint, occurrences, varying
from .label_patterns import across, same_members, scrambled, told_apart

PinKind = Literal["fixed", "barrier", "output"]
Touch = Literal["param", "written", "mix", "extremum", "dual", "bent"]

ACROSS = "features of another kind lie along the same axis"


@dataclass(frozen=True)
class Pin:
    """Labels that no relabelling moves, with the reason. `kind`: "fixed" (the basis is given from outside), "barrier"
    (a call without a rule) or "output" (what the model returns)."""

    labels: Tensor
    reason: str
    kind: PinKind


@dataclass
class Constraints:
    """What the calls inside one fx node say about labels."""

    equal: list[Tensor] = field(default_factory=list)  # each [2, E]
    blocks: list[Tensor] = field(default_factory=list)  # each [2, R]: block, member
    pins: list[Pin] = field(default_factory=list)
    consumed: list[Tensor] = field(default_factory=list)  # labels of parameters contracted with activations
    touched: list[tuple[Touch, Tensor]] = field(default_factory=list)  # (a kind, see `ConstraintStore.touch`; labels)
    refusals: list[str] = field(default_factory=list)  # why only models that agree here to the bit can share the node
    sums: bool = False  # features are summed over with weights, or looked up in a table of weights


class ConstraintStore:
    """Collects the constraints of the node under way (`constraints`) and hands out new labels.

    `call` and `where` (the ATen call and the node under way) are named in the reasons of pins.
    """

    def __init__(self) -> None:
        self.size = 1  # label 0 is VOID
        self.constraints = Constraints()
        self.equated: list[Tensor] = []  # what is equal by all nodes so far, each [2, E]
        self.of_blocks: list[tuple[int, int]] = []  # labels that stand for blocks, [from, to[
        self.crossed: list[tuple[Tensor, Tensor]] = []  # fields of one tensor that lay across each other in this call
        self.call = ""
        self.where = ""

    def fresh(self, *shape: int) -> Tensor:
        """New labels, one per element of `shape`."""
        count = int(torch.Size(shape).numel())
        labels = torch.arange(self.size, self.size + count, device="cpu").reshape(shape)
        self.size += count
        return labels

    def _pairs(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = torch.broadcast_tensors(a, b)
        return torch.stack([a.reshape(-1), b.reshape(-1)])

    def _distinct(self, pairs: Tensor) -> Tensor:
        if pairs.shape[1] <= 4096:
            return pairs
        keys = torch.unique(pairs[0] * self.size + pairs[1])
        return torch.stack([keys // self.size, keys % self.size])

    def equal(self, a: Tensor, b: Tensor) -> None:
        """a and b (broadcast) name the same features. Partners of FIXED are pinned, those of VOID keep together."""
        if a is b:
            return

        pairs = self._pairs(a, b)
        if not all_features(pairs):
            least, other = pairs.min(0).values, pairs.max(0).values
            self.pin(other[(least == FIXED) & (other > 0)], "it is added to values that carry no feature")
            self._beside_nothing(a, b)
            self._beside_nothing(b, a)
            pairs = pairs[:, least > 0]

        differ = pairs[0] != pairs[1]
        if bool(differ.any()):
            self.constraints.equal.append(self._distinct(pairs if bool(differ.all()) else pairs[:, differ]))
            self.equated.append(self.constraints.equal[-1])

    def agree(self, a: Tensor, b: Tensor) -> Tensor:
        """`equal(a, b)`, and the labels of both: a feature where either has one, else FIXED before VOID."""
        self.equal(a, b)
        return joint(a, b)

    def _beside_nothing(self, labels: Tensor, other: Tensor) -> None:
        """Features that meet VOID keep to themselves: those that meet it at the same of their places, in order."""
        pairs = self._pairs(labels, other)
        void = (pairs[1] == VOID) & (pairs[0] > 0)
        if bool(void.any()):
            rank = occurrences(pairs[0])
            self._keep_apart(pairs[0, void], scrambled(rank[void] + 1), "padded places keep to themselves")

    def _keep_apart(self, labels: Tensor, marks: Tensor, reason: str) -> None:
        """Features may change places only with those of which the marks add up to the same."""
        members, which = labels.unique(return_inverse=True)
        sums = torch.zeros(len(members), dtype=torch.int64, device="cpu").index_add_(0, which, marks)
        kinds, kind = sums.unique(return_inverse=True)
        mates = self.fresh(len(kinds))
        self.pin(mates, reason)
        self.block(mates[kind], members)

    def block(self, blocks: Tensor, members: Tensor) -> None:
        """Each label of `blocks` (broadcast) is a block with the label of `members` at the same place as a member."""
        pairs = self._pairs(blocks, members)
        self.pin(pairs[1, (pairs[0] == FIXED) & (pairs[1] > 0)], "its block meets values that carry no feature")
        self.pin(pairs[0, (pairs[1] == FIXED) & (pairs[0] > 0)], "it holds values that carry no feature")
        if not all_features(pairs[0]):
            self._beside_nothing(members, blocks)
        pairs = pairs[:, (pairs > 0).all(0)]
        if pairs.numel():
            self.constraints.blocks.append(self._distinct(pairs))

    def _those(self, labels: Tensor) -> Tensor:
        """The distinct features among the labels, in order."""
        labels = labels.reshape(-1)
        if not all_features(labels):
            labels = labels[labels > 0]
        if labels.numel() < self.size >> 7:  # sorting takes as long as a look at a hundred times as many flags
            return torch.as_tensor(labels.unique())
        found = torch.zeros(self.size, dtype=torch.bool, device="cpu")
        found[labels] = True
        return found.nonzero().flatten()

    def pin(self, labels: Tensor, reason: str, kind: PinKind = "fixed") -> None:
        those = self._those(labels)
        if those.numel():
            self.constraints.pins.append(Pin(those, self._placed(reason) if kind == "fixed" else reason, kind))

    def _placed(self, reason: str) -> str:
        """The reason with the call, unless it names it, and the node."""
        names = [f"`{self.call}`"] if self.call and not reason.startswith("`") else []
        places = ", ".join([*names, *([self.where] if self.where else [])])
        return f"{reason} ({places})" if places else reason

    def touch(self, kind: Touch, labels: Tensor) -> None:
        """Note what a call does to these features that matters later: "param" (elementwise with a parameter), "mix" (a
        symmetric function of them all), "extremum" (one that does not see how often a value occurs), "dual" (both
        factors of a sum are activations), "written" (a parameter writes them), "bent" (of parameters alone, a function
        that is not linear)."""
        those = self._those(labels)
        if those.numel():
            self.constraints.touched.append((kind, those))

    def consume(self, labels: Tensor) -> None:
        """These labels of a parameter are summed over against activations: they take the unmerge matrix."""
        those = self._those(labels)
        if those.numel():
            self.constraints.consumed.append(those)

    def refuse(self, reason: str) -> None:
        """What the call does depends on the order of features that the model has learned, so that those of two models
        cannot be matched: only models that agree to the bit may share it."""
        self.constraints.refusals.append(self._placed(reason))

    def apart(self, fields: AxisLabels, axes: frozenset[int]) -> AxisLabels:
        """The fields of a tensor that meets features along `axes`, without those that lie across others there.

        A view may lay features of several kinds along one axis, as (head, feature of a head) where heads are joined.
        Of two kinds the one with fewer features keeps its places then, and the others may change places only with what
        lies at the same of these. Parameters with an axis of each kind may have other labels instead: see `crossed`.
        """
        kept = list(fields)
        for f, g in combinations(fields, 2):
            both = varying(f) & varying(g) & axes
            if both and any(f is k for k in kept) and any(g is k for k in kept) and across(f, g):
                self.crossed.append((f, g))
                still, moving = sorted((f, g), key=lambda labels: len(labels.unique()))
                self.pin(still, ACROSS)
                pairs = self._pairs(moving, still)
                features = pairs[0] > 0
                marks = scrambled(scrambled(occurrences(pairs[0]) + 1) + pairs[1])
                self._keep_apart(pairs[0, features], marks[features], ACROSS)
                kept = [labels for labels in kept if labels is not still]
        return tuple(kept)

    # relations of fields -------------------------------------------------------------------------------------------

    def project(self, labels: Tensor, axes: frozenset[int]) -> Tensor | None:
        """A new block label per place on `axes`, with the field's labels there as members; None if `axes` is empty.

        Places with the same members are one block, so that it is seen where blocks do not change: along the batch, or
        along windows that were laid behind one another.
        """
        axes = axes & varying(labels)
        if not axes:
            return None
        if axes == varying(labels):
            return labels

        inner = [axis for axis in range(labels.ndim) if axis not in axes]
        shape = [labels.shape[axis] for axis in sorted(axes)]
        rows = labels.permute(*sorted(axes), *inner).reshape(torch.Size(shape).numel(), -1)
        first, which = same_members(rows)
        blocks = self.fresh(len(first))
        self.of_blocks.append((int(blocks[0]), self.size))
        self.block(blocks[:, None], rows[first])

        return compress(blocks[which].reshape([n if axis in axes else 1 for axis, n in enumerate(labels.shape)]))

    def relate(self, f: Tensor, g: Tensor) -> None:
        """Two fields (same number of axes) whose tensors meet elementwise on all axes."""
        shared = varying(f) & varying(g)
        if not shared:
            return

        if varying(f) == varying(g):
            self.equal(f, g)
        elif shared == varying(f):
            self.block(f, g)
        elif shared == varying(g):
            self.block(g, f)
        else:
            blocks = self.project(f, shared)
            assert blocks is not None
            self.block(blocks, g)

    def fix(self, labels: Tensor, axes: frozenset[int], reason: str) -> bool:
        """The field keeps its place along `axes`; along its other axes features may still move. Whether none can.

        A feature may only go where another is that lies at the same places along `axes`: if no two do, none can move
        (the rows of a relative position table, one diagonal each).
        """
        axes = axes & varying(labels)
        if not axes:
            return False

        if axes == varying(labels) or told_apart(labels, axes):
            self.pin(labels, reason)
            return True

        blocks = self.project(labels, axes)
        assert blocks is not None
        self.pin(blocks, reason)

        return False

    def holds_blocks(self, labels: Tensor) -> bool:
        """Whether labels of a field stand for blocks."""
        return any(bool(((labels >= start) & (labels < end)).any()) for start, end in self.of_blocks)

    def mix(self, labels: Tensor, axes: frozenset[int]) -> Tensor | None:
        """A symmetric function over `axes` (sum, norm, softmax): what is left of the field outside of `axes`."""
        if not axes & varying(labels):
            return labels
        self.touch("mix", labels)
        return self.project(labels, varying(labels) - axes)

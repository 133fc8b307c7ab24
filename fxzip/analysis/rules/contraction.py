"""Contractions: what is summed over becomes equal in both operands, what is free goes on.

Each call is brought to letters, as in einsum. On letters that both operands know (batch and contracted) fields are
related as elementwise; a field that also varies along letters which the other operand does not know (tokens,
positions) is first made the same along them. A contracted field that varies along letters that remain leaves one
block label per place there: attention heads, the groups of a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .axis_labels import AxisLabels, Operand, compress, varying
from .constraint_store import ConstraintStore
from .invocation import Invocation
from .label_patterns import across
from .meeting import apart, meet, merged_fields, note_blocks


def _spread(store: ConstraintStore, labels: Tensor, axes: frozenset[int]) -> Tensor:
    """Make a field the same along `axes`. Blocks move alike at all places of these, but hold what is at theirs."""
    if axes & varying(labels) and store.holds_blocks(labels):
        store.fix(labels, axes, "what it meets is the same at all these places")
        whole = store.project(labels, varying(labels) - axes)
        assert whole is not None
        return whole
    for axis in sorted(axes & varying(labels)):
        whole = labels.amax(axis, keepdim=True)  # a feature, if there is one at any place
        store.equal(labels, whole)
        labels = torch.where(whole > 0, whole, labels.amin(axis, keepdim=True))
    return labels


def contract(store: ConstraintStore, x: Operand, y: Operand, spec: str, what: str) -> AxisLabels:
    """Axis labels of einsum(spec, x, y), axes in the order of the result's letters.

    Letters in the result are kept, all others are summed over.
    """
    left, right, out = spec.replace("->", ",").split(",")
    letters = "".join(dict.fromkeys(out + left + right))
    first_reads = _lies_along(x, left, out) and not _lies_along(y, right, out)
    x = x.place([letters.index(c) for c in left], len(letters))
    y = y.place([letters.index(c) for c in right], len(letters))
    summed = frozenset(i for i, c in enumerate(letters) if c not in out)
    known = frozenset(letters.index(c) for c in left) & frozenset(letters.index(c) for c in right)
    x, y = apart(store, [x, y])
    fx = [_spread(store, f, varying(f) - known) if _sums(f, y, summed) else f for f in x.fields]
    fy = [_spread(store, g, varying(g) - known) if _sums(g, x, summed) else g for g in y.fields]

    for own in (fx, fy):
        for i, f in enumerate(own):
            for g in own[:i]:
                if not across(f, g):  # else a view has laid them along one axis, and may take them apart again
                    store.relate(f, g)

    for f in fx:
        for g in fy:
            store.relate(f, g)

    _roles(store, (x, fx), (y, fy), summed, known, first_reads)
    why = f"{what} meets it with values that carry no feature"

    groups: list[list[Tensor]] = []
    for own, other in ((fx, y), (fy, x)):
        fields = [f for f in own if not store.fix(f, other.loose & known, why)]  # what cannot move is dropped
        rest = [store.project(f, varying(f) - summed) if varying(f) & summed else f for f in fields]
        groups += _unrelated([_trim(f, len(out)) for f in rest if f is not None])

    return merged_fields([tuple(group) for group in groups])


def _unrelated(fields: Sequence[Tensor]) -> list[list[Tensor]]:
    """Fields of one operand, those in a group that were not related since they lie across each other."""
    groups: list[list[Tensor]] = []
    for f in fields:
        group = next((group for group in groups if all(across(f, g) for g in group)), None)
        if group is None:
            groups.append([f])
        else:
            group.append(f)
    return groups


def _sums(labels: Tensor, other: Operand, summed: frozenset[int]) -> bool:
    """Whether a field meets a labelled field of the other operand on a letter that is summed over."""
    axes = varying(labels) & summed
    return any(axes & varying(g) for g in other.fields)


def _trim(labels: Tensor, ndim: int) -> Tensor:
    return labels.reshape(labels.shape[:ndim])


def _lies_along(operand: Operand, letters: str, out: str) -> bool:
    """Whether the last axis in memory is summed over, as in a weight [outputs, inputs]."""
    strides = zip(letters, operand.tensor.shape, operand.tensor.stride(), strict=True)
    return any(step == 1 and size > 1 and letter not in out for letter, size, step in strides)


def _roles(
    store: ConstraintStore, left: tuple[Operand, list[Tensor]], right: tuple[Operand, list[Tensor]],
    summed: frozenset[int], known: frozenset[int], first_reads: bool,
) -> None:  # fmt: skip
    """Who unmerges: the parameter's side of a sum; where both sides are activations only relabelling is exact.

    `left`, `right`: the operands, and their fields made the same along what the other does not know. Of two parameters'
    sides it is the second, as in `F.linear(queries, weight)`, unless the first alone is laid out like a weight
    (`first_reads`), as in a product U @ V that is used as one.
    """
    (x, fx), (y, fy) = left, right
    if not x.static and not y.static:
        for labels in (*fx, *fy):
            if varying(labels) & summed:
                store.touch("dual", labels)
        return

    weight, other = (x, y) if not y.static or (x.static and first_reads) else (y, x)
    for labels in weight.fields:
        if varying(labels) & summed:
            store.consume(labels)
        elif not other.static:  # of two parameters multiplied the product's use will tell
            store.touch("param", labels)
            if varying(labels) - known:  # others meet what the activations have already: positions, frequencies
                store.touch("written", labels)

    for labels in other.fields if other.static else ():
        if varying(labels) & summed:  # it writes what the other sums over
            store.touch("param", labels)
            store.touch("written", labels)


def _plus(call: Invocation, bias: Tensor | None, fields: AxisLabels, ndim: int, first: int | None = None) -> AxisLabels:
    """Add a bias: aligned from the right, or (a convolution's) along axis `first`."""
    if bias is None:
        return fields
    b = call.operand(bias)
    axes = range(ndim - b.ndim, ndim) if first is None else range(first, first + b.ndim)
    # Where the product has no field its places differ, but cannot move: of a filter for each channel of an image, say.
    loose = frozenset(a for a, size in enumerate(call.out.shape) if size > 1).difference(*map(varying, fields))
    result, placed = Operand(call.out, fields, False, loose), b.place(axes, ndim)
    if first is None:
        note_blocks(call, [(None, result), (bias, placed)])
    return meet(call.store, [result, placed], f"`{call.name}`")


_SPECS = {
    "mm": "ik,kj->ij", "bmm": "bik,bkj->bij", "mv": "ik,k->i", "dot": "k,k->", "vdot": "k,k->",
    "addmm": "ik,kj->ij", "baddbmm": "bik,bkj->bij", "addmv": "ik,k->i",
}  # fmt: skip


def product(call: Invocation) -> AxisLabels:
    """mm(x, y), bmm, mv, dot; addmm(bias, x, y), baddbmm, addmv: a bias is aligned from the right."""
    biased = "add" in call.name
    x, y = (call.operand(factor) for factor in call.args[biased : biased + 2])
    if call.name in ("bmm", "baddbmm"):
        factors = call.args[biased : biased + 2]
        for factor, other in zip(factors, (y, x), strict=True):
            if any({0} < varying(labels) for labels in other.fields):  # heads, each with features of its own
                call.lies_in_blocks(factor, 0)
    fields = contract(call.store, x, y, _SPECS[call.name], f"`{call.name}`")
    return _plus(call, call.args[0] if biased else None, fields, call.out.ndim)


def _grouped(operand: Operand, axis: int, groups: int) -> Operand:
    """Split an axis of n into (groups, n / groups)."""
    tensor = operand.tensor
    shape = list(tensor.shape)

    fields = []
    for labels in operand.fields:
        sizes = list(labels.shape)
        split = [1, 1] if sizes[axis] == 1 else [groups, sizes[axis] // groups]
        fields.append(compress(labels.reshape(sizes[:axis] + split + sizes[axis + 1 :])))

    own = {axis, axis + 1} if axis in operand.loose else set()
    loose = frozenset(own | {a + (a > axis) for a in operand.loose if a != axis})
    view = tensor.reshape([*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :]])
    loose = frozenset(a for a in loose if view.shape[a] > 1)

    return Operand(view, tuple(fields), operand.static, loose)


def convolution(call: Invocation) -> AxisLabels:
    """convolution(x, w, bias, stride, padding, dilation, transposed, output_padding, groups), any dimension.

    w is [O, C/g, *k], transposed [C, O/g, *k]. Kernel places are fixed; features may vary over positions only along
    axes on which every place is computed from the same place alone.
    """
    x, w = call.operand(call.args[0]), call.operand(call.args[1])
    transposed, groups = bool(call.args[6]), int(call.args[8])
    store = call.store
    if groups > 1 and w.tensor.shape[1] > 1:
        own = w
        call.restart(call.args[1], lambda: _group_fields(store, own, groups), groups)
        w = call.operand(call.args[1])

    spatial = frozenset(range(2, x.ndim))
    apart = _places_apart(call, w.tensor)
    flat, passed = [], []

    for labels in x.fields:
        if varying(labels) <= apart:
            passed.append(labels)
            continue
        store.fix(labels, spatial, "`convolution` mixes neighbouring places")
        rest = store.project(labels, varying(labels) - spatial)
        if rest is not None:
            flat.append(rest)

    kernel = []
    for labels in w.fields:
        store.fix(labels, spatial, "a kernel has places, not features")
        rest = store.project(labels, varying(labels) - spatial)
        if rest is not None:
            kernel.append(rest)
    x = _grouped(_first_place(x, tuple(flat)), 1, groups)
    w = _grouped(_first_place(w, tuple(kernel)), 0, groups)
    spec = "ngc,gco->ngo" if transposed else "ngc,goc->ngo"
    fields = contract(store, x, w, spec, "`convolution`")
    channels = [groups, call.out.shape[1] // groups]
    ones = [1] * len(spatial)

    joined = []
    for labels in fields:
        if varying(labels) & {1, 2}:
            labels = labels.expand(labels.shape[0], *channels)
        joined.append(labels.reshape([labels.shape[0], -1, *ones]))

    return _plus(call, call.args[2], (*joined, *passed), call.out.ndim, first=1)


def _places_apart(call: Invocation, kernel: Tensor) -> frozenset[int]:
    """Spatial axes along which every place is computed from the same place alone: kernel and stride 1, no padding."""
    stride, padding, output_padding = call.args[3], call.args[4], call.args[7]
    sizes = zip(kernel.shape[2:], *(_each(v, kernel.ndim - 2) for v in (stride, padding, output_padding)), strict=True)
    return frozenset(axis + 2 for axis, found in enumerate(sizes) if found == (1, 1, 0, 0))


def _each(amounts: list[int], count: int) -> list[int]:
    return list(amounts) * (count if len(amounts) == 1 else 1)


def _first_place(operand: Operand, fields: AxisLabels) -> Operand:
    """The operand at its first spatial place, where only axes 0 and 1 are left."""
    tensor = operand.tensor
    while tensor.ndim > 2:
        tensor = tensor.select(2, 0)
    flat = tuple(labels.reshape(labels.shape[:2]) for labels in fields)
    return Operand(tensor, flat, operand.static, operand.loose & {0, 1})


def _group_fields(store: ConstraintStore, w: Operand, groups: int) -> AxisLabels:
    """Axis labels of a grouped kernel: one over axis 0, and one over (group, axis 1), since groups share no weights."""
    rows, columns = w.tensor.shape[:2]
    tail = [1] * (w.ndim - 2)
    first = store.fresh(rows, 1, *tail)
    second = store.fresh(groups, columns).repeat_interleave(rows // groups, 0).reshape(rows, columns, *tail)
    return first, second

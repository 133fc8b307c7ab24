"""Operands that meet at the same places: which of their fields are related, and what the result carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from .axis_labels import AxisLabels, Operand, all_features, joint, varying
from .constraint_store import ConstraintStore
from .invocation import Invocation


def merged_fields(groups: Sequence[AxisLabels]) -> AxisLabels:
    """Axis labels of the result where operands met: of fields that are related, the finer one is kept.

    `groups` holds one tuple of fields per operand, in the result's axes. Fields of one operand are never related.
    """
    kept: list[tuple[int, Tensor]] = []
    entries = [(index, labels) for index, fields in enumerate(groups) for labels in fields]
    entries.sort(key=lambda entry: -len(varying(entry[1])))

    for index, labels in entries:
        for at, (owner, other) in enumerate(kept):
            if owner != index and varying(labels) <= varying(other):
                if varying(labels) == varying(other):
                    kept[at] = (owner, joint(other, labels))
                break
        else:
            if varying(labels):
                kept.append((index, labels))

    return tuple(labels for _, labels in kept)


def _relate_all(store: ConstraintStore, operands: Sequence[Operand]) -> None:
    """Relate the fields of all pairs. Those over the same axes become equal: of n, n - 1 pairs say it all, as long as
    all their places hold features."""
    alike: dict[frozenset[int], set[int]] = {}  # ids of fields that are known to be equal
    for i, x in enumerate(operands):
        for g in (g for y in operands[:i] for g in y.fields):
            for f in x.fields:
                known = alike.setdefault(varying(f), set())
                if id(f) in known and id(g) in known:
                    continue
                store.relate(f, g)
                if varying(f) == varying(g) and (not known or known & {id(f), id(g)}):
                    known |= {id(h) for h in (f, g) if all_features(h)}


def _touch(store: ConstraintStore, x: Operand, others: Sequence[Operand]) -> None:
    """Note that a parameter meets activations; axes that only it has, it brings in: features that it writes."""
    known = frozenset(axis for y in others for axis in y.loose.union(*map(varying, y.fields)))
    for labels in x.fields:
        store.touch("param", labels)
        if x.learned and not varying(labels) & known:
            store.touch("written", labels)


def note_blocks(call: Invocation, met: Sequence[tuple[Tensor | None, Operand]]) -> None:
    """Of operands that meet elementwise, in the result's axes: parameters that meet features which lie in blocks, over
    two axes, have features in these blocks too."""
    blocks = {axes for _, x in met for labels in x.fields if len(axes := tuple(sorted(varying(labels)))) == 2}
    for tensor, x in met:
        if tensor is None or not x.static or len(x.fields) < 2:
            continue
        for axes in blocks:
            first, *others = (axis - call.out.ndim + tensor.ndim for axis in axes)
            call.lies_in_blocks(tensor, first, others)


def apart(store: ConstraintStore, operands: Sequence[Operand]) -> list[Operand]:
    """Operands of which no fields lie across each other where they meet those of others."""
    axes = [frozenset[int]().union(*map(varying, x.fields)) for x in operands]
    others = [frozenset[int]().union(*axes[:i], *axes[i + 1 :]) for i in range(len(operands))]
    return [replace(x, fields=store.apart(x.fields, met)) for x, met in zip(operands, others, strict=True)]


def meet(store: ConstraintStore, operands: Sequence[Operand], what: str) -> AxisLabels:
    """Operands (placed in the same axes) meet elementwise: relate their fields, return the result's fields.

    A field that cannot move any more is dropped: its axes count as unlabelled from here on, which says the same.
    """
    dead: set[int] = set()
    operands = apart(store, operands)
    _relate_all(store, operands)

    for i, x in enumerate(operands):
        for j, y in enumerate(operands):
            if i != j:
                for f in x.fields:
                    if store.fix(f, y.loose, f"{what} meets it with values that carry no feature"):
                        dead.add(id(f))

    if any(not x.static for x in operands):
        for x in operands:
            if x.static:
                _touch(store, x, [y for y in operands if y is not x])

    return merged_fields([tuple(f for f in x.fields if id(f) not in dead) for x in operands])

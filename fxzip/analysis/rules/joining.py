"""Calls that lay tensors behind one another, and what operands without labels put there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .axis_labels import FIXED, VOID, AxisLabels, Operand, varying
from .invocation import Invocation


def filler(operand: Operand, axes: frozenset[int], others: Sequence[Operand] = ()) -> int:
    """What an operand without labels along `axes` puts there: nothing, if its values are the same everywhere.

    Nothing has one value: beside `others` that put nothing there it does so only if they are the same constant.
    """
    if axes & operand.loose.union(*map(varying, operand.fields)):
        return FIXED
    alike = all(_constant(operand) is not None and _constant(operand) == _constant(other) for other in others)
    return VOID if alike else FIXED


def _constant(operand: Operand) -> float | complex | bool | None:
    """The one value that an operand has everywhere, if that is known."""
    if not operand.known or operand.loose or operand.fields or not operand.tensor.numel():
        return None
    value: float | complex | bool = operand.tensor[(0,) * operand.ndim].item()
    return value


def cat(call: Invocation) -> AxisLabels:
    """cat: labels are concatenated along `dim`; features along other axes are the same in all parts."""
    parts = [call.operand(part) for part in call.args[0] if part.numel()]  # what is empty says nothing
    if not parts:
        return ()
    dim = call.arg(1, "dim", 0) % parts[0].ndim
    return joined(call, parts, dim)


def stack(call: Invocation) -> AxisLabels:
    """stack: cat along a new axis."""
    dim = call.arg(1, "dim", 0) % call.out.ndim
    parts = []
    for tensor in call.args[0]:
        part = call.operand(tensor)
        fields = tuple(labels.unsqueeze(dim) for labels in part.fields)
        loose = frozenset(axis + (axis >= dim) for axis in part.loose)
        parts.append(Operand(tensor.unsqueeze(dim), fields, part.static, loose, part.learned, part.known))
    return joined(call, parts, dim)


def joined(call: Invocation, parts: list[Operand], dim: int) -> AxisLabels:
    """Axis labels of operands that follow one another along `dim`."""
    keys = {varying(labels) - {dim} for part in parts for labels in part.fields}

    result: list[Tensor] = []
    for key in sorted(keys, key=sorted):
        found = [[labels for labels in part.fields if varying(labels) - {dim} == key] for part in parts]
        for part, several in zip(parts, found, strict=True):
            for extra in several[1:]:
                call.store.pin(extra, f"`{call.name}` joins axes with several kinds of features")
            if not several:
                for other in found:
                    for labels in other[:1]:
                        call.store.fix(labels, key & part.loose, f"`{call.name}` joins it with unlabelled values")
        first = [several[0] if several else None for several in found]
        if key and all(labels is None or labels.shape[dim] == 1 for labels in first):
            whole, *present = [labels for labels in first if labels is not None]
            for labels in present:
                whole = call.store.agree(whole, labels)
            result.append(whole)
            continue
        result.append(_concatenate(parts, first, key, dim))

    return tuple(labels for labels in result if varying(labels))


def _concatenate(parts: list[Operand], fields: list[Tensor | None], key: frozenset[int], dim: int) -> Tensor:
    pieces: list[Tensor] = []

    empty: list[Operand] = []  # what put VOID in so far
    for part, labels in zip(parts, fields, strict=True):
        shape = [size if axis == dim or axis in key else 1 for axis, size in enumerate(part.tensor.shape)]
        if labels is None:
            piece = torch.full(shape, filler(part, frozenset({dim}), empty), device="cpu")
        else:
            piece = torch.where(labels == VOID, FIXED, labels) if empty else labels
            piece = piece.expand(shape)
        if bool((piece == VOID).any()):
            empty.append(part)
        pieces.append(piece)

    return torch.cat(pieces, dim)

"""Which values of a graph share memory: what an in-place call writes can be seen through all of them.

Memory is followed along the graph: a value lies in the memory of an input of its node if the run shows it, or if the
call is one that returns its input or a copy of it depending on sizes (`reshape`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..containers import leaves
from ..inputs import Call, map_tensors
from .execution import flat_inputs, quiet_execution

_STATE = 0  # the memory of parameters and buffers, which outlives a call
_MAYBE_COPIES = frozenset(["reshape", "flatten", "contiguous", "to", "type", "type_as", "float", "double", "half"])


Elements = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""Bytes of one element, offset, shape, strides."""


@dataclass(frozen=True)
class Piece:
    """A tensor's place: the number of its memory, and its elements there (None: unknown)."""

    memory: int
    elements: Elements | None

    def meets(self, other: Piece) -> bool:
        """Whether the two have an element in common, as far as can be told.

        >>> left, right = Piece(1, (4, 0, (3, 2), (4, 1))), Piece(1, (4, 2, (3, 2), (4, 1)))
        >>> left.meets(left), left.meets(right)
        (True, False)
        """
        if self.memory != other.memory:
            return False
        if self.elements is None or other.elements is None or self.elements[0] != other.elements[0]:
            return True
        mine, theirs = _places(*self.elements[1:]), _places(*other.elements[1:])
        if not mine.numel() or not theirs.numel():
            return False
        marks = torch.zeros(int(max(mine.max(), theirs.max())) + 1, dtype=torch.bool)
        marks[mine] = True
        return bool(marks[theirs].any())


def _places(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Where the elements lie, each once along axes of stride 0."""
    places = torch.tensor([offset])
    for size, step in zip(shape, stride, strict=True):
        places = (places[:, None] + step * torch.arange(min(size, 1) if step == 0 else size)).reshape(-1)
    return places


@dataclass
class _Value:
    pieces: list[Piece] = field(default_factory=list)
    storages: dict[int, int] = field(default_factory=dict)  # address -> number of the memory; while the value lives


class Memory(fx.Interpreter):
    """Runs a graph once and notes where each node's value lies."""

    def __init__(self, module: fx.GraphModule, call: Call) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.values: dict[fx.Node, _Value] = {}
        self.count = _STATE
        self.state = {_storage(t): _STATE for t in (*module.parameters(), *module.buffers())}
        own = map_tensors(lambda value: value.detach().clone(), call)
        with quiet_execution():
            torch.manual_seed(0)
            self.run(*flat_inputs(module, own))

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        inputs = [self.values[node] for node in n.all_input_nodes]
        known = self.state | {key: number for value in inputs for key, number in value.storages.items()}
        value = self.values[n] = _Value()
        for tensor in _tensors(result):
            key = _storage(tensor)
            if key not in known:
                self.count += 1
                known[key] = self.count
            value.storages[key] = known[key]
            elements = (tensor.element_size(), int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())
            value.pieces.append(Piece(known[key], elements))
        if getattr(n.target, "__name__", str(n.target)).split(".")[0] in _MAYBE_COPIES:
            own = {piece.memory for piece in value.pieces}
            value.pieces += [Piece(m, None) for given in inputs for m in {p.memory for p in given.pieces} - own]
        return result

    def seen_elsewhere(self, written: fx.Node, redirected: set[fx.Node], later: set[fx.Node]) -> bool:
        """Whether a write into the value of `written` outlives the call, or is seen by a node of `later` that reads an
        older value, other than those `redirected`."""
        pieces = self.values[written].pieces
        if any(piece.memory == _STATE for piece in pieces):
            return True
        return any(
            piece.meets(other)
            for source, value in self.values.items()
            if source not in redirected and source not in later and not later.isdisjoint(source.users)
            for piece in pieces
            for other in value.pieces
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    yield from (leaf for leaf in leaves(value) if leaf.layout == torch.strided)


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)

"""Which values of a graph share memory: what an in-place call writes can be seen through all of them.

Memory is followed along the graph: a value lies in the memory of an input of its node if the run shows it, or if the
call is one that returns its input or a copy of it depending on sizes (`reshape`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .aten_calls import run
from .calls import Call, map_tensors
from .containers import leaves
from .execution import Writes, quiet_execution, storage_of

_STATE = 0  # numbers up to it are memory of parameters and buffers, which outlives a call
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
        marks = torch.zeros(int(max(mine.max(), theirs.max())) + 1, dtype=torch.bool, device="cpu")
        marks[mine] = True
        return bool(marks[theirs].any())


def _places(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Where the elements lie, each once along axes of stride 0."""
    places = torch.tensor([offset], device="cpu")
    for size, step in zip(shape, stride, strict=True):
        places = (places[:, None] + step * torch.arange(min(size, 1) if step == 0 else size, device="cpu")).reshape(-1)
    return places


@dataclass
class _Value:
    pieces: list[Piece] = field(default_factory=list)
    storages: dict[int, int] = field(default_factory=dict)  # address -> number of the memory; while the value lives


class Memory:
    """Runs a graph once and notes where each node's value lies."""

    def __init__(self, module: fx.GraphModule, call: Call) -> None:
        self.values: dict[fx.Node, _Value] = {}
        self.writes: dict[fx.Node, frozenset[int]] = {}
        self.count = _STATE
        held = dict.fromkeys(storage_of(t) for t in (*module.parameters(), *module.buffers()))
        self.state = {storage: _STATE - place for place, storage in enumerate(held)}
        own = map_tensors(lambda value: value.detach().clone(), call)
        with quiet_execution(), Writes() as self._seen:
            run(module, own, on_node=self._place)

    def _place(self, n: fx.Node, result: Any) -> Any:
        written = self._seen.since_last()
        inputs = [self.values[node] for node in n.all_input_nodes]
        known = self.state | {key: number for value in inputs for key, number in value.storages.items()}
        self.writes[n] = frozenset(known[key] for key in written if key in known)
        value = self.values[n] = _Value()
        for tensor in _tensors(result):
            key = storage_of(tensor)
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
        if any(piece.memory <= _STATE for piece in pieces):
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


@dataclass(frozen=True)
class Sharing:
    """What memory the nodes of a program see and write, by node name; memories are numbers.

    Attributes:
        values: where the value of a node lies.
        sees: what a node may read: where its inputs, its own parameters and buffers, and its value lie.
        writes: what a node writes in place that was there before it.
        pieces: the tensors of which a value is made, with their places.
    """

    values: Mapping[str, frozenset[int]] = field(default_factory=dict)
    sees: Mapping[str, frozenset[int]] = field(default_factory=dict)
    writes: Mapping[str, frozenset[int]] = field(default_factory=dict)
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)

    def written_by(self, names: Collection[str]) -> frozenset[int]:
        """The memories that some nodes write."""
        return frozenset[int]().union(*(own for name, own in self.writes.items() if name in names))

    def writes_state(self, name: str) -> bool:
        """Whether a node writes into a parameter or buffer."""
        return any(memory <= _STATE for memory in self.writes.get(name, ()))


def sharing(module: fx.GraphModule, call: Call, mutators: Collection[str]) -> Sharing:
    """Run a program that writes in place, and tell who shares memory. `mutators`: names of the nodes that write.

    >>> module = fx.symbolic_trace(lambda x: (x[0].relu_(), x + 1))
    >>> found = sharing(module, Call((torch.ones(2, 3),), {}), ["relu_"])
    >>> found.writes["relu_"] == found.values["x"], found.values["add"] == found.values["x"]
    (True, False)
    """
    memory = Memory(module, call)
    values = {n.name: frozenset(piece.memory for piece in value.pieces) for n, value in memory.values.items()}
    sees, writes = {}, {}
    for node in memory.values:
        seen = values[node.name].union(*(values[source.name] for source in node.all_input_nodes))
        if node.op == "call_module":
            held = module.get_submodule(str(node.target))
            seen |= {memory.state[storage_of(t)] for t in (*held.parameters(), *held.buffers())}
        sees[node.name] = seen
        if node.name in mutators:
            writes[node.name] = memory.writes[node] or seen  # one that did not write on this input may do so on another
    return Sharing(values, sees, writes, {n.name: tuple(value.pieces) for n, value in memory.values.items()})

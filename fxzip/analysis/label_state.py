"""What is known while labels are pushed through a run: the fields of every live tensor, and what the calls said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .rules import AxisLabels, ConstraintStore, Operand, Rule, varying

_VALUES_COMPARED = 1 << 22  # constants above this size count as different everywhere


@dataclass(frozen=True, eq=False)
class ParamLabels:
    """Labels of one parameter or buffer: one field per labelled axis. `groups` > 1: a grouped kernel, whose second
    field varies with the group (see `rules.contraction.convolution`)."""

    fields: AxisLabels
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Site:
    """A place where features can be watched: argument `arg` (-1: the result) of the `call`-th ATen call of a node.

    `name`, `nth`: the call as the `nth` of its name in the node, which holds whatever torch does between such calls.
    """

    node: str
    call: int
    arg: int
    labels: Tensor
    shape: torch.Size
    consumed: bool
    name: str = ""
    nth: int = 0


@dataclass(frozen=True)
class Probed:
    """A call without a rule whose effect on labels was found out by trial (see `rules.probing`)."""

    node: str
    call: str
    reason: str


@dataclass(frozen=True)
class Barrier:
    """A call without a rule: features stop being shared here."""

    node: str
    call: str
    reason: str


@dataclass
class Entry:
    """A live tensor: its fields, whether it is the same for every input, and whether parameters went into it.

    `known`: neither input nor parameters went into its values (though its shape may be that of the input), so that they
    may be looked at. `uniform`: axes along which the values are the same whatever the input and the parameters.
    `numbers`: where it holds numbers of places (the second result of `max` along an axis), what states that these
    places stay; that holds only where they are used.
    """

    tensor: Tensor
    fields: AxisLabels
    static: bool
    learned: bool
    known: bool = False
    uniform: frozenset[int] = frozenset()
    numbers: Callable[[], None] | None = None

    def used(self) -> None:
        """Numbers of places are used here."""
        if self.numbers is not None:
            self.numbers()


@dataclass
class State:
    rules: Mapping[str, Rule]
    store: ConstraintStore = field(default_factory=ConstraintStore)
    held: dict[int, Entry] = field(default_factory=dict)  # parameters and buffers, by id
    entries: dict[int, Entry] = field(default_factory=dict)  # what the run makes, by id
    names: dict[int, str] = field(default_factory=dict)
    params: dict[str, ParamLabels] = field(default_factory=dict)
    touches: set[str] = field(default_factory=set)
    seen: dict[int, Tensor] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    tally: Counter[tuple[str, str]] = field(default_factory=Counter)  # sums by node and name
    barriers: list[Barrier] = field(default_factory=list)
    probed: list[Probed] = field(default_factory=list)
    made: list[int] = field(default_factory=list)  # ids of the entries of the node under way
    node: str = ""
    where: str = ""
    calls: int = 0

    def entry(self, tensor: Tensor) -> Entry:
        found = self.held.get(id(tensor)) or self.entries.get(id(tensor))
        if found is None:
            found = self.file(Entry(tensor, (), True, False, True))
        return found

    def file(self, entry: Entry) -> Entry:
        """Remember what is known about a tensor that the run has made."""
        self.entries[id(entry.tensor)] = entry
        self.made.append(id(entry.tensor))
        return entry

    def operand(self, tensor: Tensor) -> Operand:
        entry = self.entry(tensor)
        covered = frozenset(a for labels in entry.fields for a in varying(labels))
        loose = frozenset(range(tensor.ndim)) - covered - self.uniform(tensor, covered)
        return Operand(tensor, entry.fields, entry.static, loose, entry.learned, entry.known)

    def uniform(self, tensor: Tensor, apart: frozenset[int] = frozenset()) -> frozenset[int]:
        """Axes (others than `apart`) along which the values are the same whatever the input and the parameters."""
        entry = self.entry(tensor)
        axes = enumerate(zip(tensor.shape, _strides(tensor), strict=True))
        same = entry.uniform | {a for a, (n, s) in axes if n == 1 or not s}
        if entry.known and tensor.numel() <= _VALUES_COMPARED:
            same |= {a for a in range(tensor.ndim) if a not in same | apart and _same_along(tensor, a)}
        return same

    def lies_in_parameter(self, tensor: Tensor) -> bool:
        """Whether it is a parameter or a view of one."""
        storage = tensor.untyped_storage()._cdata
        return any(
            isinstance(entry.tensor, nn.Parameter) and entry.tensor.untyped_storage()._cdata == storage
            for entry in self.held.values()
        )

    def restart(self, tensor: Tensor, fields: Any, groups: int) -> None:
        name = self.names.get(id(tensor))
        if name is not None and self.params[name].groups != groups:
            self.params[name] = ParamLabels(fields(), groups)
            self.entry(tensor).fields = self.params[name].fields


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides; those of a tensor without any (a sparse one) count as none of them 0."""
    return tensor.stride() if tensor.layout == torch.strided else (1,) * tensor.ndim


def _same_along(tensor: Tensor, axis: int) -> bool:
    return not tensor.numel() or bool((tensor == tensor.narrow(axis, 0, 1)).all())


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))

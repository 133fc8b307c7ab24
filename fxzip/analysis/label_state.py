"""What is known while labels are pushed through a run: the fields of every live tensor, and what the calls said."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .parameter_labels import ParamLabels
from .rules import AxisLabels, ConstraintStore, Operand, Rule, varying
from .solver import components

_IN_BLOCKS = 4096  # features of all blocks: more of them are labelled by axes, which says less and costs less
_VALUES_COMPARED = 1 << 22  # constants above this size count as different everywhere


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
    lying: dict[str, tuple[int, ...]] = field(default_factory=dict)  # parameter -> axes, see `ParamLabels.lying`
    classes: tuple[tuple[int, int], Tensor] | None = None  # those of labels, and what they were found from
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

    def touch(self, tensor: Tensor) -> None:
        """A call reads it; of a parameter whose blocks have features of their own, blocks move in all fields alike."""
        name = self.names.get(id(tensor))
        if name is not None:
            self.touches.add(name)
            labels = self.params[name]
            if labels.order is not None and labels.groups > 1:
                self.store.relate(*labels.fields)

    def lies_in_blocks(self, tensor: Tensor, blocks: int, others: Collection[int] = ()) -> None:
        """Note that a call meets a parameter, or a view of one, block by block along an axis; with `others`, if it has
        features along these axes too."""
        entry = self.entry(tensor)
        if not (entry.static and entry.learned):
            return
        single = {min(varying(labels)): labels for labels in entry.fields if len(varying(labels)) == 1}
        held = [self._axis_of(single[axis]) if axis in single else None for axis in (blocks, *others)]
        found = [own for own in held if own is not None]
        if len(found) < len(held) or len({name for name, _ in found}) > 1:
            return
        name, axis = found[0]
        sizes = [labels.numel() for labels in self.params[name].fields]
        fits = len(sizes) in (2, 3) and single[blocks].numel() * max(sizes) <= _IN_BLOCKS
        if fits and len(self.lying.get(name, ())) != 1:
            self.lying[name] = (axis,)

    def _axis_of(self, labels: Tensor) -> tuple[str, int] | None:
        """The parameter, and the axis of it, that a field is the first labels of."""
        held = labels.unique()  # a view may hold them several times: one weight per head for each row of a batch
        for name, _, field_ in self._single():
            if torch.equal(field_.reshape(-1), held):  # fresh labels count up
                return name, min(varying(field_))
        return None

    def lie_at_once(self, first: Tensor, second: Tensor) -> None:
        """Note the parameters that have an axis with the features of each of two fields; a call lays both along one."""
        klass = self._classes()
        held = [self._with_classes(klass, klass[labels[labels > 0]].unique()) for labels in (first, second)]
        for name in held[0].keys() & held[1].keys():
            before = self.lying.get(name, ())
            axes = varying(held[0][name]) | varying(held[1][name])
            if axes & set(before):
                axes |= set(before)
            places = math.prod(run.numel() for run in self.params[name].fields if varying(run) <= axes)
            # Blocks say more, and of axes that are laid along two others only the first are noted.
            if len(axes) > 1 and len(before) != 1 and axes >= set(before) and places <= _IN_BLOCKS:
                self.lying[name] = tuple(sorted(axes))

    def lying_free(self, pinned: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
        """What `lying` says, without axes whose features keep their places anyway, as those of a kernel's places do."""
        klass = self._classes()
        held = torch.cat([torch.zeros(0, dtype=torch.int64, device="cpu"), *pinned])
        fixed = torch.zeros(self.store.size, dtype=torch.bool, device="cpu").index_fill_(0, klass[held], True)
        still = {(name, min(varying(run))) for name, _, run in self._single() if bool(fixed[klass[run]].all())}
        result = {}
        for name, axes in self.lying.items():
            kept = axes if len(axes) == 1 else tuple(axis for axis in axes if (name, axis) not in still)
            if len(axes) == 1 or len(kept) > 1:
                result[name] = kept
        return result

    def made_equal(self) -> set[str]:
        """The parameters with features along several axes at once of which calls have made some equal."""
        several = {n: own.fields[0] for n, own in self.params.items() if own.order is not None and own.groups == 1}
        if not several:
            return set()
        klass = self._classes()
        return {name for name, labels in several.items() if len(klass[labels].unique()) < labels.numel()}

    def _classes(self) -> Tensor:
        """For each label the class of those that all calls so far say are equal."""
        so_far = len(self.store.equated), self.store.size
        if self.classes is None or self.classes[0] != so_far:
            stated = [torch.zeros(2, 1, dtype=torch.int64, device="cpu"), *self.store.equated]
            self.classes = so_far, torch.from_numpy(components(torch.cat(stated, 1).numpy(), self.store.size))
        return self.classes[1]

    def _with_classes(self, klass: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """The fields of parameters, by name, whose features are of these classes, of all of them and of no other."""
        among = set(wanted.tolist())
        classes = klass.numpy()
        # Nearly all fields are told apart by their first label. To sort every one of them for each call takes seconds.
        near = ((name, run) for name, first, run in self._single() if classes[first] in among)
        return {name: run for name, run in near if torch.equal(klass[run].unique(), wanted)}

    def _single(self) -> Iterator[tuple[str, int, Tensor]]:
        """The fields, and the first label of each, of all parameters that have one field for each axis."""
        for name, own in self.params.items():
            if own.order is None and own.groups == 1:
                yield from ((name, first, labels) for first, labels in zip(own.firsts, own.fields, strict=True))

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

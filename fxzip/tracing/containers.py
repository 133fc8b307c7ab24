"""Containers of tensors: what networks take and return, of whatever class, as a list of leaves and a structure.

Tuples, lists, dicts and named tuples are known. Any other object is taken apart and put together again as `copy` does
it, by `__reduce_ex__` (PEP 307): by the function that makes it, that function's arguments, its attributes and its
items. So dataclasses, subclasses of dict and list, `UserDict`, namespaces, outputs of other libraries and plain objects
with attributes are all one case, and no class has to be registered anywhere.

For every value v, with leaves(v) its tensors in order:

    structure(v).build(leaves(v))  is like v, and shares no container with it.

What cannot be taken apart and holds tensors is an error, never a container without leaves.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from ..errors import ContainerError
from .structure import Recipe, Structure

_WHOLE = (
    type(None), bool, int, float, complex, str, bytes, bytearray, type, range, np.ndarray, np.generic, torch.Size,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, nn.Module, types.ModuleType,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, Tensor,
)  # fmt: skip
"""What is a constant where it is no leaf, whatever it refers to."""


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def flatten(value: Any, is_leaf: Callable[[Any], bool] = is_tensor) -> tuple[list[Any], Structure]:
    """All leaves in order, and the structure that holds them.

    >>> flatten({"a": [Tensor(), 3]})
    ([tensor([])], builtins.dict['a'](builtins.list(*0, 3)))

    Raises:
        ContainerError: leaves are held by what cannot be taken apart: an iterator, a set, an object that holds itself.
    """
    walk = _Walk(is_leaf)
    return walk.found, walk.structure(value)


def leaves(value: Any) -> list[Tensor]:
    """All tensors in a value, in order.

    >>> from types import SimpleNamespace
    >>> len(leaves(SimpleNamespace(a=torch.ones(1), b=[torch.ones(2), 3])))
    2
    """
    return flatten(value)[0]


def map_leaves(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with `function` applied to each of its tensors.

    >>> map_leaves(lambda t: t + 1, (torch.zeros(1), "a"))
    (tensor([1.]), 'a')
    """
    found, structure = flatten(value)
    return structure.build([function(leaf) for leaf in found])


def is_plain(value: Any) -> bool:
    """Whether a container is one that torch.fx has a notation for: a tuple, list, dict or named tuple.

    >>> from collections import OrderedDict
    >>> is_plain({}), is_plain(OrderedDict())
    (True, False)
    """
    return _kind(value) in (tuple, list, dict) or (isinstance(value, tuple) and hasattr(value, "_fields"))


def is_written(value: Any) -> bool:
    """Whether it is a container that torch.fx writes down as code: a plain one, whose keys it can write down, too.

    >>> from enum import Enum
    >>> Key = Enum("Key", "A")
    >>> is_written({"a": 1}), is_written({Key.A: 1})
    (True, False)
    """
    if isinstance(value, dict) and any(isinstance(key, Enum) for key in value):
        return False
    return is_plain(value) and (not hasattr(value, "_fields") or _named_tuples_are_written())


class _Named(NamedTuple):
    item: Any


@cache
def _named_tuples_are_written() -> bool:
    """Whether a graph may return a named tuple: its code in older versions of PyTorch does not know the class."""
    graph = fx.Graph()
    graph.output(_Named(graph.placeholder("x")))
    try:
        return bool(fx.GraphModule(nn.Module(), graph).forward(0) == _Named(0))
    except NameError:
        return False


def _kind(value: Any) -> type:
    """The class; list and dict for those of them that torch.fx made immutable."""
    kind: type = type(value)
    return list if kind is immutable_list else dict if kind is immutable_dict else kind


@dataclass
class _Walk:
    """Through a value, on the way to its structure.

    Attributes:
        found: leaves so far.
        above: ids of the objects that the value at hand is a part of.
        known: inside an object, places of its leaves by id: attributes and items may be the same tensors.
        cyclic: ids of objects that hold themselves.
    """

    is_leaf: Callable[[Any], bool]
    found: list[Any] = field(default_factory=list)
    above: list[int] = field(default_factory=list)
    known: dict[int, int] | None = None
    cyclic: set[int] = field(default_factory=set)

    def structure(self, value: Any) -> Structure:
        if self.is_leaf(value):
            return self._leaf(value)
        constant = Structure(type(value), constant=value)
        if isinstance(value, _WHOLE) or issubclass(type(value), fx.Proxy):  # which holds all of its graph
            return constant
        if id(value) in self.above:
            self.cyclic.add(id(value))
            return constant
        opened = _opened(value, self.is_leaf)
        if opened is None:
            return constant
        parts, keys, recipe = opened
        outer = self.known
        if recipe is not None and outer is None:
            self.known = {}
        self.above.append(id(value))
        own = tuple([self.structure(part) for part in parts])
        self.above.pop()
        self.known = outer
        if all(part.is_constant for part in own):
            return constant
        if id(value) in self.cyclic:
            raise _refused(value, "it holds itself")
        return Structure(_kind(value), own, None, keys, recipe)

    def _leaf(self, value: Any) -> Structure:
        place = len(self.found)
        if self.known is not None:
            place = self.known.setdefault(id(value), place)
        if place == len(self.found):
            self.found.append(value)
        return Structure(None, place=place)


def _opened(value: Any, is_leaf: Callable[[Any], bool]) -> tuple[Sequence[Any], tuple[Any, ...], Recipe | None] | None:
    """The parts of a container, its keys, and how it is made; None for what is no container."""
    if _kind(value) is dict:
        return list(value.values()), tuple(value), None
    if is_plain(value):
        return value, getattr(value, "_fields", ()), None
    if isinstance(value, Iterator) or (isinstance(value, (set, frozenset)) and any(map(is_leaf, value))):
        raise _refused(value, "its order or length is not known")
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # locks, handles, weak references
        reduced = ""
    if isinstance(reduced, tuple):
        given: list[Any] = [*reduced, None, None, None, None][:6]
        create, args, state, listed, keyed, setter = given
        pairs = list(keyed or ())
        own = state is value
        parts = (args, None if own else state, list(listed or ()), [item for _, item in pairs])
        return parts, tuple(key for key, _ in pairs), Recipe(create, setter, own)
    if any(map(is_leaf, _attributes(value))) or not _Walk(is_leaf).structure(_items(value)).is_constant:
        raise _refused(value, "it cannot be copied by `copy.copy`")
    return None


def _attributes(value: Any) -> list[Any]:
    """What an object holds at first hand."""
    own = getattr(value, "__dict__", None)
    return list(own.values()) if isinstance(own, Mapping) else []


def _items(value: Any) -> list[Any]:
    """What a collection without a copy holds: a view of a dict, or a dict that cannot be written to."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, Collection) else []


def _refused(value: Any, why: str) -> ContainerError:
    return ContainerError(
        f"Tensors must be in containers that can be taken apart; found some in a `{type(value).__name__}`, and {why}. "
        "Take or return a tuple, list, dict or dataclass instead."
    )


@dataclass(frozen=True)
class Part:
    """A call that takes one leaf out of a container, the `place`-th of `total`.

    >>> from types import SimpleNamespace
    >>> Part(0, 1)(SimpleNamespace(a=torch.ones(1)))
    tensor([1.])
    """

    place: int
    total: int

    @property
    def __name__(self) -> str:
        return "part"

    def __call__(self, container: Any) -> Any:
        found = leaves(container)
        if len(found) != self.total:
            raise ContainerError(
                f"A `{type(container).__name__}` must hold {self.total} tensors, as the sample input did; found "
                f"{len(found)}. Pass what the network was traced with."
            )
        return found[self.place]

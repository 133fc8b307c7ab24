"""How a value is put together of its leaves: plain data, and the call in a graph that does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class Structure:
    """How a value is put together; plain data.

    Attributes:
        kind: class of the container or constant; None for a leaf.
        parts: structures of its parts, in order; of an object those of arguments, attributes, listed and keyed items.
        constant: the value itself, if it holds no leaves.
        keys: of a dict, or of an object's keyed items.
        recipe: of an object, what makes it of its parts.
        place: of a leaf, its number.
    """

    kind: type | None
    parts: tuple[Structure, ...] = ()
    constant: Any = None
    keys: tuple[Any, ...] = ()
    recipe: Recipe | None = None
    place: int = 0

    @property
    def is_constant(self) -> bool:
        return self.kind is not None and not self.parts

    def build(self, leaves: Sequence[Any]) -> Any:
        """The value with other leaves.

        >>> Structure(dict, (Structure(None), Structure(int, constant=3)), keys=("a", "b")).build("x")
        {'a': 'x', 'b': 3}
        """
        if self.kind is None:
            return leaves[self.place]
        if self.is_constant:
            return self.constant
        parts = [part.build(leaves) for part in self.parts]
        if self.recipe is not None:
            return self.recipe.make(self.keys, *parts)
        if self.kind is dict:
            return dict(zip(self.keys, parts, strict=True))
        kind: Any = self.kind
        return kind(parts) if kind in (tuple, list) else kind(*parts)

    def places(self) -> list[int]:
        """Numbers of its leaves, each once, in order."""
        if self.kind is None:
            return [self.place]
        return list(dict.fromkeys(place for part in self.parts for place in part.places()))

    def renumbered(self, numbers: Mapping[int, int]) -> Structure:
        """The same with other numbers of leaves."""
        if self.kind is None:
            return replace(self, place=numbers[self.place])
        return replace(self, parts=tuple(part.renumbered(numbers) for part in self.parts))

    def __repr__(self) -> str:
        if self.kind is None:
            return f"*{self.place}"
        if self.is_constant:
            return repr(self.constant)
        name = f"{self.kind.__module__}.{self.kind.__qualname__}"
        return f"{name}{list(self.keys) if self.keys else ''}({', '.join(map(repr, self.parts))})"


@dataclass(frozen=True)
class Recipe:
    """What `__reduce_ex__` says of an object beside its parts: the function that makes it, the one that sets its
    attributes if that is not the usual one, and whether it is its own `__dict__`."""

    create: Callable[..., Any]
    setter: Callable[[Any, Any], Any] | None = None
    own_attributes: bool = False

    def make(self, keys: Sequence[Any], args: Any, state: Any, listed: Sequence[Any], keyed: Sequence[Any]) -> Any:
        """The object of its parts."""
        try:
            made = self.create(*args)
        except TypeError:  # an `OrderedDict` whose class wants arguments
            if args or not isinstance(self.create, type):
                raise
            kind: Any = self.create
            made = kind.__new__(kind)
        if self.own_attributes:
            made.__dict__ = made
        elif state is not None:
            _set_state(made, state, self.setter)
        for item in listed:
            made.append(item)
        for key, item in zip(keys, keyed, strict=True):
            made[key] = item
        return made


def _set_state(made: Any, state: Any, setter: Callable[[Any, Any], Any] | None) -> None:
    if setter is not None:
        setter(made, state)
    elif hasattr(made, "__setstate__"):
        made.__setstate__(state)
    else:
        attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        if attributes:
            made.__dict__.update(attributes)
        for key, item in (slots or {}).items():
            object.__setattr__(made, key, item)


@dataclass(frozen=True, eq=False)
class Rebuild:
    """A call that puts a container together again from its leaves: what a graph has instead of a constructor.

    >>> from collections import OrderedDict
    >>> from torch import Tensor
    >>> from fxzip.tracing.containers import flatten
    >>> dict(Rebuild(flatten(OrderedDict(a=Tensor()))[1])(7))
    {'a': 7}
    """

    structure: Structure

    @property
    def __name__(self) -> str:
        return str(self.structure.kind.__name__) if self.structure.kind is not None else "leaf"

    def __call__(self, *leaves: Any) -> Any:
        return self.structure.build(leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rebuild) and repr(self.structure) == repr(other.structure)

    def __hash__(self) -> int:
        return hash(repr(self.structure))


def notation(structure: Structure, leaves: Sequence[Any], create: Callable[[Rebuild, tuple[Any, ...]], Any]) -> Any:
    """The value as an argument of a node: plain containers as they are, for objects the node that builds them, which
    `create` makes.

    >>> from collections import OrderedDict
    >>> from torch import Tensor
    >>> from fxzip.tracing.containers import flatten
    >>> found, structure = flatten([Tensor(), OrderedDict(a=Tensor())])
    >>> notation(structure, "xy", lambda target, args: (target.__name__, args))
    ['x', ('OrderedDict', ('y',))]
    """
    named = isinstance(structure.constant, Enum) or any(isinstance(key, Enum) for key in structure.keys)
    if structure.recipe is not None or named:  # of members of an `Enum` torch.fx knows no code
        places = structure.places()
        own = structure.renumbered({place: number for number, place in enumerate(places)})
        return create(Rebuild(own), tuple(leaves[place] for place in places))
    if structure.kind is None or structure.is_constant:
        return structure.build(leaves)
    parts = [notation(part, leaves, create) for part in structure.parts]
    flat = tuple(Structure(None, place=place) for place in range(len(parts)))
    return replace(structure, parts=flat).build(parts)

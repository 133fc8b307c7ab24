"""Calls that take containers apart and put them together, as JSON: `Part` and `Rebuild`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import LoadError, SaveError
from ..tracing.containers import Part
from ..tracing.structure import Rebuild, Recipe, Structure
from .json_values import decoded, encoded, fields
from .stored_names import Names, name_of


def call_as_json(called: Any) -> Any:
    """What a node of a graph calls.

    >>> call_as_json(Part(0, 2)), call_as_json(len)
    ({'$part': [0, 2]}, ['builtins', 'len'])

    Raises:
        SaveError: it cannot be found again.
    """
    if type(called) is Part:
        return {"$part": [called.place, called.total]}
    if type(called) is Rebuild:
        return {"$rebuild": _structure(called.structure)}
    return list(name_of(called))


def call_of_json(stored: Any, names: Names) -> Callable[..., Any]:
    """The function.

    Raises:
        LoadError: it is none that a file may name.
    """
    if not isinstance(stored, dict):
        found: Callable[..., Any] = names.function(stored)
        return found
    if set(stored) == {"$part"}:
        held = stored["$part"]
        if isinstance(held, list) and len(held) == 2 and all(type(number) is int for number in held):
            return Part(*held)
        raise LoadError("a part is a place and a total")
    (structure,) = fields(stored, **{"$rebuild": dict})
    return Rebuild(_structure_again(structure, names))


def classes_of(structure: Structure) -> list[Any]:
    """The classes, and functions that make objects, of which a structure is built.

    >>> classes_of(Structure(list, (Structure(None),)))
    [<class 'list'>]
    """
    if structure.kind is None:
        return []
    if structure.is_constant:
        return _classes_in(structure.constant)
    own = [structure.kind, *([structure.recipe.create] if structure.recipe is not None else [])]
    return [*own, *(held for part in structure.parts for held in classes_of(part))]


def _classes_in(constant: Any) -> list[Any]:
    if isinstance(constant, (tuple, list)):
        return [found for item in constant for found in _classes_in(item)]
    return [constant] if isinstance(constant, type) else []


def _structure(structure: Structure) -> dict[str, Any]:
    if structure.kind is None:
        return {"leaf": structure.place}
    if structure.is_constant:
        return {"constant": encoded(structure.constant, _class)}
    recipe = structure.recipe
    if recipe is not None and recipe.setter is not None:
        raise SaveError(f"a `{structure.kind.__qualname__}` has a way of its own to be copied")
    return {
        "class": list(name_of(structure.kind)),
        "parts": [_structure(part) for part in structure.parts],
        "keys": encoded(list(structure.keys)),
        "recipe": None
        if recipe is None
        else {"create": list(name_of(recipe.create)), "own_attributes": recipe.own_attributes},
    }


def _class(value: Any) -> Any:
    return {"$class": list(name_of(value))} if isinstance(value, type) else None


def _structure_again(stored: Any, names: Names) -> Structure:
    if isinstance(stored, dict) and set(stored) == {"leaf"}:
        (place,) = fields(stored, leaf=int)
        return Structure(None, place=place)
    if isinstance(stored, dict) and set(stored) == {"constant"}:
        constant = decoded(stored["constant"], {"$class": names.container})
        return Structure(type(constant), constant=constant)
    name, parts, keys, recipe = fields(
        stored, **{"class": list}, parts=list, keys=(list, dict), recipe=(dict, type(None))
    )
    kind, own = names.container(name), decoded(keys)
    held = tuple(_structure_again(part, names) for part in parts)
    made = None
    if recipe is not None:
        create, is_own = fields(recipe, create=list, own_attributes=bool)
        made = Recipe(names.container(create), None, is_own)
    is_plain = kind in (tuple, list, dict) or (isinstance(kind, type) and hasattr(kind, "_fields"))
    if not isinstance(kind, type) or not held or (made is None and not is_plain) or (made and len(held) != 4):
        raise LoadError(f"{'.'.join(name)[:80]!r} cannot be put together so")
    if kind is dict and made is None and len(own) != len(held):
        raise LoadError("a dict has as many keys as items")
    return Structure(kind, held, None, tuple(own), made)

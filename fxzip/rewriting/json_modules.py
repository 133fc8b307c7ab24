"""The modules that a network holds, as JSON: classes by name, settings as plain values, tensors by number.

A list, the parts of a module before it, so that nothing can hold itself; the last is the network's root. Reading it
calls no constructor: a module is made bare, and is given what it held.
"""

from __future__ import annotations

import re
import weakref
from collections import Counter
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import LoadError, SaveError
from .json_values import decoded, encoded, fields
from .stored_names import Names, name_of
from .stored_tensors import TensorTable

_BARE = frozenset(vars(nn.Module()))
_MADE_ANEW = frozenset({"_compiled_call_impl", "_flat_weight_refs"})
_DEEPEST, _MOST = 100, 1_000_000
_NAME = re.compile(r"(?!__)[\w \-+:@/]+")


def modules_as_json(root: nn.Module, table: TensorTable) -> list[dict[str, Any]]:
    """What a module holds, and all modules inside it, each once. Of the root itself parts, tensors and mode only.

    >>> [entry["class"] for entry in modules_as_json(nn.Sequential(nn.ReLU()), TensorTable())]
    [['torch.nn.modules.activation', 'ReLU'], None]

    Raises:
        SaveError: a module holds something else.
    """
    return _Writing(table).all_of(root)


class _Writing:
    def __init__(self, table: TensorTable) -> None:
        self.table = table
        self.entries: list[dict[str, Any]] = []
        self.numbers: dict[int, int] = {}
        self.above: list[int] = []

    def all_of(self, root: nn.Module) -> list[dict[str, Any]]:
        self.visit(root, "")
        return self.entries

    def visit(self, module: nn.Module, path: str) -> int:
        if id(module) in self.above:
            raise SaveError(f"Module `{path}` holds itself.")
        if id(module) not in self.numbers:
            self.above.append(id(module))
            entry = self.entry(module, path)
            self.above.pop()
            self.numbers[id(module)] = len(self.entries)
            self.entries.append(entry)
        return self.numbers[id(module)]

    def entry(self, module: nn.Module, path: str) -> dict[str, Any]:
        held = vars(module)
        for key in _BARE:
            if "hooks" in key and held.get(key):
                raise SaveError(f"Module `{path or 'root'}` has hooks (`{key}`), which cannot be stored; remove them.")
        if path and isinstance(module, fx.GraphModule):
            raise SaveError(
                f"Module `{path}` is a graph of its own, as calls inside `torch.autocast` are, and a folder holds one "
                "graph only. Keep the network by `torch.save(network, file)`; a file of your own is read by "
                "`torch.load(file, weights_only=False)`. Or cast in `forward`, by `.to(torch.bfloat16)`, in the place "
                "of `torch.autocast`."
            )
        children = {
            name: None if child is None else self.visit(child, f"{path}.{name}".lstrip("."))
            for name, child in module._modules.items()
        }
        own = {key: value for key, value in held.items() if key not in _BARE | _MADE_ANEW} if path else {}
        return {
            "class": list(self.stored(name_of, type(module), path, "__class__")) if path else None,
            "training": module.training,
            "attributes": {key: self.stored(self.value, value, path, key) for key, value in own.items()},
            "parameters": {key: self.tensor(value, path, key) for key, value in module._parameters.items()},
            "buffers": {key: self.tensor(value, path, key) for key, value in module._buffers.items()},
            "temporary": sorted(module._non_persistent_buffers_set),
            "parts": children,
        }

    def tensor(self, value: Tensor | None, path: str, name: str) -> int | None:
        place = f"{path}.{name}".lstrip(".")
        number: int | None = None if value is None else self.stored(
            lambda own: self.table.number(own, place), value, path, name
        )  # fmt: skip
        return number

    def value(self, value: Any) -> Any:
        return encoded(value, self.special)

    def special(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"$tensor": self.table.number(value, f"constant {len(self.table.tensors)}")}
        if isinstance(value, (FunctionType, BuiltinFunctionType)):
            return {"$function": list(name_of(value))}
        return None

    def stored(self, how: Any, value: Any, path: str, name: str) -> Any:
        try:
            return how(value)
        except SaveError as error:
            raise SaveError(f"Attribute `{name}` of module `{path or 'root'}` cannot be stored: {error}.") from error


def modules_of_json(entries: Any, tensors: list[Tensor], names: Names) -> nn.Module:
    """The root, a plain module, with all that it holds.

    Raises:
        LoadError: there is no such module, or it is of a class that a file may not name.
    """
    made: list[nn.Module] = []
    sizes: list[tuple[int, int]] = []  # how deep each is, and how many modules are in it, those held twice twice
    if not isinstance(entries, list) or not entries:
        raise LoadError("there are no modules")
    for entry in entries:
        held = [sizes[number] for number in _numbers(entry, len(made))]
        depth, total = 1 + max((own[0] for own in held), default=0), 1 + sum(own[1] for own in held)
        if depth > _DEEPEST or total > _MOST:
            raise LoadError(f"modules may lie {_DEEPEST} deep, {_MOST:,} in one")
        sizes.append((depth, total))
        made.append(_module(entry, made, tensors, names, is_root=len(made) == len(entries) - 1))
    return made[-1]


def _numbers(entry: Any, most: int) -> list[int]:
    parts = entry.get("parts") if isinstance(entry, dict) else None
    numbers = parts.values() if isinstance(parts, dict) else ()
    return [number for number in numbers if type(number) is int and 0 <= number < most]


def _module(entry: Any, made: list[nn.Module], tensors: list[Tensor], names: Names, *, is_root: bool) -> nn.Module:
    kind, training, attributes, parameters, buffers, temporary, parts = fields(
        entry, **{"class": (list, type(None))}, training=bool, attributes=dict, parameters=dict, buffers=dict,
        temporary=list, parts=dict,
    )  # fmt: skip
    own = nn.Module if kind is None and is_root else names.module(kind)
    module = object.__new__(own)
    nn.Module.__init__(module)
    taken = Counter([*attributes, *parameters, *buffers, *parts])
    for name, times in taken.items():
        hidden = name in _BARE | _MADE_ANEW or callable(getattr(own, name, None))
        if not _NAME.fullmatch(name) or hidden or times > 1:
            raise LoadError(f"a `{own.__qualname__}` cannot hold anything by the name {name[:80]!r}")
    reading = {
        "$tensor": lambda number: _item(tensors, number, Tensor),
        "$function": lambda name: _function(names, name),
    }
    vars(module).update(decoded(attributes, reading))
    for name, number in parameters.items():
        module._parameters[name] = None if number is None else _item(tensors, number, nn.Parameter)
    for name, number in buffers.items():
        module._buffers[name] = None if number is None else _item(tensors, number, Tensor)
    for name, number in parts.items():
        module._modules[name] = None if number is None else _item(made, number, nn.Module)
    if not all(isinstance(name, str) and name in buffers for name in temporary):
        raise LoadError(f"a `{own.__qualname__}` has no such buffers: {temporary!r:.80}")
    module._non_persistent_buffers_set = set(temporary)
    module.training = training
    if isinstance(module, nn.RNNBase):
        flat = vars(module).get("_flat_weights")
        if not isinstance(flat, list):
            raise LoadError(f"a `{own.__qualname__}` lacks its list of weights")
        module._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in flat]
    return module


def _item(held: Any, number: Any, kind: Any) -> Any:
    if type(number) is not int or not 0 <= number < len(held) or not isinstance(held[number], kind):
        raise LoadError(f"there is no `{kind.__name__}` of number {number!r:.80}")
    return held[number]


def _function(names: Names, name: Any) -> Any:
    """A function on tensors that a module holds, its activation say."""
    found = names.function(name)
    if not str(name[0]).startswith("torch") or found is getattr or isinstance(found, torch._ops.OpOverload):
        own = names.is_own(found)
        if not own:
            raise LoadError(f"a module may not hold the function {'.'.join(name)[:200]!r}")
    return found

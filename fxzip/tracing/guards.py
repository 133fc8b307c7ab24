"""What a trace took for granted, checked whenever its graph is run.

A trace is a graph for some values of the arguments that are no tensors, and for some sizes where Python looked at one
(`if`, `range`, `int`, unpacking). Every such place leaves a node behind that calls `require` and raises where another
value is found, so that a graph is never silently run for what it was not made for. Arguments of `require` are plain
data, for torch.fx to write them into its code:

    "*"                       a tensor, or a number that the graph reads; not None
    ("tensor",)               a tensor, where the model could do without, or asked what it is
    ("kind", names, answer)   a tensor of one of these classes or types, or (`answer`: false) of none
    ("axes", n)               a tensor with so many axes
    ("number",)               a number, where the model asked what it is
    ("is", value)             this value
    ("dict", keys, forms)     a mapping with these keys
    ("list", forms)           a tuple or list of so many items
    ("object", n, values)     an object with n tensors, and these numbers, strings and the like
    ("type", name)            a number of this type
    ("named", name)           a function or class of this name, an object that is written so
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import fx

from ..errors import SpecializationError
from .containers import flatten
from .python_numbers import is_number, plain_number
from .structure import Structure
from .tensor_kinds import kinds_asked, kinds_of

Form = Any
_SIMPLE = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
_PROXIES = frozenset(
    str(Path(__file__).with_name(f"{name}.py"))
    for name in ("example_values", "value_proxies", "symbolic", "model_builtins", "questions")
)
_LONG = 200  # characters of an object that are compared as they are
_OWN = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<eval_with_key", "<frozen")


def form_of(value: Any, is_leaf: Callable[[Any], bool]) -> Form:
    """The form of an argument; `is_leaf` says what the graph reads.

    >>> form_of({"x": torch.ones(1), "step": 10}, lambda value: isinstance(value, torch.Tensor))
    ('dict', ('x', 'step'), ('*', ('is', 10)))
    """
    return _form(*flatten(value, is_leaf)[::-1])


def form_of_argument(value: Any, is_leaf: Callable[[Any], bool], *, optional: bool, asked: bool = False) -> Form:
    """`form_of` an argument; `optional`: the model may be called without it; `asked`: it may ask what it is.

    >>> form_of_argument(torch.ones(1), lambda value: isinstance(value, torch.Tensor), optional=True)
    ('tensor',)
    """
    if isinstance(value, torch.Tensor) and (optional or asked):
        return ("tensor",)
    return ("number",) if asked and is_number(value) and is_leaf(value) else form_of(value, is_leaf)


def _form(structure: Structure, leaves: list[Any]) -> Form:
    if structure.kind is None:
        return "*"
    if structure.is_constant:
        return _constant(structure.constant)
    parts = tuple(_form(part, leaves) for part in structure.parts)
    if structure.recipe is not None:
        return "object", len(leaves), _simple_values(structure)
    return ("dict", structure.keys, parts) if structure.kind is dict else ("list", parts)


def _constant(value: Any) -> Form:
    if isinstance(value, dict) and all(isinstance(key, _SIMPLE) for key in value):
        return "dict", tuple(value), tuple(_constant(item) for item in value.values())
    if isinstance(value, (tuple, list)):
        return "list", tuple(_constant(item) for item in value)
    value = plain_number(value)
    return ("is", value) if type(value) in _SIMPLE else ("named", _name_of(value))


def _name_of(value: Any) -> str:
    """What tells a constant from others: of functions and classes the name, of other objects the class and how they
    are written, without addresses."""
    if hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', None) or 'builtins'}.{value.__qualname__}{_made_of(value)}"
    written = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    if len(written) > _LONG:
        written = f"{written[:_LONG]}... ({zlib.crc32(written.encode())})"
    return f"{type(value).__module__}.{type(value).__qualname__} {written}"


def _made_of(function: Any) -> str:
    """What tells functions of one name apart: of those that are made where they are used, line, code and the values
    that they hold; of methods their object."""
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, (type, ModuleType)):
        return f" of {_name_of(owner)}"
    code = getattr(function, "__code__", None)
    if code is None or "<" not in function.__qualname__:
        return ""
    kept = [cell.cell_contents for cell in function.__closure__ or ()] + list(function.__defaults__ or ())
    written = f"{code.co_code!r} {code.co_names} {[const for const in code.co_consts if type(const) in _SIMPLE]}"
    held = "".join(f" {_name_of(value)}" for value in kept)
    return f":{code.co_firstlineno} ({zlib.crc32((written + held).encode())})"


def _simple_values(structure: Structure) -> tuple[Any, ...]:
    if structure.kind is not None and structure.is_constant:
        return (structure.constant,) if type(structure.constant) in _SIMPLE else ()
    parts = structure.parts
    if structure.recipe is not None and parts[1].constant is None and parts[1].is_constant:
        parts = (parts[0], *parts[2:])  # no attributes, as of a dict
    return tuple(value for part in parts for value in _simple_values(part))


def is_trivial(form: Form) -> bool:
    """Whether there is nothing to check."""
    return form in ("*", ("any",))  # the latter in files of former versions


def require(value: Any, form: Form, what: str, where: str = "") -> None:
    """Raise a `SpecializationError` unless the value has the form; `what` names it: an argument, or (`where`: the
    line) what Python asked.

    >>> require(10, ("is", 10), "step")
    """
    found = _mismatch(value, form, what)
    if found is None:
        return
    place, expected, seen = found
    if where:
        raise SpecializationError(
            f"{place} at {where} must give what it gave when the network was traced, {expected}; it gives {seen} now. "
            "The graph is for sizes and numbers of which this is true: compile with such a `sample_input`, or replace "
            "the Python loop, condition or number there by tensor operations."
        )
    raise SpecializationError(
        f"Argument `{place}` must be what the network was traced with, {expected}; found {seen}. The value is built "
        "into the graph: compile with that value in `sample_input`, or make it a tensor."
    )


require.__module__ = "fxzip.ops"  # files name it there
fx.node.has_side_effect(require)


def _mismatch(value: Any, form: Form, what: str) -> tuple[str, str, str] | None:
    if isinstance(value, fx.Proxy):
        return None
    if is_trivial(form):
        return (what, "a tensor", "None") if form == "*" and value is None else None
    kind, *rest = form
    if kind == "tensor":
        return None if isinstance(value, torch.Tensor) else (what, "a tensor", _brief(value))
    if kind == "kind":
        if isinstance(value, torch.Tensor) and bool(kinds_of(value) & set(rest[0])) is rest[1]:
            return None
        expected = " or ".join(f"`{name}`" for name in rest[0])
        return what, f"a tensor that is {'' if rest[1] else 'no '}{expected}", _of_kind(value)
    if kind == "axes":
        if not isinstance(value, torch.Tensor):
            return what, f"{rest[0]}, of a tensor", _brief(value)
        return None if value.ndim == rest[0] else (what, repr(rest[0]), repr(value.ndim))
    if kind == "number":
        return None if is_number(plain_number(value)) else (what, "a number", _brief(value))
    if kind == "is":
        value = plain_number(value)
        same = value is rest[0] or (isinstance(value, _SIMPLE) and value == rest[0])
        return None if same else (what, repr(rest[0]), _brief(value))
    if kind == "type":
        return None if type(value).__name__ == rest[0] else (f"the type of `{what}`", rest[0], type(value).__name__)
    if kind == "named":
        name = _name_of(value)
        return None if name == rest[0] else (what, rest[0], name)
    if kind == "object":
        held, structure = flatten(value)
        seen = (len(held), _simple_values(structure))
        return (
            None
            if seen == (rest[0], rest[1])
            else (what, f"one with {rest[0]} tensors and {rest[1]}", f"one with {seen[0]} tensors and {seen[1]}")
        )
    if kind == "dict":
        if not isinstance(value, Mapping) or set(value) != set(rest[0]):
            return what, f"a dict with {list(rest[0])}", _brief(value)
        items = [(f"{what}[{key!r}]", value[key], own) for key, own in zip(*rest, strict=True)]
    else:
        if not isinstance(value, (tuple, list)) or len(value) != len(rest[0]):
            return what, f"a list of {len(rest[0])}", _brief(value)
        items = [(f"{what}[{place}]", value[place], own) for place, own in enumerate(rest[0])]
    return next((found for name, item, own in items if (found := _mismatch(item, own, name))), None)


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with {list(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return repr(value) if isinstance(value, (*_SIMPLE, tuple)) else f"a `{type(value).__name__}`"


def _of_kind(value: Any) -> str:
    return f"a `{type(value).__name__}` of type `{value.type()}`" if isinstance(value, torch.Tensor) else _brief(value)


def asked_by_model() -> bool:
    """Whether the method of a proxy that calls this was itself called by code of the model, not by PyTorch or fxzip."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in _PROXIES:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and not frame.f_code.co_filename.startswith(_OWN)


def place_in_source() -> str:
    """The line of the model that is running, as `model.py:12`."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OWN):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"


def guard_kind(graph: fx.Graph, argument: fx.Node, value: torch.Tensor, kinds: Any) -> None:
    """Leave a guard behind, where nodes are inserted now, that an argument is a tensor, and, as `value` is, of these
    kinds or of none of them."""
    asked = kinds_asked(value, kinds)
    form = ("kind", asked, bool(kinds_of(value) & set(asked))) if asked else ("tensor",)
    if not any(user.target is require and user.args[1] == form for user in argument.users):
        graph.call_function(require, (argument, form, argument.name))


def guard_type(graph: fx.Graph, argument: fx.Node, kind: type) -> None:
    """Leave a guard behind, where nodes are inserted now, that an argument is of this type."""
    graph.call_function(require, (argument, ("type", kind.__name__), argument.name, place_in_source()))


def guard_rank(graph: fx.Graph, tensor: fx.Node, rank: int) -> None:
    """Leave a guard behind, where nodes are inserted now, for the number of axes of an argument."""
    graph.call_function(require, (tensor, ("axes", rank), f"the number of axes of `{tensor.name}`", "the input"))


def guards_at_entry(module: fx.GraphModule, computed: Mapping[str, torch.Size]) -> dict[fx.Node, list[fx.Node]]:
    """The guards that depend on the arguments and their sizes alone, each with what it is computed from besides
    placeholders, in order. `computed`: shapes of the nodes that give tensors."""
    found: dict[fx.Node, list[fx.Node]] = {}
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    for node in order:
        if node.target is not require:
            continue
        above, todo = set[fx.Node](), list(node.all_input_nodes)
        while todo:
            source = todo.pop()
            if source.op != "placeholder" and source not in above:
                above.add(source)
                todo += source.all_input_nodes
        if all(source.op == "call_method" or source.op == "call_function" for source in above) and not any(
            source.name in computed and not _is_part(source) for source in above
        ):
            found[node] = sorted(above, key=order.__getitem__)
    return found


def _is_part(node: fx.Node) -> bool:
    """Whether a node takes something out of a container that is an argument."""
    name = getattr(node.target, "__name__", "")
    source = node.args[0] if node.args else None
    if node.op != "call_function" or name not in ("getitem", "part") or not isinstance(source, fx.Node):
        return False
    return source.op == "placeholder" or _is_part(source)

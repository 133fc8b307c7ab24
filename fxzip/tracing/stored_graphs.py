"""A graph as plain data, and back: how a zipped network is pickled.

A network is stored as its class, a module that holds its parameters, its nodes (operation, name, target, arguments, and
what fxzip notes of each), its notes, and the number of the format. Files name what is here by `fxzip.ops`, which does
not move.

Format 0 had the operations in `fxzip.zipped` and `fxzip.joint`; such files are still read.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import LoadError
from .allowed import check_keywords, check_name, check_node, is_allowed, is_rebuild, named, qualified
from .provenance import Provenance, mark, provenance_data

FORMAT = 1
"""The number of the format that is written."""


@dataclass(frozen=True)
class Reference:
    """Stands for a node, by name, in the arguments of a stored one."""

    name: str


@dataclass(frozen=True)
class MemoryFormat:
    """Stands for a memory format of PyTorch, which pickles of protocol 2, those of `torch.save`, cannot hold."""

    name: str


@dataclass(frozen=True)
class Function:
    """What a node calls: where it is found, or itself if it is a function of one's own.

    >>> Function.of(torch.relu)
    Function(module='torch', path='relu', itself=None)
    """

    module: str
    path: str
    itself: Any = None

    @classmethod
    def of(cls, called: Any) -> Function:
        """What is stored for a function."""
        if not is_allowed(called):
            return cls("", "", called)
        module, path = qualified(called)
        try:
            return cls(module, path) if named(module, path) is called else cls("", "", called)
        except LoadError:
            return cls("", "", called)

    def find(self, *, safely: bool) -> Any:
        """The function.

        Raises:
            LoadError: `safely`, and it is none that a file may name.
        """
        if not self.module:
            if safely and not (is_rebuild(self.itself) or is_allowed(self.itself)):
                return named(*(str(getattr(self.itself, key, "?")) for key in ("__module__", "__qualname__")))
            return self.itself
        module = _MOVED.get((self.module, self.path), self.module)
        if safely:
            return named(module, self.path)
        try:
            return getattr(importlib.import_module(module), self.path)
        except ImportError:  # `torch.ops.aten.relu.default`: objects, not modules
            first, *rest = f"{module}.{self.path}".split(".")
            return functools.reduce(getattr, rest, importlib.import_module(first))


_MOVED = {
    (module, name): "fxzip.ops"
    for module, names in {"fxzip.zipped": ("unmerge", "mix", "merge"), "fxzip.joint": ("shift", "lift")}.items()
    for name in names
}
"""Where the operations of format 0 are now."""


def _stored(value: Any) -> Any:
    """What stands for a value among the arguments of a stored node."""
    if isinstance(value, fx.Node):
        return Reference(value.name)
    return MemoryFormat(str(value).removeprefix("torch.")) if isinstance(value, torch.memory_format) else value


def _again(value: Any, made: Mapping[str, fx.Node]) -> Any:
    """The value that it stands for.

    Raises:
        LoadError: there is no such memory format.
    """
    if isinstance(value, MemoryFormat):
        found = getattr(torch, str(value.name), None)
        if not isinstance(found, torch.memory_format):
            raise LoadError(f"There is no memory format {value.name!r}. Do not load the file.")
        return found
    return made[value.name] if isinstance(value, Reference) else value


def written(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph as plain data.

    >>> [line[:3] for line in written(fx.symbolic_trace(nn.ReLU()).graph)][1]
    ('call_function', 'relu', Function(module='torch.nn.functional', path='relu', itself=None))
    """
    lines = []
    for node in graph.nodes:
        given: Any = fx.node.map_aggregate((node.args, node.kwargs), _stored)
        target = node.target if isinstance(node.target, str) else Function.of(node.target)
        lines.append((node.op, node.name, target, *given, provenance_data(node)))
    return lines


def restored(
    kind: type[fx.GraphModule], holder: nn.Module, lines: list[tuple[Any, ...]], own: dict[str, Any], version: int = 0
) -> fx.GraphModule:
    """A module from its file.

    Raises:
        LoadError: it is of a later format; or `torch.load(weights_only=True)` reads it, and it calls what a file may
            not name (see `allowed`); or a name in it is none.
    """
    if version > FORMAT:
        raise LoadError(
            f"This version of fxzip reads zipped networks up to format {FORMAT}; the file is of format {version}. "
            "Use the version that wrote it, or a later one."
        )
    if not (isinstance(kind, type) and issubclass(kind, fx.GraphModule)):
        raise LoadError(f"A stored network must name its class; this one has {kind!r}. Do not load it.")
    safely = _only_weights()
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs, meta in lines:
        given: Any = fx.node.map_aggregate((args, kwargs), lambda a: _again(a, made))
        arguments, options = given
        called = target.find(safely=safely) if isinstance(target, Function) else target
        check_name(op, called)
        check_keywords(options)
        if safely:
            check_node(op, called, arguments)
        made[name] = graph.create_node(op, called, arguments, options, name=name)
        if meta:
            mark(made[name], Provenance.of_data(meta))
    result = kind(holder, graph)
    result.meta.update(own)
    return result


def _only_weights() -> bool:
    """Whether the unpickler at work is the one that runs no code of its own."""
    frame = inspect.currentframe()
    while frame is not None:
        if "weights_only" in str(frame.f_globals.get("__name__")):
            return True
        frame = frame.f_back
    return False


for _named in (Reference, MemoryFormat, Function, restored):
    _named.__module__ = "fxzip.ops"  # files name them there

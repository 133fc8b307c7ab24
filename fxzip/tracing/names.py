"""Names of modules and parameters as torch.fx can write them into code.

Names are data: a key of an `nn.ModuleDict` may be a keyword, a word that `GraphModule` has for itself, or a piece of
code, and torch.fx writes it into a program without a look.
"""

from __future__ import annotations

import keyword
import re
from typing import Any

from torch import fx, nn

from ..errors import InputError
from .copying import deep_copy

_UNSAFE = re.compile(r"[^\w \-+:@/]")
_WRITTEN = frozenset(fx.graph._custom_builtins)
_EMPTY = fx.GraphModule(nn.Module(), fx.Graph())


def _safe(name: str, *, top: bool) -> str:
    result = _UNSAFE.sub("_", name) or "_"
    if result.startswith("__"):  # as what Python has for itself; no saved network may name such
        result = "_" + result.lstrip("_")
    taken = top and hasattr(_EMPTY, result)
    return result + "_" if keyword.iskeyword(result) or taken else result


def safe_names(root: nn.Module) -> dict[str, str]:
    """New paths of modules, parameters and buffers, by the old ones, where a name on the way cannot stay.

    >>> safe_names(nn.ModuleDict({"class": nn.Linear(1, 1, bias=False), "body": nn.ReLU()}))
    {'class': 'class_', 'class.weight': 'class_.weight', 'class.bias': 'class_.bias'}
    """
    paths = {"": ""}
    for path, module in root.named_modules(remove_duplicate=False):
        names = [*module._modules, *module._parameters, *module._buffers]
        used = {name for name in names if _safe(name, top=not path) == name}
        for name in names:
            new = _safe(name, top=not path)
            while new != name and new in used:
                new += "_" if new.strip("_") else "0"  # two underscores in front are Python's
            used.add(new)
            paths[f"{path}.{name}".lstrip(".")] = f"{paths[path]}.{new}".lstrip(".")
    return {old: new for old, new in paths.items() if old != new}


def named_safely(root: nn.Module, graph: fx.Graph, paths: dict[str, str]) -> fx.GraphModule:
    """The module of a graph on the root's own parameters; with new paths, if there are any, on a copy of it."""
    if not paths:
        return fx.GraphModule(root, graph, "GraphModule")
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = paths.get(str(node.target), str(node.target))
            if any(_safe(name, top=not place) != name for place, name in enumerate(str(node.target).split("."))):
                raise InputError(f"Attribute `{node.target}` cannot be written into code; rename it.")
    copied = deep_copy(root)
    for path, module in list(copied.named_modules()):
        for store in (module._modules, module._parameters, module._buffers):
            entries: list[tuple[str, Any]] = list(store.items())
            store.clear()
            store.update((_renamed(path, name, paths), value) for name, value in entries)
        left = {_renamed(path, name, paths) for name in module._non_persistent_buffers_set}
        module._non_persistent_buffers_set = left
    return fx.GraphModule(copied, graph, "GraphModule")


def _renamed(path: str, name: str, paths: dict[str, str]) -> str:
    old = f"{path}.{name}".lstrip(".")
    return paths.get(old, old).rpartition(".")[2]


def check_code(module: fx.GraphModule) -> None:
    """An argument may have a name that torch.fx writes for something else: `inf` for a number, `device` for a device.
    Its code would read the argument there.

    Raises:
        InputError: there is one.
    """
    for node in module.graph.nodes:
        name = str(node.target)
        if node.op == "placeholder" and name in _WRITTEN:
            found = re.findall(rf"(?<![\w.'\"]){name}\b", module.code)
            if len(found) > 2:  # in the signature, and where it is given the name of its node
                raise InputError(
                    f"Argument `{name}` has a name that is written into code for something else; rename it, e.g. to "
                    f"`{name}_`."
                )


def check_arguments(names: list[str]) -> None:
    """Names of arguments are written into code, too.

    Raises:
        InputError: one of them is no name.
    """
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise InputError(f"Names of arguments must be identifiers; found {name!r}. Rename the argument.")
        if name == "torch":
            raise InputError("Argument `torch` has the name of a module that every graph calls; rename it.")

"""Which functions a file may name. A zipped network is stored as its graph, and a graph says what is called.

A plain pickle can run any code, whatever is checked here: it is for files of one's own. `torch.load(weights_only=True)`
runs none, and what fxzip looks up for it by name must not open that door again. So a name is resolved only to

- ATen calls, other than those that read or write files;
- functions on tensors as PyTorch itself lists them (`torch.overrides`), those that make tensors, `math`, and the
  functions of `operator` and of Python that appear in traced graphs;
- functions that are defined in certain modules of torchvision, timm, transformers and fxzip, none that load or save;
- functions that the caller has named with `trust`.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import keyword
import math
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import fx

from ..errors import LoadError
from .option_values import checked


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TRUSTED: ContextVar[tuple[Any, ...]] = ContextVar("trusted", default=())

_BUILTINS = _words(
    """
    abs all any bool complex dict divmod enumerate float getattr int isinstance len list max min pow range
    reversed round set slice sorted str sum tuple zip
    """
)
_MAKERS = _words(
    """
    arange as_tensor complex empty empty_like empty_strided eye full full_like linspace logspace ones ones_like
    polar rand rand_like randint randint_like randn randn_like randperm scalar_tensor tensor tril_indices
    triu_indices zeros zeros_like sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum device
    finfo iinfo Size is_tensor is_floating_point is_complex is_grad_enabled broadcast_shapes can_cast
    promote_types result_type numel _assert _shape_as_tensor
    """
)
_NAMESPACES = frozenset({"aten", "prims", "torchvision"})
_FILES = re.compile(
    r"(^|_)(cached?|checkpoints?|create|download|dump|eval|exec|export|files?|hub|import|io|load|open|path|pickle|"
    r"pretrained|print|progress|push|read|register|run|save|script|urls?|warn|weights|write)(_|$)",
    re.IGNORECASE,
)
_PACKAGES = (
    re.compile(r"torchvision\.(ops|models)(\.|$)"),
    re.compile(r"timm\.(layers|models)(\.|$)"),
    re.compile(
        r"transformers\.(activations|pytorch_utils|modeling_attn_mask_utils|masking_utils|integrations\.\w+_attention)$"
    ),
    re.compile(r"transformers\.models\.\w+\.modeling_\w+$"),
    re.compile(r"fxzip\.ops$"),
)
_OPERATIONS = _words(
    """
    batch_of_heads join_heads lift linear_heads merge mix norm_heads part_heads pooled require shift turn_heads unmerge
    """
)
_FUNCTIONAL = frozenset({"torch.functional", "torch.nn.functional"})
_QUESTIONS = frozenset({"count", "get", "index", "items", "keys", "numel", "values"})  # of tuples, dicts and sizes
_OPERATORS = frozenset(
    f"__{name}__"
    for name in _words(
        "getitem add radd sub rsub mul rmul truediv rtruediv div rdiv floordiv rfloordiv mod rmod pow rpow matmul "
        "rmatmul and rand or ror xor rxor lshift rlshift rshift rrshift neg pos abs invert eq ne lt le gt ge"
    )
)
"""Calls of tensors that Python writes as operators."""
_NO_METHODS = _words(
    """
    apply_ backward data_ptr map_ map2_ module_load numpy record_stream register_hook
    register_post_accumulate_grad_hook resize_ resize_as_ set_ share_memory_ storage storage_type
    untyped_storage to_file typed_storage
    """
)


@contextmanager
@checked
def trust(*functions: Callable[..., Any]) -> Iterator[None]:
    """Inside, files loaded with `torch.load(weights_only=True)` may call these functions of one's own.

    >>> def double(x):
    ...     return 2 * x
    >>> with trust(double):
    ...     named(double.__module__, "double") is double  # what a file calls `my_module.double`
    True
    """
    names = {(str(f.__module__), str(f.__qualname__)): f for f in functions}
    token = _TRUSTED.set((*_TRUSTED.get(), names))
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def trusted(module: str, path: str) -> Any:
    """The function of that name that the caller trusts; None if there is none."""
    return next((names[module, path] for names in _TRUSTED.get() if (module, path) in names), None)


def named(module: str, path: str) -> Any:
    """The function that a name in a file stands for.

    >>> named("torch", "relu") is torch.relu
    True

    Raises:
        LoadError: it is none of those that the module's docstring lists.
    """
    own = trusted(module, path)
    if own is not None:
        return own
    full = f"{module}.{path}"
    if all(step.isidentifier() for step in full.split(".")):
        found = lookup(full)
        if found is not None and is_allowed(found):
            return found
    raise LoadError(
        f"A file may only name functions that act on tensors; this one calls {full!r}. If it is yours, name it: "
        f"`with fxzip.trust({path.rpartition('.')[2] if path.isidentifier() else 'function'}): torch.load(...)`. "
        "If it is not, do not load the file."
    )


def is_allowed(called: Any) -> bool:
    """Whether a function is one that a file may name.

    >>> import os
    >>> is_allowed(torch.relu), is_allowed(torch.load), is_allowed(os.system)
    (True, False, False)
    """
    try:
        if called in _listed() or any(called is own for names in _TRUSTED.get() for own in names.values()):
            return True
    except TypeError:  # not hashable
        return False
    if isinstance(called, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace, _, name = str(getattr(called, "_qualified_op_name", None) or called._schema.name).partition("::")
        return namespace in _NAMESPACES and not _FILES.search(name.partition(".")[0])
    if isinstance(called, FunctionType):
        module, name = str(called.__module__), called.__qualname__
        own = name.isidentifier() and getattr(sys.modules.get(module), name, None) is called
        if module == "fxzip.ops":
            return own and name in _OPERATIONS
        inside = module in _FUNCTIONAL or any(package.match(module) for package in _PACKAGES)
        return own and inside and not any(_FILES.search(word) for word in (name, *_parameters(called)))
    return False


def is_known(kind: type) -> bool:
    """Whether a class is one of the packages whose functions a file may name."""
    module = str(kind.__module__)
    own = getattr(sys.modules.get(module), kind.__qualname__, None) is kind
    return own and (module.startswith("torch.nn.") or any(package.match(module) for package in _PACKAGES))


def _parameters(called: FunctionType) -> tuple[str, ...]:
    """Names of the parameters; "**" as "file": anything may go through it."""
    code = called.__code__
    return (*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], *(["file"] if code.co_flags & 0x08 else []))


@functools.cache
def _listed() -> frozenset[Any]:
    """Functions that are allowed by themselves."""
    found = set()
    for owner, functions in torch.overrides.get_overridable_functions().items():
        names = [(str(getattr(f, "__name__", "load")), f) for f in functions]
        found |= {f for name, f in names if (is_method(name) if owner is torch.Tensor else not _FILES.search(name))}
    found |= {getattr(torch, name) for name in _MAKERS if hasattr(torch, name)}
    found |= {getattr(builtins, name) for name in _BUILTINS}
    found |= {f for f in vars(math).values() if isinstance(f, BuiltinFunctionType)}
    found |= {f for f in vars(operator).values() if isinstance(f, BuiltinFunctionType) and f.__name__ != "call"}
    for space in ("_nn", "_special", "_fft", "_linalg", "_sparse", "_VariableFunctions"):
        owner = getattr(torch._C, space, ModuleType("none"))
        held = {name: getattr(owner, name) for name in dir(owner) if not name.startswith("__")}
        found |= {f for name, f in held.items() if isinstance(f, BuiltinFunctionType) and not _FILES.search(name)}
    modes = ((torch.amp.autocast_mode, "_enter_autocast"), (torch.amp.autocast_mode, "_exit_autocast"))
    found |= {getattr(owner, name) for owner, name in (*modes, (torch._C, "_set_grad_enabled")) if hasattr(owner, name)}
    return frozenset(found)


def lookup(full: str) -> Any:
    """What a dotted name leads to, through modules that are there or may be imported, and `torch.ops`."""
    steps = full.split(".")
    place: Any = (
        sys.modules.get(steps[0]) if steps[0] in ("torch", "math", "operator", "_operator", "builtins") else None
    )
    if place is None:
        module = full.rpartition(".")[0]
        if not any(package.match(module) for package in _PACKAGES):
            return None
        try:
            return getattr(importlib.import_module(module), steps[-1], None)
        except ImportError:
            return None
    for step in steps[1:]:
        if (
            not isinstance(place, (ModuleType, torch._ops._OpNamespace, torch._ops.OpOverloadPacket))
            and place is not torch.Tensor
        ):
            return None
        if step.startswith("__"):
            return None
        place = getattr(place, step, None)
    return place


def check_node(op: str, target: Any, args: Any) -> None:
    """Whether a node of a graph in a file does no more than its operation says.

    >>> check_node("call_method", "relu", ())

    Raises:
        LoadError: it calls a method that tensors do not have or a private one, or reads a private attribute.
    """
    if op == "call_method" and not is_method(str(target)):
        raise LoadError(f"A file may only call methods of tensors; this one calls {target!r}. Do not load it.")
    if op == "call_function" and target is getattr:
        name = args[1] if len(args) > 1 else None
        if not (isinstance(name, str) and name.isidentifier() and not name.startswith("_")):
            raise LoadError(f"A file may only read public attributes; this one reads {name!r}. Do not load it.")


def check_name(op: str, target: Any) -> None:
    """Whether the name in a node is a name, and no code: `torch.fx` writes names into the source that it generates.

    >>> check_name("get_attr", "trunk.0.weight")

    Raises:
        LoadError: it has something else in it.
    """
    if op not in ("placeholder", "get_attr", "call_module", "call_method"):
        return
    steps = str(target).split(".") if op in ("get_attr", "call_module") else [str(target)]
    # paths are written between quotes, methods and arguments are not; `__init__` and the like are no modules
    plain = r"(?!__)[\w \-+:@/]+" if op in ("get_attr", "call_module") else r"[^\W\d]\w*"
    if not isinstance(target, str) or not all(re.fullmatch(plain, step) for step in steps):
        raise LoadError(f"Names in a graph must be made of letters, digits and underscores; a {op} has {target!r}.")


def check_keywords(kwargs: Mapping[Any, Any]) -> None:
    """Whether the names of a call's keyword arguments are names: `torch.fx` writes them into its source, too.

    >>> check_keywords({"dim": 1})

    Raises:
        LoadError: one of them has something else in it.
    """
    for key in kwargs:
        if not (isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key)):
            raise LoadError(f"Names of arguments in a graph must be identifiers; found {key!r}. Do not load the file.")


@functools.cache
def is_method(name: str) -> bool:
    """Whether a file may call a method of this name.

    >>> is_method("add_"), is_method("apply_"), is_method("__reduce__")
    (True, False, False)
    """
    if name in _OPERATORS:
        return True
    if name.startswith("_") or name in _NO_METHODS or not name.isidentifier():
        return False
    return name in _QUESTIONS or (name in dir(torch.Tensor) and callable(getattr(torch.Tensor, name)))


def is_rebuild(called: Any) -> bool:
    """Whether this is the call that puts a container of outputs together, whose class the file names by itself."""
    return type(called).__module__ in ("fxzip.tracing.containers", "fxzip.tracing.structure")


def qualified(called: Any) -> tuple[str, str]:
    """Where a function is found: module and name there. PyTorch's functions are found at `torch.relu`, say, not where
    they say they come from."""
    own = getattr(called, "__name__", "")
    if isinstance(called, BuiltinFunctionType) and getattr(torch, own, None) is called:
        return "torch", own
    module, _, path = fx.node._get_qualified_name(called).rpartition(".")
    return module or "builtins", path

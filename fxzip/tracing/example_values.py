"""The second rung: a symbolic trace with example values.

Every proxy carries the value that the recorded call gave on the sample. Sizes stay in the graph where they flow into
other calls, so that other batch sizes work. Python itself (`if`, `range`, `int`, unpacking) sees the example value, and
is refused a value that depends on the content of a tensor.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from .calls import Call
from .containers import flatten, leaves
from .guards import asked_by_model, form_of, place_in_source, require
from .python_numbers import MATH, is_number, may_read
from .questions import DRAWS, FACTORIES, SHAPE_FUNCTIONS, SHAPE_METHODS, SIZE_METHODS, plain_attribute, type_on_value
from .symbolic import SymbolicTracer
from .threads import only_here


class DataDependentError(RuntimeError):
    """A Python condition or number depends on the content of a tensor."""


def trace_with_values(root: nn.Module, call: Call) -> fx.Graph:
    """The graph of the root on the sample.

    Devices and dtypes stay in the graph like sizes do, so that the program can be moved; where a model asks too much of
    them, they are constants.

    >>> graph = trace_with_values(nn.Sequential(nn.ReLU()), Call((torch.ones(1),), {}))
    >>> len(graph.nodes)
    3
    """
    tracer = ValueTracer(call, placement=True)
    try:
        with tracer.patched_factories():
            return tracer.trace(root)
    except DataDependentError:
        raise
    except Exception:  # compiled code that wants a real device or dtype
        tracer = ValueTracer(call, placement=False)
        with tracer.patched_factories():
            return tracer.trace(root)


class ValueTracer(SymbolicTracer):
    """Runs every call on the sample as it records it."""

    proxy_buffer_attributes = True

    def __init__(self, call: Call, *, placement: bool) -> None:
        super().__init__(call)
        self.param_shapes_constant = False
        kinds = (Tensor, tuple, torch.device, torch.dtype) if placement else (Tensor, tuple)
        self.recorded: tuple[type, ...] = kinds
        self._evaluating = False
        self._examples: dict[str, Any] = {}
        self._assumed: set[tuple[str, str]] = set()

    def reads(self, value: Any) -> bool:
        return isinstance(value, Tensor) or is_number(value)

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs) if self._evaluating else super().call_module(m, forward, args, kwargs)

    def _placeholder(self, name: str, value: Any) -> fx.Proxy:
        self._examples[name] = value
        return super()._placeholder(name, value)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        if target is not require and any(p.number for p in flatten((args, kwargs), _is_proxy)[0]):
            args = tuple(self._built_in(kind, target, place, value) for place, value in enumerate(args))
            kwargs = {key: self._built_in(kind, target, key, value) for key, value in kwargs.items()}
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        given = flatten((args, kwargs), _is_proxy)[0]
        proxy.value = self._evaluated(kind, target, args, kwargs)
        proxy.tainted = self._tainted(kind, target, given, proxy.value)
        if kind == "placeholder":
            proxy.given, proxy.number = True, is_number(proxy.value)
            proxy.sized = proxy.number
            return proxy
        plain = not isinstance(proxy.value, Tensor)
        about_size = target in SIZE_METHODS or (target is getattr and args[1] == "shape") or target is torch.numel
        proxy.given = any(p.given for p in given)
        proxy.number = plain and any(p.number for p in given)
        proxy.sized = plain and any(p.sized or (p.given and about_size) for p in given)
        return proxy

    def _built_in(self, kind: str, target: Any, place: Any, value: Any) -> Any:
        """An argument with values for numbers that the call may not read."""
        if may_read(kind, target, place):
            return value
        found, structure = flatten(value, _is_proxy)
        for proxy in found:
            if proxy.number:
                self.assume(proxy, "value")
        return structure.build([proxy.value if proxy.number else proxy for proxy in found])

    def assume(self, proxy: ValueProxy, use: str, convert: Any = None) -> None:
        """Leave a guard behind where Python looks at a number that may be another one in another call: what `convert`
        makes of it must be what it is now."""
        if self._evaluating or (proxy.node.name, use) in self._assumed:
            return
        self._assumed.add((proxy.node.name, use))
        node, value = proxy.node, proxy.value
        named = node.op == "placeholder" and is_number(value)
        if convert is not None and (not named or type(convert(value)) is not type(value)):
            node, value, named = self.create_node("call_function", convert, (node,), {}), convert(value), False
        about = (proxy.node.name,) if named else (f"`{use}` of `{proxy.node.name}`", place_in_source())
        form = form_of(value if value is not None else 0, lambda _: False)
        self.create_node("call_function", require, (node, form, *about), {})

    def assume_type(self, proxy: ValueProxy) -> None:
        """Leave a guard behind where the model asks for the type of a number among the arguments."""
        key = proxy.node.name, "type"
        if self._evaluating or key in self._assumed or not asked_by_model():
            return
        self._assumed.add(key)
        form = "type", type(proxy.value).__name__
        self.create_node("call_function", require, (proxy.node, form, proxy.node.name, place_in_source()), {})

    def _evaluated(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return self._examples[target]
        if kind == "get_attr":
            return functools.reduce(plain_attribute, target.split("."), self.root)

        found, structure = flatten((args, kwargs), _is_proxy)
        args, kwargs = structure.build([proxy.value for proxy in found])
        self._evaluating = True
        try:
            if kind == "call_module":
                return self.root.get_submodule(target)(*args, **kwargs)
            return getattr(args[0], target)(*args[1:], **kwargs) if kind == "call_method" else target(*args, **kwargs)
        finally:
            self._evaluating = False

    def _tainted(self, kind: str, target: Any, given: list[ValueProxy], value: Any) -> bool:
        """Whether a number came out of the content of a tensor."""
        if kind not in ("call_function", "call_method") or leaves(value):
            return False
        about_shape = target in (SHAPE_METHODS if kind == "call_method" else SHAPE_FUNCTIONS)
        return any(p.tainted or (isinstance(p.value, Tensor) and not about_shape) for p in given)

    @contextmanager
    def patched_factories(self) -> Iterator[None]:
        """`torch.zeros(n)` and its like do not dispatch on a size that is a proxy; here they do."""

        def recorded(original: Any, *, always: bool = False) -> Any:
            @functools.wraps(original)
            def factory(*args: Any, **kwargs: Any) -> Any:
                drawn = always and kwargs.get("generator") is None
                if self._evaluating or not (drawn or flatten((args, kwargs), _is_proxy)[0]):
                    return original(*args, **kwargs)
                return self.create_proxy("call_function", original, args, kwargs)

            return factory

        with ExitStack() as stack:
            for name in (*FACTORIES, *DRAWS):
                original = getattr(torch, name)
                function = recorded(original, always=name in DRAWS)
                stack.enter_context(mock.patch.object(torch, name, only_here(function, original)))
            for name in MATH:
                original = getattr(math, name)
                stack.enter_context(mock.patch.object(math, name, only_here(recorded(original), original)))
            stack.enter_context(mock.patch.object(torch, "is_tensor", _on_value(torch.is_tensor)))
            for name in ("finfo", "iinfo"):
                stack.enter_context(mock.patch.object(torch, name, type_on_value(getattr(torch, name), _on_value)))
            yield


class ValueProxy(fx.Proxy):
    """A proxy that knows the value of its node on the sample, and answers Python with it."""

    value: Any = None
    tainted: bool = False
    given: bool = False  # it depends on an argument
    sized: bool = False  # it is no tensor, and depends on sizes or numbers of the arguments
    number: bool = False  # it depends on a number among the arguments
    tracer: ValueTracer
    __getitem__: Any  # given to `Proxy` when torch.fx is imported

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """So that `isinstance(n, int)` is true in the model. Never for tensors: compiled code would believe it."""
        if self.number:
            self.tracer.assume_type(self)
        return type(self) if isinstance(self.value, (Tensor, type(None))) else type(self.value)

    def __getattr__(self, k: str) -> Any:
        value = getattr(self.value, k)
        if callable(value) and not isinstance(value, (Tensor, nn.Module)):
            return self._method(k, value)
        constant = self.node.op == "get_attr" and isinstance(value, tuple)  # the shape of a parameter
        if isinstance(value, self.tracer.recorded) and not constant:
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return value

    def _method(self, name: str, value: Any) -> Any:
        if self.node.op == "get_attr" and name in SHAPE_METHODS:
            return value
        return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)

    def concrete(self, use: str, convert: Any = None) -> Any:
        """The value, unless it depends on the content of an input; with a guard where it depends on a size."""
        if self.tainted or (isinstance(self.value, Tensor) and self.node.op != "get_attr"):
            raise DataDependentError(f"`{use}` of `{self.node.name}` depends on the content of a tensor.")
        if self.sized:
            self.tracer.assume(self, use, convert)
        return self.value

    def __bool__(self) -> bool:
        return bool(self.concrete("bool", operator.truth))

    def __int__(self) -> int:
        return int(self.concrete("int", int))

    def __index__(self) -> int:
        return operator.index(self.concrete("int"))

    def __float__(self) -> float:
        return float(self.concrete("float"))

    def __hash__(self) -> int:
        return hash(self.concrete("hash")) if is_number(self.value) and self.sized else object.__hash__(self)

    def __str__(self) -> str:
        return str(self.concrete("str")) if is_number(self.value) and asked_by_model() else super().__str__()

    def __format__(self, spec: str) -> str:
        return format(self.concrete("format"), spec) if is_number(self.value) else super().__format__(spec)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __round__(self, *digits: Any) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def __array_ufunc__(self, function: Any, how: str, *given: Any, **options: Any) -> Any:
        """A function of NumPy on a number: `np.sqrt(n)` is `math.sqrt(n)`; of others Python sees the value."""
        if how == "__call__" and function.__name__ in MATH and not options:
            return getattr(math, function.__name__)(*given)
        plain = [value.concrete("number") if _is_proxy(value) else value for value in given]
        return getattr(function, how)(*plain, **options)

    def __len__(self) -> int:
        varies = isinstance(self.value, Tensor) or (self.node.op != "placeholder" and bool(leaves(self.value)))
        if self.given and varies:  # so many rows, chunks, parts
            self.tracer.assume(self, "len", len)
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return iter(self.value)
        return (self[index] for index in range(len(self)))

    def __contains__(self, item: Any) -> bool:
        return item in self.concrete("in")

    def keys(self) -> Any:
        return self.value.keys()

    def items(self) -> Any:
        return [(key, self[key]) for key in self.value]

    @property
    def values(self) -> Any:
        """Of a mapping a method; what `max` and `sort` return has a tensor of that name."""
        if isinstance(self.value, Mapping):
            return lambda: [self[key] for key in self.value]
        return self.__getattr__("values")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _on_value(original: Any) -> Any:
    """The function of the value that a proxy stands for, not recorded."""
    return lambda *args: original(*(arg.value if issubclass(type(arg), ValueProxy) else arg for arg in args))


def _is_proxy(value: Any) -> bool:
    return issubclass(type(value), ValueProxy)

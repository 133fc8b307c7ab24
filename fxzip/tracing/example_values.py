"""The second rung: a symbolic trace with example values.

Every proxy carries the value that the recorded call gave on the sample. Sizes stay in the graph where they flow into
other calls, so that other batch sizes work. Python itself (`if`, `range`, `int`, unpacking) sees the example value, and
is refused a value that depends on the content of a tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from .calls import Call
from .containers import flatten, leaves
from .guards import asked_by_model, form_of, guard_kind, guard_rank, guard_type, place_in_source, require
from .python_numbers import MATH, is_number, may_read
from .questions import (
    DRAWS,
    FACTORIES,
    RANK_METHODS,
    SHAPE_FUNCTIONS,
    SHAPE_METHODS,
    SIZE_METHODS,
    TYPE_QUESTIONS,
    plain_attribute,
    type_on_value,
)
from .symbolic import SymbolicTracer
from .threads import only_here
from .value_proxies import DataDependentError, ValueProxy, is_proxy, on_value


def trace_with_values(root: nn.Module, call: Call, *, asked: bool = False) -> fx.Graph:
    """The graph of the root on the sample. `asked`: see `SymbolicTracer`.

    Devices and dtypes stay in the graph like sizes do, so that the program can be moved; where a model asks too much of
    them, they are constants.

    >>> graph = trace_with_values(nn.Sequential(nn.ReLU()), Call((torch.ones(1),), {}))
    >>> len(graph.nodes)
    3
    """
    tracer = ValueTracer(root, call, placement=True, asked=asked)
    try:
        with tracer.patched_factories():
            return tracer.trace(root)
    except DataDependentError:
        raise
    except Exception:  # compiled code that wants a real device or dtype
        tracer = ValueTracer(root, call, placement=False, asked=asked)
        with tracer.patched_factories():
            return tracer.trace(root)


class ValueTracer(SymbolicTracer):
    """Runs every call on the sample as it records it."""

    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, call: Call, *, placement: bool, asked: bool) -> None:
        super().__init__(root, call, asked=asked)
        self.param_shapes_constant = False
        kinds = (Tensor, tuple, torch.device, torch.dtype) if placement else (Tensor, tuple)
        self.recorded: tuple[type, ...] = kinds
        self._evaluating = False
        self._examples: dict[str, Any] = {}
        self._assumed: set[tuple[str, str]] = set()
        self._tensors: list[ValueProxy] = []  # among the arguments
        self._ranks_asked = False

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

    def _unpacked(self, proxy: Any, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._tensors.append(proxy)
        return super()._unpacked(proxy, value)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        if target is not require and any(p.number for p in flatten((args, kwargs), is_proxy)[0]):
            args = tuple(self._built_in(kind, target, place, value) for place, value in enumerate(args))
            kwargs = {key: self._built_in(kind, target, key, value) for key, value in kwargs.items()}
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        given = flatten((args, kwargs), is_proxy)[0]
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
        about_dtype = target in TYPE_QUESTIONS or (target is getattr and args[1] == "dtype")
        asked = about_dtype and any(p.node is own.node for p in given for own in self._tensors)
        proxy.sized = plain and (asked or any(p.sized or (p.given and about_size) for p in given))
        if target in RANK_METHODS and proxy.given:
            self.assume_ranks()
        return proxy

    def _built_in(self, kind: str, target: Any, place: Any, value: Any) -> Any:
        """An argument with values for numbers that the call may not read."""
        if may_read(kind, target, place):
            return value
        found, structure = flatten(value, is_proxy)
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

    def assume_ranks(self) -> None:
        """Leave guards behind for the numbers of axes of all arguments where the model asks for one: of what follows
        from the arguments, too, it follows from theirs."""
        if self._evaluating or self._ranks_asked or not asked_by_model():
            return
        self._ranks_asked = True
        for proxy in self._tensors:
            with self.graph.inserting_before(proxy.node.next):
                guard_rank(self.graph, proxy.node, proxy.value.ndim)

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

        found, structure = flatten((args, kwargs), is_proxy)
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

    def stands_for(self, proxy: Any, kinds: Any) -> bool:
        if self._is_given_tensor(proxy):
            guard_kind(self.graph, proxy.node, proxy.value, kinds)
        if proxy.number and kinds is Tensor:
            self._assume_number(proxy)
        elif proxy.number:
            self.assume_type(proxy)
        return isinstance(proxy.value, kinds)

    def value_of(self, proxy: Any) -> Any:
        if self._is_given_tensor(proxy):
            guard_kind(self.graph, proxy.node, proxy.value, Tensor)
        if proxy.number:
            self._assume_number(proxy)
        return proxy.value

    def type_of(self, proxy: Any) -> type:
        if self._is_given_tensor(proxy):
            guard_type(self.graph, proxy.node, type(proxy.value))
        if proxy.number:
            self.assume_type(proxy)
        return type(proxy.value)

    def _is_given_tensor(self, proxy: ValueProxy) -> bool:
        return proxy.node in self._given and not self._evaluating

    def _assume_number(self, proxy: ValueProxy) -> None:
        """Leave a guard behind where the model asks what a number is that may be another one."""
        if not self._evaluating and (proxy.node.name, "number") not in self._assumed:
            self._assumed.add((proxy.node.name, "number"))
            self.create_node("call_function", require, (proxy.node, ("number",), proxy.node.name), {})

    @contextmanager
    def patched_factories(self) -> Iterator[None]:
        """`torch.zeros(n)` and its like do not dispatch on a size that is a proxy; here they do."""

        def recorded(original: Any, *, always: bool = False) -> Any:
            @functools.wraps(original)
            def factory(*args: Any, **kwargs: Any) -> Any:
                drawn = always and kwargs.get("generator") is None
                if self._evaluating or not (drawn or flatten((args, kwargs), is_proxy)[0]):
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
            for name in ("finfo", "iinfo"):
                stack.enter_context(mock.patch.object(torch, name, type_on_value(getattr(torch, name), on_value)))
            yield

"""What stands for the values of a trace with example values: proxies that answer Python."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .containers import leaves
from .guards import asked_by_model
from .python_numbers import MATH, is_number
from .questions import SHAPE_METHODS

if TYPE_CHECKING:
    from .example_values import ValueTracer


class DataDependentError(RuntimeError):
    """A Python condition or number depends on the content of a tensor."""


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
        if k == "ndim" and self.given:
            self.tracer.assume_ranks()
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
        plain = [value.concrete("number") if is_proxy(value) else value for value in given]
        return getattr(function, how)(*plain, **options)

    def __len__(self) -> int:
        varies = isinstance(self.value, Tensor) or (self.node.op != "placeholder" and bool(leaves(self.value)))
        if self.given and varies:  # so many rows, chunks, parts
            self.tracer.assume(self, "len", len)
        if self.given and isinstance(self.value, torch.Size):
            self.tracer.assume_ranks()
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return iter(self.value)
        return (self[index] for index in range(len(self)))

    def __contains__(self, item: Any) -> bool:
        if self.given and isinstance(self.value, torch.Size):  # asked of each size, so that others may vary
            return any(bool(size == item) for size in self)
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


def on_value(original: Any) -> Any:
    """The function of the value that a proxy stands for, not recorded."""
    return lambda *args: original(*(arg.value if issubclass(type(arg), ValueProxy) else arg for arg in args))


def is_proxy(value: Any) -> bool:
    return issubclass(type(value), ValueProxy)

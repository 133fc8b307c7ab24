"""Python numbers as arguments: where a graph may read one, and where its value has to be built in.

A number may be a scalar in arithmetic and comparisons with tensors, and what a tensor is filled with. What it does
there is the same for every value, as far as labels are concerned. As a size, an index, a shift or a setting it is
built in, with a guard: the graph, and what is found out about it, would be another one.
"""

from __future__ import annotations

import math
import operator
from enum import Enum
from typing import Any

import numpy as np
import torch

_ARITHMETIC = frozenset(
    [
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs"),
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
        *("lt", "le", "gt", "ge", "eq", "ne"),
    ]
)
_TENSOR_ARITHMETIC = frozenset(
    [
        *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow", "rsub", "remainder"),
        *("add_", "sub_", "mul_", "div_", "pow_", "lt", "le", "gt", "ge", "eq", "ne", "clamp", "clip", "clamp_min"),
        *("clamp_max", "where", "masked_fill", "masked_fill_", "lerp", "fill_", "full_like", "tensor", "as_tensor"),
        *("scalar_tensor", "new_tensor", "item"),
    ]
)
_FUNCTIONS = frozenset(getattr(torch, name) for name in _TENSOR_ARITHMETIC if hasattr(torch, name))
_FULL = torch.full  # tracing puts another function in its place
MATH = ("sqrt", "exp", "log", "log2", "log10", "log1p", "expm1", "pow", "sin", "cos", "tan", "tanh", "ceil", "floor")
"""Functions of `math` that a trace records."""

_PLAIN = frozenset([*(getattr(operator, name) for name in _ARITHMETIC), *(getattr(math, name) for name in MATH)])
_OWN = frozenset([bool, int, float, complex, str])
_CONVERSIONS = frozenset([int, float, bool, round, abs, math.trunc, operator.truth])


def is_number(value: Any) -> bool:
    """Whether an argument may be read by a graph: an integer or a real number, not a truth value.

    >>> is_number(3), is_number(True)
    (True, False)
    """
    return type(value) in (int, float)


def plain_number(value: Any) -> Any:
    """A number or string of NumPy, or of a subclass of Python's, as Python's own; anything else as it is.

    >>> plain_number(np.float64(8.0)), plain_number(np.int64(3)), plain_number("text")
    (8.0, 3, 'text')
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in _OWN or isinstance(value, Enum):
        return value
    kind: Any = next((kind for kind in (int, float, complex, str) if isinstance(value, kind)), None)
    return value if kind is None else kind(value)


def may_read(kind: str, target: Any, place: Any) -> bool:
    """Whether a call may read a number at a place of its arguments (a position or a keyword).

    >>> may_read("call_method", "view", 1), may_read("call_function", operator.mul, 1)
    (False, True)
    """
    if kind not in ("call_function", "call_method"):
        return False
    if target is operator.setitem:
        return bool(place == 2)
    if kind == "call_function" and target in _PLAIN | _CONVERSIONS:
        return True
    if kind == "call_function":
        return target in _FUNCTIONS or (target is _FULL and place in (1, "fill_value"))
    return target in _TENSOR_ARITHMETIC or (target == "new_full" and place in (2, "fill_value"))

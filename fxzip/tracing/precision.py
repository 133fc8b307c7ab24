"""Products in the precision of their operands, and devices that cannot hold float64.

Tensor cores round float32 to TF32 (10 bits of 23) where that is allowed, as it is by default in convolutions; what is
compared, fitted or solved would then be rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_FULL = "highest", False
_CALLER: ContextVar[tuple[str, bool] | None] = ContextVar("precision of the caller", default=None)


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, and no bfloat16 in float32's stead; afterwards what was allowed before is allowed again.

    >>> torch.set_float32_matmul_precision("high")
    >>> with full_precision():
    ...     torch.get_float32_matmul_precision()
    'highest'
    >>> torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision("highest")
    ('high', None)
    """
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by the newer interface, beside which PyTorch does not let the older one be read
        with _full_precision_by_operator():
            yield
        return
    token = _CALLER.set(_CALLER.get() or before)
    _set(*_FULL)
    try:
        yield
    finally:
        _set(*before)
        _CALLER.reset(token)


@contextmanager
def callers_precision() -> Iterator[None]:
    """Inside of `full_precision`, what was allowed outside: for measuring what a network takes when it is used."""
    before = _CALLER.get()
    if before is None:
        yield
        return
    _set(*before)
    try:
        yield
    finally:
        _set(*_FULL)


def _set(products: str, convolutions: bool) -> None:
    """What float32 is rounded to; what is so already is left alone."""
    if torch.get_float32_matmul_precision() != products:
        torch.set_float32_matmul_precision(products)
    if torch.backends.cudnn.allow_tf32 != convolutions:
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def _full_precision_by_operator() -> Iterator[None]:
    backends: Any = torch.backends
    operators = (
        backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv,
    )  # fmt: skip
    before = [(own, own.fp32_precision) for own in operators]
    for own in operators:
        own.fp32_precision = "ieee"
    try:
        yield
    finally:
        for own, value in before:
            own.fp32_precision = value


def place_of_float64(device: torch.device) -> torch.device:
    """Where float64 beside a device is: there, or on the CPU where the device holds none.

    >>> place_of_float64(torch.device("cpu"))
    device(type='cpu')
    """
    return device if has_float64(device) else torch.device("cpu")


def has_float64(device: torch.device) -> bool:
    """Whether tensors on a device may be float64; Apple's GPUs hold none.

    >>> has_float64(torch.device("cpu"))
    True
    """
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True

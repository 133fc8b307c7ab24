"""What of PyTorch's surroundings is switched off while a public function computes, and where none can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Distribution
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..errors import InputError
from .precision import full_precision
from .threads import Replacement, ThreadPatch, runs_here, traces_apart

_FX_TRACE = fx.Tracer.trace.__code__
_NONE = torch.Size()
_COMPILING = ThreadPatch(  # a `torch.export` in another thread sets it for all; for fxzip's own see `exporting.py`
    lambda: [(torch.compiler, name, lambda: False) for name in ("is_compiling", "is_exporting")]
)


def _unchecked() -> list[Replacement]:
    original = Distribution.__init__

    def unchecked(
        self: Distribution, batch_shape: torch.Size = _NONE, event_shape: torch.Size = _NONE,
        validate_args: bool | None = None,
    ) -> None:  # fmt: skip
        original(self, batch_shape, event_shape, bool(validate_args))

    return [(Distribution, "__init__", unchecked)]


_UNCHECKED = ThreadPatch(_unchecked)
"""Distributions do not check their arguments unless they are told to: checks read values, and compute nothing."""


@contextmanager
def plain_context() -> Iterator[None]:
    """Inference mode, autocast and TF32 of the caller switched off: values would be other ones, and calls other calls.
    What another thread traces meanwhile does not reach this one. Where tensors have no values, inside of a trace or a
    transform, nothing can be computed.

    >>> with torch.inference_mode(), plain_context():
    ...     print(torch.is_inference_mode_enabled())
    False

    Raises:
        InputError: the caller is inside of a trace or of a transform.
    """
    if around := _without_values():
        raise InputError(
            f"fxzip computes with values, and must be called outside of {around}, where tensors have none. Make the "
            "zip first, and trace or transform that."
        )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(full_precision())
        stack.enter_context(traces_apart())
        stack.enter_context(_COMPILING.inside())
        stack.enter_context(_UNCHECKED.inside())
        yield


def _without_values() -> str:
    """What of PyTorch this thread is inside of, in which tensors are no numbers; "" if nothing."""
    if torch._C._functorch.maybe_current_level() is not None:
        return "transforms of `torch.func`"
    if runs_here(_FX_TRACE):
        return "a trace of `torch.fx`"
    if any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack()):
        return "a `FakeTensorMode`"
    return ""

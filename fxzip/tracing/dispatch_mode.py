"""The dispatch mode that all others of the package derive from."""

from __future__ import annotations

from types import CodeType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


def _skip(code: CodeType) -> bool:
    """Have PyTorch's compiler skip a function and all that it calls; False where this PyTorch has no call for that."""
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

        set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    except (ImportError, AttributeError, TypeError):
        return False
    return True


class DispatchMode(TorchDispatchMode):
    """Sees the ATen calls of this thread; PyTorch's compiler looks neither into what it does nor into what that calls.

    PyTorch sees to that itself, by a wrapper that imports the compiler with the first call, which takes seconds.
    """

    _is_skipped = False

    def __init_subclass__(cls, **options: Any) -> None:
        own = cls.__dict__.get("__torch_dispatch__")
        cls._is_skipped = own is not None and _skip(own.__code__)
        super().__init_subclass__(**options)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # by that wrapper
        return not cls._is_skipped

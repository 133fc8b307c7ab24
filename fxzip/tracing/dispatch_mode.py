"""The dispatch mode that all others of the package derive from."""

from __future__ import annotations

from typing import Any

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """Sees the ATen calls of this thread; PyTorch's compiler looks neither into what it does nor into what that calls.

    PyTorch sees to that itself, by a wrapper that imports the compiler with the first call, which takes seconds.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = cls.__dict__.get("__torch_dispatch__")
        if own is not None:
            strategy = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
            set_code_exec_strategy(own.__code__, strategy)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # by that wrapper
        return False

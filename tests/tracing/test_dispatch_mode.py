"""Dispatch modes see calls, and PyTorch's compiler does not look into them, whatever PyTorch offers to tell it so."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxzip.tracing import dispatch_mode


@pytest.mark.parametrize("offered", [True, False])
def test_calls_are_seen_and_the_compiler_stays_out(offered, monkeypatch):
    if not offered:  # as of a PyTorch without the private call
        monkeypatch.setattr(dispatch_mode, "_skip", lambda code: False)

    def seen(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    class Seeing(dispatch_mode.DispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        __torch_dispatch__ = seen

    wraps = hasattr(TorchDispatchMode, "_should_skip_dynamo")  # as newer versions of PyTorch do
    assert (Seeing.__torch_dispatch__ is seen) == (offered or not wraps)
    with Seeing() as mode:
        torch.ones(2).add(1)
    assert mode.names == ["aten::ones", "aten::add"]
    assert dispatch_mode._skip(seen.__code__) == offered

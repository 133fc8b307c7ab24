"""`len` of a tensor in a model's code is the size of its first axis: recorded as such, it follows the input.

Python turns whatever `len` returns into an integer, so that no proxy could answer it; a name `len` beside the functions
of the model can. It is there while the model is traced only, and does for all other values what `len` does.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn


def recorded_len(value: Any) -> Any:
    """The size of the first axis where a tensor is traced, else what `len` gives.

    >>> recorded_len([1, 2])
    2
    """
    if issubclass(type(value), fx.Proxy) and isinstance(vars(value).get("value"), (Tensor, type(None))):
        return value.size(0)
    return builtins.len(value)


@contextmanager
def len_recorded(model: nn.Module) -> Iterator[None]:
    """Inside, functions next to the `forward`s of a model and its modules find `recorded_len` as `len`."""
    spaces: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        forward = vars(module).get("forward", type(module).forward)
        found = getattr(getattr(forward, "__func__", forward), "__globals__", None)
        if found is not None and "len" not in found and not _is_torchs(found):
            spaces[id(found)] = found
    for found in spaces.values():
        found["len"] = recorded_len
    try:
        yield
    finally:
        for found in spaces.values():
            del found["len"]


def _is_torchs(space: dict[str, Any]) -> bool:
    """PyTorch's own modules are leaves, or are traced as they are."""
    return str(space.get("__name__", "")).partition(".")[0] == "torch"

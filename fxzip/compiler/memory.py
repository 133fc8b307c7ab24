"""Peak memory of a network: its parameters and buffers, and the tensors that live at once while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..tracing.calls import Call, leaves, map_tensors
from ..tracing.execution import storage_of
from ..tracing.state import restored_state


class _Living(TorchDispatchMode):
    """Bytes of the storages that live, and the most that did."""

    def __init__(self, counted: set[int]) -> None:
        super().__init__()
        self.most = 0
        self._others = counted  # parameters, buffers and inputs, by storage
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.layout == torch.strided and storage_of(value) not in self._others:
                storage = value.untyped_storage()
                self._living[storage_of(value)] = StorageWeakRef(storage), storage.nbytes()
        self._living = {key: own for key, own in self._living.items() if not own[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._living.values()))
        return result


def _bytes(value: Tensor) -> int:
    """Of the memory of a tensor; of a sparse one that of its values."""
    return value.untyped_storage().nbytes() if value.layout == torch.strided else value._nnz() * value.element_size()


def peak_bytes(networks: Sequence[nn.Module], call: Call) -> int:
    """The most bytes at once, of networks that run one after another on one input and whose outputs are kept.

    Parameters and buffers of all of them count, the input and what a kernel needs inside itself do not.

    >>> peak_bytes([nn.Linear(10, 10, bias=False)], Call((torch.ones(2, 10),), {}))
    480

    Args:
        networks: in evaluation mode.
        call: what they are given, a copy of it.
    """
    own = map_tensors(torch.clone, call)  # some networks write into their inputs
    tensors = [value for net in networks for value in (*net.parameters(), *net.buffers())]
    held = {storage_of(value): _bytes(value) for value in tensors}
    living = _Living(held.keys() | {storage_of(value) for value in leaves(own)})
    with restored_state(), torch.no_grad(), living:
        kept = [network(*own.args, **own.kwargs) for network in networks]
    del kept
    return sum(held.values()) + living.most

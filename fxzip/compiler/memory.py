"""Peak memory of a network: its parameters and buffers, and the tensors that live at once while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from ..tracing.calls import Call, leaves, map_tensors
from ..tracing.dispatch_mode import DispatchMode
from ..tracing.execution import storage_of
from ..tracing.state import restored_state


class _Living(DispatchMode):
    """Bytes of the storages that live: the most that did, in all and beyond those that did when `begin` was called."""

    def __init__(self, counted: set[int]) -> None:
        super().__init__()
        self.most = self.beyond = 0
        self._others = counted  # parameters, buffers and inputs, by storage
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before = 0

    def begin(self) -> None:
        """What lives now is no part of `beyond`."""
        self._before, self.beyond = self._now(), 0

    def _now(self) -> int:
        self._living = {key: own for key, own in self._living.items() if not own[0].expired()}
        return sum(size for _, size in self._living.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.layout == torch.strided and storage_of(value) not in self._others:
                storage = value.untyped_storage()
                self._living[storage_of(value)] = StorageWeakRef(storage), storage.nbytes()
        now = self._now()
        self.most, self.beyond = max(self.most, now), max(self.beyond, now - self._before)
        return result


def _bytes(value: Tensor) -> int:
    """Of the memory of a tensor; of a sparse one that of its values."""
    return value.untyped_storage().nbytes() if value.layout == torch.strided else value._nnz() * value.element_size()


@dataclass(frozen=True)
class Peaks:
    """The most bytes at once: of each network by itself, and of all that run one after another and keep their outputs.

    Parameters and buffers count, the input and what a kernel needs inside itself do not.
    """

    each: list[int]
    together: int


def peaks(networks: Sequence[nn.Module], call: Call) -> Peaks:
    """The peaks of networks, each of which is run once.

    >>> peaks([nn.Linear(10, 10, bias=False)], Call((torch.ones(2, 10),), {}))
    Peaks(each=[480], together=480)

    Args:
        networks: in evaluation mode.
        call: what they are given, a copy of it each.
    """
    calls = [map_tensors(torch.clone, call) for _ in networks]  # some networks write into their inputs
    held = [{storage_of(value): _bytes(value) for value in (*net.parameters(), *net.buffers())} for net in networks]
    whole = {place: size for one in held for place, size in one.items()}
    living = _Living(whole.keys() | {storage_of(value) for value in leaves(calls)})
    kept, each = list[Any](), list[int]()
    with restored_state(), torch.no_grad(), living:
        for network, own, parameters in zip(networks, calls, held, strict=True):
            living.begin()
            kept.append(network(*own.args, **own.kwargs))
            each.append(sum(parameters.values()) + living.beyond)
    del kept
    return Peaks(each, sum(whole.values()) + living.most)

"""The account of a network: what lies along the axes of every parameter and buffer."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from .relabelling import Relabelling
from .spaces import Along, Axis


class Account:
    """What lies along the axes of every parameter and buffer of a network."""

    def __init__(self) -> None:
        self.axes: dict[int, tuple[Along, ...]] = {}
        self.tensors: list[Tensor] = []

    def own(self, tensor: Tensor, *axes: Along) -> None:
        """Enter a tensor, whose axes may be joined: [2, 3, 4] as [6, 4]. One that is used twice moves alike in both."""
        assert tensor.numel() == math.prod(a if isinstance(a, int) else a.size for a in axes), (tensor.shape, axes)
        if id(tensor) in self.axes:
            for a, b in zip(self.axes[id(tensor)], axes, strict=True):
                if isinstance(a, Axis) and isinstance(b, Axis):
                    a.tie(b)
                else:
                    assert a == b
            return
        self.axes[id(tensor)] = axes
        self.tensors.append(tensor)  # so that no other tensor takes its id

    def counterpart(self, network: nn.Module, seed: int) -> nn.Module:
        """A copy of the network with its features in another order."""
        relabelling = Relabelling(seed)
        twin = copy.deepcopy(network)
        copies = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
        with torch.no_grad():
            for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
                if tensor.ndim:
                    axes = self.axes[id(tensor)]
                    seen = tensor.reshape([a if isinstance(a, int) else a.size for a in axes])
                    copies[name].copy_(relabelling.tensor(seen, axes).reshape(tensor.shape))
        return twin

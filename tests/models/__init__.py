"""The networks that tests share, and parameters that are not at their initial values."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomise(model: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Random parameters and statistics under which signals neither die nor explode; eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                uniform(tensor, 0.5, 1.5)
            elif tensor.ndim > 1:
                width = gain * (3 / max(tensor[0].numel(), 1)) ** 0.5
                uniform(tensor, -width, width)
            elif name.endswith(("bias", "running_mean")):
                uniform(tensor, -0.3, 0.3)
            elif isinstance(tensor, nn.Parameter):
                uniform(tensor, 0.5, 1.5)
    return model.eval()


def with_statistics_of(network: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy whose BatchNorms have the mean statistics of these batches, by PyTorch's own cumulative average."""
    result = copy.deepcopy(network)
    norms = [module for module in result.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            result(batch)
    return result.eval()

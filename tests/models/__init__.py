"""The networks that tests share, and parameters that are not at their initial values."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

"""The values of a tensor as bytes, to make checksums of."""

from __future__ import annotations

import torch
from torch import Tensor


def bytes_of(value: Tensor) -> memoryview:
    """The values in the order of their indices, whatever strides, layout and device.

    >>> bytes_of(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T).tolist()
    [1, 3, 2, 4]
    """
    dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
    flat = dense.resolve_conj().resolve_neg().contiguous().reshape(-1).cpu()
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")

"""Calls that ask about shapes, and calls that make tensors of sizes."""

from __future__ import annotations

import torch

FACTORIES = [
    "arange",
    "zeros",
    "ones",
    "full",
    "empty",
    "eye",
    "linspace",
    "tensor",
    "rand",
    "randn",
    "randint",
    "randperm",
    "tril_indices",
    "triu_indices",
    "sym_max",
    "sym_min",
    "as_tensor",
    "scalar_tensor",
]
SHAPE_METHODS = frozenset(
    [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "element_size",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "get_device",
        "storage_offset",
        "type",
    ]
)
SIZE_METHODS = frozenset(["size", "numel", "nelement"])
SHAPE_FUNCTIONS = frozenset((getattr, torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor))

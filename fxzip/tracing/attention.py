"""Attention as its matrix products, so that a handful of rules see it all.

Not by `torch.nn.attention.sdpa_kernel`: that chooses the kernel for all threads, and a network that runs in another one
would give other bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .randomness import unwatched

_FUSED = "aten::_scaled_dot_product_"


class MathAttention(TorchDispatchMode):
    """Fused attention kernels run as the math backend does. To be entered last: modes entered before see the products.

    >>> q = torch.randn(1, 1, 3, 4)
    >>> with torch.no_grad(), MathAttention():
    ...     y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> torch.allclose(y, (q @ q.mT / 2).softmax(-1) @ q, atol=1e-6)
    True
    """

    def __enter__(self) -> MathAttention:
        # Composite calls are split into their parts above autograd only; a mode runs below.
        self._above = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if not name.startswith(_FUSED) or name.endswith(("_math", "_backward")):
            return func(*args, **kwargs)
        given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | kwargs
        query, key = given["query"], given["key"]
        with torch._C._ForceDispatchKeyGuard(*self._above):
            output, _ = torch.ops.aten._scaled_dot_product_attention_math.default(
                query, key, given["value"], given.get("attn_mask", given.get("attn_bias")), given.get("dropout_p", 0.0),
                given.get("is_causal", False), scale=given.get("scale"), enable_gqa=query.shape[-3] != key.shape[-3],
            )  # fmt: skip
        return (output, *(_nothing(returned, query) for returned in func._schema.returns[1:]))


def _nothing(returned: Any, like: Tensor) -> Any:
    """In place of what only a backward pass of the fused kernel would read."""
    if "Tensor" not in str(returned.type):
        return 0
    with unwatched():
        return like.new_empty(0)

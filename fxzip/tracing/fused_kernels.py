"""Fused kernels as the calls they stand for, so that a handful of rules see it all: attention as its matrix products,
recurrent layers as their steps.

Which kernel PyTorch takes depends on device, dtype and build: the same `nn.LSTM` is `mkldnn_rnn_layer` in float32 on
a CPU, `_cudnn_rnn` on a GPU, and products in float64. What may be shared must not.

Not by `torch.nn.attention.sdpa_kernel` and the flags of `torch.backends`: these choose the kernel for all threads, and
a network that runs in another one would give other bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .dispatch_mode import DispatchMode
from .randomness import unwatched
from .recurrence import CELLS, gru_cell, layer, layers, lstm_cell

Given = Mapping[str, Any]
"""Arguments of a call by the names of its schema."""


class InParts(DispatchMode):
    """Fused kernels run as the calls they stand for. To be entered last: modes entered before see these.

    >>> q = torch.randn(1, 1, 3, 4)
    >>> with torch.no_grad(), InParts():
    ...     y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> torch.allclose(y, (q @ q.mT / 2).softmax(-1) @ q, atol=1e-6)
    True
    """

    def __enter__(self) -> InParts:
        # Composite calls are split into their parts above autograd only; a mode runs below.
        self._above = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parts = _parts_of(func._schema.name)
        if parts is None:
            return func(*args, **kwargs)
        arguments = func._schema.arguments
        defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
        given = defaults | dict(zip([argument.name for argument in arguments], args, strict=False)) | kwargs
        with torch._C._ForceDispatchKeyGuard(*self._above):
            results = parts(given)
        if results is None:
            return func(*args, **kwargs)
        like = next(value for value in results if isinstance(value, Tensor))
        return *results, *(_nothing(returned, like) for returned in func._schema.returns[len(results) :])


def _parts_of(name: str) -> Callable[[Given], tuple[Any, ...] | None] | None:
    """What computes the first results of a kernel, or gives None where it cannot."""
    if name.startswith("aten::_scaled_dot_product_") and not name.endswith(("_math", "_backward")):
        return _attention
    return _RECURRENT.get(name)


def _attention(given: Given) -> tuple[Any, ...]:
    query, key = given["query"], given["key"]
    output, _ = torch.ops.aten._scaled_dot_product_attention_math.default(
        query, key, given["value"], given.get("attn_mask", given.get("attn_bias")), given.get("dropout_p", 0.0),
        given.get("is_causal", False), scale=given.get("scale"), enable_gqa=query.shape[-3] != key.shape[-3],
    )  # fmt: skip
    return (output,)


def _one_layer(given: Given) -> tuple[Any, ...]:
    """oneDNN's: a layer in a direction, weights apart."""
    weights = [given[f"weight{k}"] for k in range(4 if given["has_biases"] else 2)]
    # Each state is [batch, features], or [1, batch, features] in exported graphs.
    first = given["hx_"], given["cx_"]
    state = tuple(part.flatten(0, -2) for part in first)
    y, last = layer(CELLS[given["mode"]], given["input"], weights, state, reverse=given["reverse"])
    return y, *(part.view_as(before) for part, before in zip(last, first, strict=True))


def _all_layers(given: Given) -> tuple[Any, ...] | None:
    """cuDNN's and MIOpen's: all layers at once. With dropout between them they stay what they are."""
    if given["train"] and given["dropout"]:
        return None
    each, rows = given["weight_stride0"], given["batch_sizes"]
    turned = given["batch_first"] and not rows
    y, (h, *c) = layers(
        CELLS[given["mode"]],
        given["input"].transpose(0, 1) if turned else given["input"],
        [given["weight"][k : k + each] for k in range(0, len(given["weight"]), each)],
        (given["hx"],) if given["cx"] is None else (given["hx"], given["cx"]),
        bidirectional=given["bidirectional"],
        rows=rows,
    )
    return y.transpose(0, 1) if turned else y, h, c[0] if c else h.new_empty(0)


def _cell(given: Given) -> tuple[Tensor, Tensor]:
    """The products that a cell is given, with their biases."""
    gates = []
    for side in ("input", "hidden"):
        bias = given[f"{side}_bias"]
        gates.append(given[f"{side}_gates"] if bias is None else given[f"{side}_gates"] + bias)
    return gates[0], gates[1]


_RECURRENT: dict[str, Callable[[Given], tuple[Any, ...] | None]] = {
    "aten::mkldnn_rnn_layer": _one_layer,
    "aten::_cudnn_rnn": _all_layers,
    "aten::miopen_rnn": _all_layers,
    "aten::_thnn_fused_lstm_cell": lambda given: lstm_cell(*_cell(given), (given["cx"], given["cx"])),
    "aten::_thnn_fused_gru_cell": lambda given: gru_cell(*_cell(given), (given["hx"],)),
}


def _nothing(returned: Any, like: Tensor) -> Any:
    """In place of what only a backward pass of the fused kernel would read."""
    if "Tensor" not in str(returned.type):
        return 0
    with unwatched():
        return like.new_empty(0)

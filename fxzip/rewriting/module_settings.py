"""Modules whose tensors have got another size: their settings say so too."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd


def adopt_sizes(module: nn.Module) -> None:
    """Bring settings such as `in_channels` of all modules inside into line with their tensors. In place.

    >>> import torch
    >>> linear = nn.Linear(4, 8)
    >>> linear.weight.data = torch.ones(10, 4)
    >>> adopt_sizes(linear)
    >>> linear
    Linear(in_features=4, out_features=10, bias=True)

    Of a convolution's groups each keeps its own inputs, so that a depthwise one stays depthwise.
    """
    for own in module.modules():
        weight = getattr(own, "weight", None)
        if isinstance(own, nn.Linear):
            own.out_features, own.in_features = own.weight.shape
        elif isinstance(own, _ConvNd):
            _adopt_channels(own)
        elif isinstance(own, nn.Embedding):
            own.embedding_dim = own.weight.shape[1]
        elif isinstance(own, _NormBase):
            held = next((t for t in (weight, own.running_mean) if isinstance(t, Tensor)), None)
            own.num_features = own.num_features if held is None else len(held)
        elif isinstance(own, nn.GroupNorm) and isinstance(weight, Tensor):
            own.num_channels = len(weight)
        elif isinstance(own, (nn.LayerNorm, nn.RMSNorm)) and isinstance(weight, Tensor):
            own.normalized_shape = tuple(weight.shape)
        elif isinstance(own, nn.PReLU):
            own.num_parameters = len(own.weight)


def _adopt_channels(own: _ConvNd) -> None:
    """A kernel is [outputs, inputs of a group, ...], that of a transposed convolution the other way round."""
    rows, columns = own.weight.shape[:2]
    before = own.in_channels if own.transposed else own.out_channels
    if own.groups > 1 and rows != before:
        if own.groups != before:
            raise ValueError(f"a kernel of {own.groups} groups cannot get {rows} rows instead of {before}")
        own.groups = rows
    other = own.groups * columns
    own.in_channels, own.out_channels = (rows, other) if own.transposed else (other, rows)

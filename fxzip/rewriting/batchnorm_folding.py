"""BatchNorm in evaluation is affine, y = s · x + t: find the linear calls that it folds into, and fold it.

    s = γ / √(σ² + ε),   t = β - s μ,      s · (W x + b) + t = (s W) x + (s b + t)

Two networks whose BatchNorms are set differently may compute the same features, and running variances are on another
scale than weights. So weights are compared with BatchNorm folded away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..partition.alignment import attribute
from .batchnorm_affine import affine_of

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class FoldedNorm:
    """A BatchNorm with statistics, and the linear call in front of it that nothing else reads; "" if there is none.

    `norm` and `linear` are module paths. `axis`: the axis of the linear call's weight that its outputs lie along.
    """

    norm: str
    linear: str = ""
    axis: int = 0


def find_norms(module: fx.GraphModule, nodes: Collection[str]) -> list[FoldedNorm]:
    """The BatchNorms among the nodes of a program. Modules that are called twice are left alone.

    >>> layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)
    >>> net = fx.symbolic_trace(nn.Sequential(*layers).eval())
    >>> find_norms(net, {node.name for node in net.graph.nodes})
    [FoldedNorm(norm='1', linear='0', axis=0), FoldedNorm(norm='3', linear='', axis=0)]
    """
    calls = Counter(id(attribute(module, str(n.target))) for n in module.graph.nodes if n.op == "call_module")
    found = []
    for node in module.graph.nodes:
        if node.name not in nodes or node.op != "call_module":
            continue
        norm = attribute(module, str(node.target))
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None or calls[id(norm)] > 1:
            continue
        source = node.all_input_nodes[0]
        linear = attribute(module, str(source.target)) if source.op == "call_module" else None
        alone = source.name in nodes and len(source.users) == 1 and calls[id(linear)] == 1
        if alone and isinstance(linear, _LINEAR) and _owns(module, linear):
            found.append(FoldedNorm(str(node.target), str(source.target), int(getattr(linear, "transposed", False))))
        else:
            found.append(FoldedNorm(str(node.target)))
    return found


def _owns(module: fx.GraphModule, linear: nn.Module) -> bool:
    """Whether its weight has one axis of outputs, and no other module and no node by itself has weight or bias."""
    if getattr(linear, "transposed", False) and getattr(linear, "groups", 1) > 1:
        return False
    own = {id(p) for p in linear.parameters()}
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    named = [name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in own]
    return len(named) == len(own) and read.isdisjoint(named)


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """s and t of a BatchNorm in evaluation, each [features]; computed in float64.

    >>> scale_and_shift(nn.BatchNorm1d(2, eps=0.0))[0]
    tensor([1., 1.])
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    affine, dtype = affine_of(norm), norm.running_mean.dtype
    return affine.scale.to(dtype), affine.behind(torch.zeros_like(affine.mean)).to(dtype)


def folded_linear(module: nn.Module, found: FoldedNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear call with the BatchNorm behind it folded in.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    >>> weight, bias = folded_linear(net, FoldedNorm("1", "0"))
    >>> x = torch.randn(5, 3)
    >>> torch.allclose(x @ weight.T + bias, net(x), atol=1e-6)
    True
    """
    linear = attribute(module, found.linear)
    scale, shift = scale_and_shift(attribute(module, found.norm))
    weight = linear.weight.detach()
    shape = [1] * weight.ndim
    shape[found.axis] = -1
    bias = shift if linear.bias is None else shift + scale * linear.bias.detach()
    return weight * scale.reshape(shape), bias

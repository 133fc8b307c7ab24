"""Calls as two calls: k×k to r features and 1×1 behind it, of linear layers two linear layers.

A call y = W x + b of rank r is y = B (A x) + b. A takes what the call takes, with its stride, padding and dilation, and
gives r features; B sums over them at every place and has the bias. That is fewer FLOPs where r (n + d) < n d, with n
outputs of d inputs each (input features times places of the kernel).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ..partition.alignment import attribute
from ..tracing.provenance import Provenance, mark, provenance_of

_POINTWISE: dict[type[nn.Module], Any] = {
    nn.Conv1d: nn.Conv1d, nn.Conv2d: nn.Conv2d, nn.Conv3d: nn.Conv3d,
    nn.ConvTranspose1d: nn.Conv1d, nn.ConvTranspose2d: nn.Conv2d, nn.ConvTranspose3d: nn.Conv3d,
}  # fmt: skip
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


@dataclass(frozen=True, eq=False)
class Factors:
    """What a weight is made of.

    Attributes:
        first: A, [r, d], inputs in the order of the weight.
        second: B, [n, r].
    """

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class LinearSize:
    """How large a call is.

    Attributes:
        outputs: n, how many features it gives.
        inputs: d, how many values each of them is a sum of: input features times places of the kernel.
        along: the axis of its weight that the outputs lie along.
    """

    outputs: int
    inputs: int
    along: int = 0

    @property
    def break_even(self) -> float:
        """The rank with which two calls take what one does.

        >>> LinearSize(64, 576).break_even
        57.6
        """
        return self.outputs * self.inputs / (self.outputs + self.inputs)

    def saves(self, rank: int) -> bool:
        """Whether two calls take less than one."""
        return rank * (self.outputs + self.inputs) < self.outputs * self.inputs


def linear_size(net: fx.GraphModule, node: fx.Node) -> LinearSize:
    """The size of a call that may be factorised (`why_whole` says nothing)."""
    module = attribute(net, str(node.target))
    weight: Tensor = module.weight
    along = int(isinstance(module, _TRANSPOSED))
    return LinearSize(weight.shape[along], weight.numel() // max(weight.shape[along], 1), along)


def why_whole(net: fx.GraphModule, node: fx.Node) -> str:
    """Why a node cannot be made two calls; "" if it can."""
    module = attribute(net, str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, nn.Module):
        return "it is no call of a layer"
    if parametrize.is_parametrized(module) or module._forward_pre_hooks or module._forward_hooks:
        return "its weight is computed from other parameters, or its result is changed by a hook"
    if type(module) is not nn.Linear and type(module) not in _POINTWISE:
        return f"`{type(module).__name__}` is neither a linear layer nor a convolution of PyTorch's own"
    if getattr(module, "groups", 1) > 1:
        return "it is grouped"
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return "its weight is not one of real numbers"
    return why_shared(net, module, str(node.target))


def why_shared(net: fx.GraphModule, module: nn.Module, path: str) -> str:
    """Why a module is not that of one call alone: others call it, or have one of its parameters; "" if it is."""
    calls = [str(node.target) for node in net.graph.nodes if node.op == "call_module"]
    times = Counter(id(own) for _, own in net.named_modules(remove_duplicate=False))
    if calls.count(path) > 1 or times[id(module)] > 1:
        return "it is called several times"
    held = Counter(id(own) for _, own in net.named_parameters(remove_duplicate=False))
    read = [str(node.target) for node in net.graph.nodes if node.op == "get_attr"]
    if any(held[id(own)] > 1 for own in module.parameters()) or any(name.startswith(f"{path}.") for name in read):
        return "others read its parameters, too"
    return ""


def factorise(net: fx.GraphModule, factors: Mapping[fx.Node, Factors]) -> None:
    """Make calls two calls, of these factors; the second one keeps the name, the bias and all users. In place."""
    for node, own in factors.items():
        path = str(node.target)
        module = attribute(net, path)
        net.set_submodule(path, nn.Sequential(*_split(module, own)).train(module.training))

        with net.graph.inserting_before(node):
            name = f"{node.name}_reduced"
            reduced = net.graph.create_node("call_module", f"{path}.0", node.args, node.kwargs, name=name)
        mark(reduced, Provenance(provenance_of(node).part))
        node.target, node.args, node.kwargs = f"{path}.1", (reduced,), {}
    if factors:
        net.graph.lint()
        net.recompile()


def _split(module: nn.Module, factors: Factors) -> tuple[nn.Module, nn.Module]:
    """The two modules; the bias is that of the module itself."""
    weight: Any = module.weight
    taken, given = factors.first.to(weight), factors.second.to(weight)
    rank, biased = len(taken), module.bias is not None
    first: nn.Module
    second: nn.Module
    if isinstance(module, nn.Linear):
        first = nn.Linear(module.in_features, rank, bias=False, device="meta")
        second = nn.Linear(rank, module.out_features, bias=biased, device="meta")
    else:
        names = (*_OPTIONS, "output_padding") if isinstance(module, _TRANSPOSED) else _OPTIONS
        options: dict[str, Any] = {name: getattr(module, name) for name in names}
        kind: Any = type(module)
        first = kind(module.in_channels, rank, **options, bias=False, device="meta")
        second = _POINTWISE[kind](rank, module.out_channels, 1, bias=biased, device="meta")
        taken = taken.reshape(rank, -1, *weight.shape[2:])
        taken = taken.transpose(0, 1) if isinstance(module, _TRANSPOSED) else taken
        given = given.reshape(*given.shape, *[1] * (weight.ndim - 2))
    for made, value in ((first, taken), (second, given)):
        made.weight = nn.Parameter(value.contiguous(), requires_grad=weight.requires_grad)
    if biased:
        second.bias = module.bias
    return first, second


def factorised_calls(net: fx.GraphModule) -> list[dict[str, Any]]:
    """The calls of a zipped network that were made two, as plain values: the path of what was one, its rank, and how
    many outputs and inputs it has."""
    found = []
    for node in net.graph.nodes:
        path, _, place = str(node.target).rpartition(".")
        before = node.all_input_nodes[0] if node.op == "call_module" and place == "1" and node.all_input_nodes else None
        if before is None or str(before.target) != f"{path}.0" or provenance_of(before).sources:
            continue
        first, second = linear_size(net, before), linear_size(net, node)
        found.append({"name": path, "rank": first.outputs, "outputs": second.outputs, "inputs": first.inputs})
    return found

"""Calls of `torch.nn.functional` on the parameters of one module become calls of the torch.nn module that they are.

A BatchNorm written as `F.batch_norm(x, self.running_mean, …)`, in a subclass with an activation say, and all that
`torch.export` gives, is then the same to all later stages as an `nn.BatchNorm2d`: networks that compute the same
align, and refits find their statistics. A call is raised if the tensors it takes are all that their owner holds, under
the names that the module of torch.nn gives them, and all else is constant. Parameters stay the same objects.
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

_Given = dict[str, Any]
_Build = Callable[[_Given, int], nn.Module]
_OWN = frozenset({"weight", "bias", "running_mean", "running_var"})
_LINEAR = ("input", "weight", "bias")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_ATEN_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")


def _linear(given: _Given, _axes: int) -> nn.Module:
    outputs, inputs = given["weight"].shape
    return nn.Linear(inputs, outputs, given.get("bias") is not None)


def _convolution(kind: type[nn.Module], *, transposed: bool = False) -> _Build:
    def build(given: _Given, _axes: int) -> nn.Module:
        first, second, *taps = given["weight"].shape
        channels = (first, second * given.get("groups", 1)) if transposed else (second * given.get("groups", 1), first)
        names = ("stride", "padding", "output_padding", "dilation", "groups")
        settings = {name: _amount(given[name]) for name in names if name in given}
        return kind(*channels, tuple(taps), bias=given.get("bias") is not None, **settings)

    return build


def _amount(value: Any) -> Any:
    """A setting as modules take it: a list of one number stands for that on every axis."""
    if isinstance(value, (list, tuple)):
        return int(value[0]) if len(value) == 1 else tuple(value)
    return value


def _batch_norm(given: _Given, axes: int) -> nn.Module:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[axes]
    if given.get("training", False) is not False or len({given.get(n) is None for n in ("weight", "bias")}) > 1:
        raise ValueError
    momentum, eps = given.get("momentum", 0.1), given.get("eps", 1e-5)
    return kind(len(given["running_mean"]), eps, momentum, affine=given.get("weight") is not None)


_ATEN = torch.ops.aten
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _table() -> Iterator[tuple[Any, tuple[_Build, tuple[str, ...]]]]:
    """Functions, how to build their modules, and the names of their arguments."""
    for linear in (F.linear, _ATEN.linear.default):
        yield linear, (_linear, _LINEAR)
    yield F.batch_norm, (_batch_norm, _NORM)
    for norm in (torch.batch_norm, _ATEN.batch_norm.default):
        yield norm, (_batch_norm, _ATEN_NORM)
    for axes, (kind, transposed) in enumerate(zip(_CONVS, _TRANSPOSED_CONVS, strict=True), 1):
        packet = getattr(_ATEN, f"conv{axes}d")
        for convolution in (getattr(torch, f"conv{axes}d"), packet.default, packet.padding):
            yield convolution, (_convolution(kind), _CONV)
        packet = getattr(_ATEN, f"conv_transpose{axes}d")
        for convolution in (getattr(torch, f"conv_transpose{axes}d"), packet.default if axes == 1 else packet.input):
            yield convolution, (_convolution(transposed, transposed=True), _TRANSPOSED)


_TABLE: Mapping[Any, tuple[_Build, tuple[str, ...]]] = dict(_table())


def raised(module: fx.GraphModule, shapes: Mapping[str, torch.Size]) -> fx.GraphModule | None:
    """The same graph with modules for such calls, on the same parameters; None when there are none.

    `shapes`: of what the nodes give.

    >>> class Scaled(nn.Linear):
    ...     def forward(self, x):
    ...         return F.linear(x, self.weight, self.bias).relu()
    >>> class Traced(fx.Tracer):
    ...     def is_leaf_module(self, m, name):
    ...         return False
    >>> net = nn.Sequential(Scaled(2, 3))
    >>> result = raised(fx.GraphModule(net, Traced().trace(net)), {})
    >>> [node.op for node in result.graph.nodes], result.get_submodule("0").weight is net[0].weight
    (['placeholder', 'call_module', 'call_method', 'output'], True)
    """
    graph = copy.deepcopy(module.graph)
    found: dict[str, list[tuple[fx.Node, nn.Module]]] = defaultdict(list)
    for node in graph.nodes:
        owner = _owner(node)
        if owner:
            built = _built(module, node, owner, shapes)
            found[owner] += [] if built is None else [(node, built)]
    alike = {owner: calls for owner, calls in found.items() if calls and len({repr(own) for _, own in calls}) == 1}
    if not alike:
        return None
    for owner, calls in alike.items():
        for node, _ in calls:
            _replace(graph, node, owner)
    read = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    held = {name: alike[name][0][1] if name in alike else operator.attrgetter(name)(module) for name in read}
    graph.lint()
    return fx.GraphModule(held, graph, "GraphModule").eval()


def _arguments(node: fx.Node) -> _Given:
    """The arguments by name; a call with others than the table knows gives none."""
    names = _TABLE[node.target][1]
    if len(node.args) > len(names) or not set(node.kwargs) <= set(names):
        return {}
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _owner(node: fx.Node) -> str:
    """The module whose tensors a call takes, "" if it takes others."""
    if node.op != "call_function" or node.target not in _TABLE:
        return ""
    given = _arguments(node)
    tensors = {name: value for name, value in given.items() if name in _OWN and value is not None}
    rest = [value for name, value in given.items() if name not in _OWN and name != "input"]
    if not tensors or not isinstance(given.get("input"), fx.Node) or fx.node.map_arg(rest, lambda n: None) != rest:
        return ""
    owners = set()
    for name, value in tensors.items():
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return ""
        owner, _, key = str(value.target).rpartition(".")
        owners.add(owner if key == name else "")
    return owners.pop() if len(owners) == 1 else ""


def _built(module: fx.GraphModule, node: fx.Node, owner: str, shapes: Mapping[str, torch.Size]) -> nn.Module | None:
    """The module for a call, None if its owner holds or is something else."""
    holder = module.get_submodule(owner)
    held = {name: t for name, t in (*holder._parameters.items(), *holder._buffers.items()) if t is not None}
    held.pop("num_batches_tracked", None)
    given = {
        name: operator.attrgetter(str(value.target))(module)
        if isinstance(value, fx.Node) and name != "input"
        else value
        for name, value in _arguments(node).items()
    }
    used = {name for name in _OWN if given.get(name) is not None}
    if type(holder) is not nn.Module or set(held) != used:
        return None
    source = given.pop("input")
    try:
        with torch.device("meta"):
            result = _TABLE[node.target][0](given, len(shapes.get(source.name, ())))
        for name in used:
            setattr(result, name, held[name])
    except (TypeError, ValueError, KeyError):  # no such module: an axis too many, a weight that is no parameter
        return None
    if isinstance(getattr(result, "num_batches_tracked", None), Tensor):
        result.register_buffer(
            "num_batches_tracked", torch.zeros((), dtype=torch.long, device=held["running_mean"].device)
        )
    return result


def _replace(graph: fx.Graph, node: fx.Node, owner: str) -> None:
    """Call the module instead. Tensors that nobody else reads go."""
    source = _arguments(node)["input"]
    with graph.inserting_before(node):
        called = graph.call_module(owner, (source,))
    called.meta = dict(node.meta)
    reads = [value for value in node.all_input_nodes if value.op == "get_attr"]
    node.replace_all_uses_with(called)
    graph.erase_node(node)
    for value in reads:
        if not value.users:
            graph.erase_node(value)

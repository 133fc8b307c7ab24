"""How the heads of a classifier end: their logits, and what the last linear call in front of them reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ...errors import InputError
from ...partition.alignment import attribute
from ...tracing.structure import Rebuild

_LINEAR = (F.linear, torch.ops.aten.linear.default)


@dataclass(frozen=True, eq=False)
class Ending:
    """How a head ends.

    Attributes:
        logits: the tensor that it returns.
        wrapper: what it is returned in, if a class is called on it (as Hugging Face's models do).
        call: its last linear or convolutional module.
        source: what that reads, features on `axis`.
    """

    logits: fx.Node
    wrapper: fx.Node | None
    call: fx.Node
    source: fx.Node
    axis: int


def ending(network: fx.GraphModule, k: int, output: Any) -> Ending:
    """The ending of head k, which returns `output`.

    >>> net = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> found = ending(net, 0, net.graph.output_node().args[0])
    >>> found.logits.name, found.source.name, found.axis
    ('_2', '_1', -1)

    Raises:
        InputError: it returns several tensors, or none of its modules is linear.
    """
    wrapper = output if isinstance(output, fx.Node) and isinstance(output.target, Rebuild) else None
    returned: list[fx.Node] = []
    fx.node.map_arg(output if wrapper is None else (wrapper.args, wrapper.kwargs), returned.append)
    if len(returned) != 1:
        raise InputError(f"Joint decisions need one tensor of logits of each head; head {k} returns {len(returned)}.")
    before = _ancestors(returned[0])
    for node in reversed(network.graph.nodes):
        axis = _feature_axis(network, node) if node in before else None
        if axis is not None:
            source = node.args[0] if node.args else node.kwargs["input"]
            assert isinstance(source, fx.Node)
            return Ending(returned[0], wrapper, node, source, axis)
    raise InputError(
        f"Joint decisions need a linear or convolutional module whose inputs tell the tasks apart; head {k} has none "
        f"in front of node `{returned[0].name}`."
    )


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, todo = {node}, [node]
    while todo:
        new = set(todo.pop().all_input_nodes) - found
        found |= new
        todo += new
    return found


def _feature_axis(network: fx.GraphModule, node: fx.Node) -> int | None:
    """Where the features lie in what a linear call reads; None for other calls."""
    if node.op == "call_module":
        called = attribute(network, str(node.target))
        return -1 if isinstance(called, nn.Linear) else 1 if isinstance(called, nn.modules.conv._ConvNd) else None
    return -1 if node.op == "call_function" and node.target in _LINEAR else None


def check_logits(shape: torch.Size | None, k: int) -> None:
    """Whether what head k returns is [batch, classes]; None stands for what is no tensor of floats."""
    if shape is None or len(shape) != 2 or shape[1] < 2:
        found = "no tensor" if shape is None else str(tuple(shape))
        raise InputError(
            f"Joint decisions need logits [batch, classes] of each head, of at least two classes; head {k} returns "
            f"{found}."
        )


def check_features(own: Tensor, inputs: int, k: int, head: Ending) -> None:
    """Whether the last linear call of head k reads features of each input."""
    if own.ndim < 2 or len(own) != inputs or (head.axis == -1 and own.ndim > 2):
        raise InputError(
            f"Joint decisions need features of each input; node `{head.call.name}`, the last linear call of head {k}, "
            f"reads {tuple(own.shape)} for {inputs} inputs."
        )

"""Where two models part, in words: what each does there, and what differs if it looks the same."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..tracing import Program

_NO_WEIGHT = "integers, booleans and buffers outside the `state_dict` are no weights: to be shared they must be equal"


def parted(
    first: Program, node: fx.Node | None, other: Program, twin: fx.Node | None,
    constants: Sequence[tuple[Tensor, Tensor]] = (),
) -> str:  # fmt: skip
    """What the first model does at `node` and the other at `twin`; None: it has ended. `constants`: tensors that are no
    weights, of both."""
    said = f"{_says(first, node)}, the other {_says(other, twin)}"
    if node is None or twin is None or node.op != twin.op:
        return said
    modules = [p.module for p in (first, other)]
    held = [attrgetter(str(n.target))(m) for m, n in zip(modules, (node, twin), strict=True) if n.op == "call_module"]
    if (type(held[0]) is not type(held[1])) if held else (node.op != "get_attr" and node.target != twin.target):
        return said
    why = _settings(*held) if held else _constants(node, twin)
    why = why or next((text for a, b in constants if (text := different(a, b))), "")
    return f"{said}: {why}" if why else said


def different(ours: Tensor, theirs: Tensor) -> str:
    """How two tensors that are no weights differ; "" if they do not.

    >>> different(torch.arange(3), torch.tensor([0, 2, 1]))[:48]
    '2 of 3 values differ, the first at [1]: 1 and 2;'
    """
    a, b = (t.detach().cpu() for t in (ours, theirs))
    a, b = (t if t.layout == torch.strided else t.to_dense() for t in (a, b))
    if a.shape != b.shape:
        return f"the shapes are {tuple(a.shape)} and {tuple(b.shape)}"
    if a.dtype != b.dtype:
        return f"the types are {a.dtype} and {b.dtype}"
    places = (a != b).nonzero()
    if not len(places):
        return ""
    at = tuple(places[0].tolist())
    return (
        f"{len(places)} of {a.numel()} values differ, the first at {list(at)}: {a[at].item()} and {b[at].item()}; "
        f"{_NO_WEIGHT}"
    )


def settings(module: nn.Module) -> tuple[tuple[str, Hashable], ...]:
    """The plain attributes of a module that are not sizes of its tensors, by name."""
    sizes = {n for t in (*module.parameters(), *module.buffers()) for n in t.shape}

    def known(value: Any) -> Hashable:
        if isinstance(value, (tuple, list)):
            return tuple("size" if isinstance(v, int) and v in sizes and v > 1 else repr(v) for v in value)
        number = isinstance(value, int) and not isinstance(value, bool)
        return "size" if number and value in sizes and value > 1 else repr(value)

    plain = (bool, int, float, str, tuple, list, type(None), torch.Size)
    return tuple(
        (key, known(value))
        for key, value in sorted(vars(module).items())
        if isinstance(value, plain) and not key.startswith("_") and key != "training"
    )


def _settings(ours: nn.Module, theirs: nn.Module) -> str:
    """The first setting of two modules of one class that differs."""
    other = dict(settings(theirs))
    for name, value in settings(ours):
        if name in other and value != other[name]:
            return f"`{name}` is {getattr(ours, name)!r} and {getattr(theirs, name)!r}"
    return ""


def _constants(node: fx.Node, twin: fx.Node) -> str:
    """The first constant among the arguments of two calls that differs."""
    ours, theirs = (list(_leaves((n.args, n.kwargs))) for n in (node, twin))
    for a, b in zip(ours, theirs, strict=False):
        if not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and repr(a) != repr(b):
            return f"with {a!r} and {b!r}"
    return ""


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for key, item in sorted(value.items()):
            yield key
            yield from _leaves(item)
    elif isinstance(value, slice):
        yield from _leaves((value.start, value.stop, value.step))
    else:
        yield value


def _says(program: Program, node: fx.Node | None) -> str:
    """What a program does at a node, in words."""
    if node is None:
        return "ends"
    if node.op == "call_module":
        return f"calls `{type(attrgetter(str(node.target))(program.module)).__name__}` (`{node.target}`)"
    name = getattr(node.target, "__name__", str(node.target))
    return f"reads `{node.target}`" if node.op == "get_attr" else f"calls `{name}` (node `{node.name}`)"

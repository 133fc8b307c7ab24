"""Which ATen calls of a zipped network read parameters: what could be refitted, inside leaf modules and functions too.

One run on the sample. Calls are counted within their node, as the analysis does, so the labels of their results are
known; see `analysis.labelling`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ...analysis.rules import RULES, movement
from ...tracing import quiet_execution
from ...tracing.aten_calls import AtenCall, run, tensors_in
from ...tracing.calls import Call
from ...tracing.containers import leaves
from .kernels import Kernel, call_kernel

Extent = tuple[int, int, int]  # storage of a tensor, first and last place in it

_SUMS = ("mm", "bmm", "addmm", "convolution", "baddbmm", "mv", "addmv", "dot", "_trilinear")
_NORMS = {  # name -> places of scale and shift
    "native_layer_norm": (2, 3),
    "native_group_norm": (1, 2),
    "native_batch_norm": (1, 2),
    "_native_batch_norm_legit_no_training": (1, 2),
    "cudnn_batch_norm": (1, 2),
    "miopen_batch_norm": (1, 2),
    "_fused_rms_norm": (2, None),
}


_FIRST = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "convolution": 0} | dict.fromkeys(_NORMS, 0)
"""Where the activations of a call are taken to be if nothing in it depends on the input."""

_RECENT = 16  # a bias is looked for behind so many linear calls


def is_move(name: str) -> bool:
    """Whether a call does nothing but move elements."""
    return RULES.get(name) is movement.move


@dataclass(frozen=True, eq=False)
class Use:
    """An ATen call on activations in which a parameter takes part.

    Attributes:
        node, call: where: the call's number inside its node.
        name: of the call.
        at: place of the activations among its arguments.
        reads: what it reads of the parameters.
        kernel: if it is a linear call whose weight is a parameter or a view of one.
        scale, shift: if it multiplies by or adds a parameter.
        sums: whether it is a linear call, of whatever kind.
        shape: of the result.
        returned: the shape in which its node returns the result, as the same run of values; None: it does not.
        follows: number of the use whose result this one reads, moved at most.
        still: whether no input has an influence: its activations are computed from parameters alone, or are one.
    """

    node: fx.Node
    call: int
    name: str
    at: int
    reads: tuple[Extent, ...]
    shape: torch.Size
    kernel: Kernel | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    sums: bool = False
    returned: torch.Size | None = None
    follows: int = -1
    still: bool = False


@dataclass
class Survey:
    """What a run showed: `uses` in order, `calls` per node, parameters that calls without activations, or the output,
    read, by node."""

    uses: list[Use] = field(default_factory=list)
    calls: Counter[fx.Node] = field(default_factory=Counter)
    static_reads: list[tuple[fx.Node, Extent]] = field(default_factory=list)
    held: set[int] = field(default_factory=set)

    def holds(self, value: Any) -> bool:
        """Whether this is a parameter or a view of one."""
        return isinstance(value, Tensor) and storage_of(value) in self.held


def storage_of(value: Tensor) -> int:
    """The storage that a tensor lies in, as a number."""
    return int(value.untyped_storage()._cdata)


def extent(value: Tensor) -> Extent:
    """Where a tensor lies.

    >>> _, first, last = extent(torch.zeros(4, 3)[1:3])
    >>> first, last
    (3, 8)
    """
    first = int(value.storage_offset())
    last = first + sum((n - 1) * int(s) for n, s in zip(value.shape, value.stride(), strict=True))
    return storage_of(value), first, last


def overlap(a: Extent, b: Extent) -> bool:
    """Whether two tensors may share memory."""
    return a[0] == b[0] and a[1] <= b[2] and b[1] <= a[2]


def _same_run(value: Tensor, result: Tensor) -> bool:
    """Whether both are the same memory in the same order."""
    same = storage_of(value) == storage_of(result) and value.numel() == result.numel()
    return same and (value.stride() == result.stride() or (value.is_contiguous() and result.is_contiguous()))


class _Uses:
    """Files every call that reads a parameter."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.found = Survey()
        self.static: dict[int, Tensor] = {id(t): t for t in (*module.parameters(), *module.buffers())}
        self.written: list[Tensor] = []
        self.learned = {id(t) for t in module.parameters()}
        self.found.held = {storage_of(t) for t in module.parameters()}
        self.made: dict[int, tuple[Tensor, int]] = {}  # storage -> result of a linear use, and the use's number
        self.results: list[tuple[int, Tensor]] = []  # of the uses in the node under way

    def on_call(self, call: AtenCall) -> Any:
        """Make a call, and file it if parameters take part."""
        inputs = call.tensors()
        moving = [value for value in inputs if id(value) not in self.static]
        learned = [value for value in inputs if id(value) in self.learned]
        out = call.make()
        results = tensors_in(out)

        if moving:
            self._written(results)
        if not moving:
            self._still(call, learned, results)
        elif learned and results:
            self._file(call, moving, learned, results)
        elif results and (is_move(call.name) or call.name == "clone") and storage_of(moving[0]) in self.made:
            _, number = self.made[storage_of(moving[0])]
            for value in results:
                self.made[storage_of(value)] = value, number
        self.found.calls[call.node] += 1
        return out

    def _still(self, call: AtenCall, learned: list[Tensor], results: list[Tensor]) -> None:
        """A call on which no input has an influence."""
        for value in results:
            self.static[id(value)] = value
        if not learned:
            return
        self.learned |= {id(value) for value in results}

        first = call.args[_FIRST[call.name]] if call.name in _FIRST and results else None
        # Of two tables of parameters either may be the other's weight; one row of them is what a weight is applied to.
        if first is not None and (not self.found.holds(first) or first.numel() == first.shape[-1]):
            self._file(call, [first], [value for value in learned if value is not first], results)
            learned = [value for value in learned if value is first]
        if not all(self.found.holds(value) for value in results):
            reads = [extent(value) for value in learned if self.found.holds(value)]
            self.found.static_reads += [(call.node, own) for own in reads]

    def _written(self, results: list[Tensor]) -> None:
        """What depends on the input now, because it was written into, is not static any more."""
        for storage in {storage_of(value) for value in results if id(value) in self.static}:
            for key in [key for key, value in self.static.items() if storage_of(value) == storage]:
                self.written.append(self.static.pop(key))  # held on to, so that no other tensor gets its number
                self.learned.discard(key)

    def _file(self, call: AtenCall, moving: list[Tensor], learned: list[Tensor], results: list[Tensor]) -> None:
        number, name = len(self.found.uses), call.name
        plain = name not in ("addmm", "add") or all(value == 1 for value in call.kwargs.values())
        args: tuple[Any, ...] = call.args if plain else ()
        at = next((place for place, value in enumerate(args) if any(value is m for m in moving)), -1)
        reads = tuple(extent(value) for value in learned if self.found.holds(value))
        given: dict[str, Any] = {"sums": name in _SUMS, "still": id(moving[0]) in self.static}
        real = not any(value.is_complex() for value in (*moving, *learned))
        if not real:
            pass
        elif name in _SUMS and len(moving) == 1 and all(self.found.holds(value) for value in learned):
            places = [p for p, v in enumerate(args) if isinstance(v, Tensor) and v.ndim > 1 and p != at]
            kernel = call_kernel(name, args, places[-1]) if places else None
            if kernel is not None and (kernel.bias is None or self.found.holds(kernel.bias)):
                given["kernel"] = kernel
        elif name in _NORMS:
            given["scale"], given["shift"] = (
                args[place] if place is not None and self.found.holds(args[place]) else None for place in _NORMS[name]
            )
        elif name in ("mul", "add") and len(args) == 2 and self.found.holds(args[1 - at]) and len(moving) == 1:
            given["scale" if name == "mul" else "shift"] = args[1 - at]
        _, follows = self.made.get(storage_of(moving[0]), (None, -1))
        shape = results[0].shape
        self.found.uses.append(Use(call.node, call.number, name, at, reads, shape, follows=follows, **given))
        self.results.append((number, results[0]))
        if given["sums"]:
            self.made = {key: held for key, held in self.made.items() if held[1] > number - _RECENT}
            self.made[storage_of(results[0])] = results[0], number

    def on_node(self, node: fx.Node, value: Any) -> Any:
        """The node is done and has returned this. What the network returns, parameters too, is read."""
        if node.op == "output":
            self.found.static_reads += [(node, extent(leaf)) for leaf in leaves(value) if self.found.holds(leaf)]
        for number, result in self.results:
            if isinstance(value, Tensor) and _same_run(value, result):
                self.found.uses[number] = replace(self.found.uses[number], returned=value.shape)
        self.results = []
        return value


def survey(net: fx.GraphModule, sample: Call) -> Survey:
    """All uses of parameters in a network, in order, from one run on a sample.

    >>> from torch import nn
    >>> net = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
    >>> [(use.name, use.sums) for use in survey(net, Call((torch.ones(1, 2),), {})).uses]
    [('addmm', True), ('native_layer_norm', False)]
    """
    uses = _Uses(net)
    with quiet_execution():
        run(net, sample, on_node=uses.on_node, on_call=uses.on_call)
    return uses.found

"""The one runner of graphs: it shows what each node returns, and the ATen calls inside nodes, numbered.

A call has the same number in every run of one graph on several inputs, of any number (on a single one tensors lie in
memory otherwise, see `calibration/joining.py`): numbers start anew at each node, attention is run as its matrix
products, and results are held on to until their node is done, since some calls cost one more where their input is
still needed.

Four others run graphs by themselves, for needs of their own: `analysis.labelling` frees labels together with values,
`execution.run_recorded` goes on where a guard fails, `refit.least_squares.lockstep` and `partition.lifting` compute
single nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .calls import Call
from .dispatch_mode import DispatchMode
from .execution import flat_inputs
from .fused_kernels import InParts


def name_of(func: Any) -> str:
    """The name of an ATen call, in-place variants under that of the others.

    >>> import torch
    >>> name_of(torch.ops.aten.add_.Tensor)
    'add'
    """
    return str(func._schema.name).split("::")[-1].rstrip("_")


@dataclass(frozen=True, eq=False)
class AtenCall:
    """A call that is about to be made.

    Attributes:
        node: that makes it.
        number: how many calls its node has made before.
        func: an operator of `torch.ops`.
        args, kwargs: its arguments.
    """

    node: fx.Node
    number: int
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """See `name_of`."""
        return name_of(self.func)

    def make(self) -> Any:
        """Its result."""
        return self.func(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """Those among its arguments, in order."""
        return tensors_in((self.args, self.kwargs))


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in a structure of containers, in order."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


OnCall = Callable[[AtenCall], Any]
"""Makes a call, or does something else in its stead; gives the result to go on with."""

OnNode = Callable[[fx.Node, Any], Any]
"""Is told what a node returned; gives the value to go on with."""


class _Numbered(DispatchMode):
    """Hands on every call of the node under way, with its number."""

    def __init__(self, on_call: OnCall) -> None:
        super().__init__()
        self.on_call = on_call
        self.node: fx.Node | None = None
        self.calls = 0
        self.kept: list[Any] = []

    def enter(self, node: fx.Node) -> None:
        """The next calls are those of this node."""
        self.node, self.calls, self.kept = node, 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert self.node is not None
        call = AtenCall(self.node, self.calls, func, tuple(args), kwargs or {})
        self.calls += 1
        self.kept.append(self.on_call(call))
        return self.kept[-1]


@contextmanager
def watched(node: fx.Node, on_call: OnCall) -> Iterator[None]:
    """Inside, calls are those of a node, and `on_call` makes them: for those who compute single nodes.

    >>> import torch
    >>> node = fx.symbolic_trace(lambda x: x + 1).graph.output_node()
    >>> def show(call):
    ...     print(call.number, call.name)
    ...     return call.make()
    >>> x = torch.ones(2)
    >>> with torch.no_grad(), watched(node, show):
    ...     _ = (x + 1).relu()
    0 add
    1 relu
    """
    mode = _Numbered(on_call)
    mode.enter(node)
    with mode, InParts():
        yield


class _Run(fx.Interpreter):
    """Runs a graph for `run`."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph | None, on_node: OnNode | None) -> None:
        super().__init__(module, graph=graph)
        self.extra_traceback = False
        self.on_node = on_node
        self.only: Callable[[fx.Node], bool] | None = None
        self.calls: _Numbered | None = None

    def run_node(self, n: fx.Node) -> Any:
        if self.only is not None and n.op != "placeholder" and not self.only(n):
            return None
        if self.calls is not None:
            self.calls.enter(n)
        value = super().run_node(n)
        return value if self.on_node is None else self.on_node(n, value)


def run(
    module: fx.GraphModule,
    inputs: Call | Sequence[Any],
    *,
    on_node: OnNode | None = None,
    on_call: OnCall | None = None,
    only: Callable[[fx.Node], bool] | None = None,
    graph: fx.Graph | None = None,
) -> Any:
    """The output of a graph, node by node. Values are freed after their last use.

    >>> import torch
    >>> net = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()))
    >>> def show(node, value):
    ...     print(node.name, tuple(value.shape))
    ...     return value
    >>> with torch.no_grad():
    ...     _ = run(net, Call((torch.ones(5, 2),), {}), on_node=show, only=lambda node: node.op != "output")
    input_1 (5, 2)
    _0 (5, 3)
    _1 (5, 3)

    Args:
        module: whose graph it is.
        inputs: a call, or its arguments in the order of the placeholders, see `flat_inputs`.
        on_node: is told what every node returned, and gives the value to go on with.
        on_call: makes the ATen calls inside nodes. Without it fused attention stays fused.
        only: which nodes are run; the others give None. Placeholders always are.
        graph: in place of the module's own.
    """
    interpreter = _Run(module, graph, on_node)
    interpreter.only = only
    arguments = flat_inputs(module, inputs) if isinstance(inputs, Call) else inputs
    with ExitStack() as stack:
        if on_call is not None:
            interpreter.calls = stack.enter_context(_Numbered(on_call))
            stack.enter_context(InParts())
        return interpreter.run(*arguments)

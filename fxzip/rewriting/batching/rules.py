"""Along which axis K heads may lie one after another in a call, so that one call computes what K would.

Two ways to lay out K values of the shape [batch, features, ...]:

- along the features, [batch, K · features, ...]: a convolution of K groups, a normalisation of K times the features,
  and whatever treats features one by one.
- along the batch, [K · batch, ...]: whatever treats inputs of a batch one by one. Linear calls become one batched
  product. Where axes change their order the batch may lie along another one than the first, and heads go with it.

Calls without parameters are made as they are, on more features or more inputs; of calls with parameters those of all
heads are stacked. What is not in a table is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...ops import linear_heads, mix, norm_heads, unmerge
from ...partition.alignment import attribute
from ..factorised import why_shared
from .reading import dim_of, is_batch_size, read, sizes_of, whole
from .stacking import convolution, normalisation, stacked
from .twins import Twins, Values, operands

Axes = tuple[int, ...]
"""`BATCH`, `FEATURES`, both, or `NOWHERE`."""
NOWHERE: Axes = ()
BATCH, FEATURES = 0, 1


@dataclass(frozen=True, eq=False)
class Site:
    """A call that all heads make.

    Attributes:
        net: whose graph it is in.
        twins: the call of every head.
        values: of the graph, on the sample.
    """

    net: fx.GraphModule
    twins: Twins
    values: Values

    @property
    def node(self) -> fx.Node:
        """The call of the first head, whose settings are those of all."""
        return self.twins[0]

    @property
    def modules(self) -> list[Any]:
        """What the heads call, where they call modules."""
        return [attribute(self.net, str(node.target)) for node in self.twins]

    @property
    def ndim(self) -> int:
        """Of the first operand."""
        return len(self.values.shapes[read(self.node)[0]])

    def argument(self, place: int, name: str, default: Any) -> Any:
        """One of the arguments of the call."""
        given = self.node.args
        return given[place] if place < len(given) else self.node.kwargs.get(name, default)


@dataclass(frozen=True, eq=False)
class Rule:
    """How heads lie in a call.

    Attributes:
        axes: where heads may lie in its operands, and do in its result, the first one if they lie nowhere yet.
        stack: one module that holds the parameters of all; None: the call has none.
        function: what is called with these parameters, and with the arguments that `extra` names of the module; None:
            the module itself is called.
        extra: names of further arguments, attributes of a head's module.
        shares: whether it can read one value for all heads.
        reads: which operands hold heads; the others are taken care of.
        moves: whether the batch may lie along another axis than the first, in what it reads or gives.
    """

    axes: Callable[[Site], Axes]
    stack: Callable[[Sequence[Any], bool], nn.Module] | None = None
    function: Callable[..., Tensor] | None = None
    extra: tuple[str, ...] = ()
    shares: bool = False
    reads: Callable[[Site, fx.Node], bool] = lambda site, node: True
    moves: bool = False


def rule_of(net: fx.GraphModule, node: fx.Node) -> Rule | None:
    """The rule of a call; None if there is none."""
    if node.op == "call_module":
        return MODULES.get(type(attribute(net, str(node.target))))
    return FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None


def axes_of(rule: Rule, site: Site) -> Axes:
    """Where heads may lie in a call; nowhere if it cannot be said of it that one call does what K do."""
    operands = [node for node in read(site.node) if rule.reads(site, node)]
    batch = [site.values.batch.get(node) for node in (*operands, site.node)]
    if not operands or None in batch or (any(batch) and not rule.moves):
        return NOWHERE
    if site.node.op == "call_module" and any(why_alone(site.net, node) for node in site.twins):
        return NOWHERE
    return rule.axes(site)


def why_alone(net: fx.GraphModule, node: fx.Node) -> str:
    """Why the parameters of a module may not be stacked with those of others; "" if they may."""
    module: nn.Module = attribute(net, str(node.target))
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    if vars(module).keys() & {"parametrizations", "forward"} or any(hooks):
        return "a hook is called with what it computes, or its class is not PyTorch's own"
    return why_shared(net, module, str(node.target)) if [*module.parameters(), *module.buffers()] else ""


def _first(site: Site, node: fx.Node) -> bool:
    """Whether a node is the first operand of a call."""
    return node is operands(site.node)[0]


def _one_by_one(site: Site) -> Axes:
    """Values are treated one by one: heads may lie anywhere, if they do so in all operands."""
    shapes = [site.values.shapes[node] for node in operands(site.node)]
    made = site.values.shapes[site.node]
    if any(len(shape) != len(made) for shape in shapes):
        return NOWHERE
    return (FEATURES, BATCH) if len(made) > 1 and len({shape[1] for shape in shapes}) == 1 else (BATCH,)


def _function(site: Site) -> Axes:
    """The same, for functions, which may write into what they read."""
    return NOWHERE if site.node.kwargs.get("inplace") or "out" in site.node.kwargs else _one_by_one(site)


def _positions(ndim: int) -> Callable[[Site], Axes]:
    """A call that treats every feature by itself, in [batch, features, positions ...] of so many axes."""
    return lambda site: (FEATURES, BATCH) if site.ndim == ndim else NOWHERE


def _features(site: Site) -> Axes:
    """A convolution or normalisation of features."""
    module = site.modules[0]
    least = 2 + len(getattr(module, "kernel_size", ()))  # else there is no axis of the batch
    counted = getattr(module, "momentum", 0.1) is None  # statistics weigh by the number of batches seen, one for all
    return (FEATURES,) if site.ndim >= least and not counted else NOWHERE


def _inputs(site: Site) -> Axes:
    """A call over the last axes, which treats every input of a batch by itself."""
    module = site.modules[0]
    inner = len(getattr(module, "normalized_shape", (1,)))
    scaled = not isinstance(module, nn.LayerNorm) or module.weight is not None
    return (BATCH,) if site.ndim > inner and scaled else NOWHERE


def _softmax(site: Site) -> Axes:
    dim = site.modules[0].dim if site.node.op == "call_module" else site.argument(1, "dim", None)
    return (BATCH,) if isinstance(dim, int) and dim % site.ndim > 0 else NOWHERE


def _flatten(site: Site) -> Axes:
    """Features and what is behind them become one axis: heads still lie one after another."""
    module = site.modules[0] if site.node.op == "call_module" else None
    begin = site.argument(1, "start_dim", 0) if module is None else module.start_dim
    end = site.argument(2, "end_dim", -1) if module is None else module.end_dim
    if not (isinstance(begin, int) and isinstance(end, int)) or begin % site.ndim == 0 or end % site.ndim == 0:
        return NOWHERE
    return FEATURES, BATCH


def viewed(site: Site) -> Axes:
    """Every input of a batch gets another shape. `x.view(x.size(0), -1)` keeps the order of the features as well."""
    sizes = sizes_of(site.node)
    first = sizes[0] if sizes else None
    if first != -1 and not (isinstance(first, fx.Node) and is_batch_size(first, site.values)):
        return NOWHERE
    return (FEATURES, BATCH) if sizes[1:] == (-1,) and site.ndim > 1 else (BATCH,)


def _mean(site: Site) -> Axes:
    given = site.argument(1, "dim", None)
    dims = given if isinstance(given, (tuple, list)) else (given,)
    if not dims or not all(isinstance(dim, int) for dim in dims):
        return NOWHERE
    least = min(dim % site.ndim for dim in dims)
    return (FEATURES, BATCH) if least > 1 else (BATCH,) if least > 0 else NOWHERE


def _by_batch(site: Site) -> Axes:
    """Axes change their order, or one of them is left out, but that of the batch."""
    return (BATCH,)


def _part(site: Site) -> Axes:
    """`x[:, 0]`, `x.chunk(3, -1)[0]`: whatever is taken of every input of a batch."""
    parts, batch = whole(site.node), site.values.batch[read(site.node)[0]]
    if parts is not None:
        dim = dim_of(parts)
        apart = isinstance(dim, int) and dim % site.ndim != batch and len(operands(parts)) == 1
        return (BATCH,) if apart and isinstance(site.node.args[1], int) else NOWHERE
    index = site.node.args[1]
    taken = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(own, (int, slice, type(None), type(...))) for own in taken)
    fixed = plain and len(operands(site.node)) == 1 and (batch, site.values.batch[site.node]) == (0, 0)
    return (BATCH,) if fixed and taken[0] in (slice(None), ...) else NOWHERE


def _product(site: Site) -> Axes:
    """A product of matrices for each input of a batch; attention too."""
    shapes = {len(site.values.shapes[node]) for node in operands(site.node)}
    return (BATCH,) if len(operands(site.node)) > 1 and len(shapes) == 1 and min(shapes) > 2 else NOWHERE


def _given_back(site: Site) -> Axes:
    """Features out of merged ones: of one value for all heads, by tables one below another."""
    first = {operands(node)[0] for node in site.twins}
    return (FEATURES,) if len(first) == 1 and tuple(site.argument(2, "axes", ())) == (1,) else NOWHERE


_POINTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Identity, nn.Dropout,
)  # fmt: skip
BY_POSITION: Mapping[int, tuple[type[nn.Module], ...]] = {
    3: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.Dropout1d),
    4: (
        nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d, nn.ZeroPad2d,
        nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Upsample,
    ),
    5: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d, nn.Dropout3d),
}  # fmt: skip

MODULES: Mapping[type[nn.Module], Rule] = {
    **dict.fromkeys(_POINTWISE, Rule(_one_by_one)),
    **{kind: Rule(_positions(ndim)) for ndim, kinds in BY_POSITION.items() for kind in kinds},
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), Rule(_features, convolution, shares=True)),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm), Rule(_features, normalisation)),
    nn.Linear: Rule(_inputs, stacked, linear_heads, shares=True),
    nn.LayerNorm: Rule(_inputs, stacked, norm_heads, ("eps",)),
    nn.Flatten: Rule(_flatten),
    nn.Softmax: Rule(_softmax),
}
"""By class, no class derived from it."""

FUNCTIONS: Mapping[Any, Rule] = {
    **dict.fromkeys(
        (
            torch.relu, F.relu, F.relu6, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.elu, F.leaky_relu,
            F.softplus, torch.tanh, torch.sigmoid, torch.exp, torch.abs, torch.neg, torch.square, torch.sqrt, "relu",
            "tanh", "sigmoid", "exp", "abs", "neg", "square", "sqrt", operator.neg, operator.add, operator.sub,
            operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div, "add", "sub", "mul", "div",
            torch.maximum, torch.minimum, "contiguous",
        ),
        Rule(_function),
    ),
    **dict.fromkeys(
        (F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.max_pool2d, F.interpolate), Rule(_positions(4))
    ),
    **dict.fromkeys((torch.flatten, "flatten"), Rule(_flatten)),
    **dict.fromkeys(("view", "reshape", torch.reshape), Rule(viewed, reads=_first)),
    **dict.fromkeys((torch.mean, "mean"), Rule(_mean)),
    **dict.fromkeys((torch.transpose, torch.permute, "transpose", "permute"), Rule(_by_batch, moves=True)),
    **dict.fromkeys((torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm"), Rule(_product)),
    F.scaled_dot_product_attention: Rule(_product),
    operator.getitem: Rule(_part, moves=True),
    **dict.fromkeys((torch.softmax, F.softmax, "softmax"), Rule(_softmax)),
    **dict.fromkeys((unmerge, mix), Rule(_given_back, shares=True, reads=_first)),
}  # fmt: skip
"""By function, or by name of a method."""

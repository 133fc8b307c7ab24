"""Along which axis K heads may lie one after another in a call, so that one call computes what K would.

Two ways to lay out K values of the shape [batch, features, ...]:

- along axis 1, [batch, K · features, ...]: a convolution of K groups, a normalisation of K times the features, and
  whatever treats features one by one. A view of neither is needed between them.
- along axis 0, [K · batch, ...]: whatever treats inputs of a batch one by one. Linear calls become one batched product.

Calls without parameters are made as they are, on more features or more inputs; of calls with parameters those of all
heads are stacked. What is not in a table is left as it is.
"""

from __future__ import annotations

import copy
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
from .alike import Twins, Values, operands

Axes = tuple[int, ...]
NOWHERE: Axes = ()
_BATCH, _FEATURES = 0, 1


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
        return len(self.values.shapes[operands(self.node)[0]])

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
        function: what is called in place of it, with the parameters if there are any, and `extra`; None: the same.
        extra: further arguments; where there are parameters names of attributes of the module.
        shares: whether it can read one value for all heads.
        reads: which operands hold heads; the others are taken care of.
    """

    axes: Callable[[Site], Axes]
    stack: Callable[[Sequence[Any], bool], nn.Module] | None = None
    function: Callable[..., Tensor] | None = None
    extra: tuple[Any, ...] = ()
    shares: bool = False
    reads: Callable[[Site, fx.Node], bool] = lambda site, node: True


def rule_of(net: fx.GraphModule, node: fx.Node) -> Rule | None:
    """The rule of a call; None if there is none."""
    if node.op == "call_module":
        return MODULES.get(type(attribute(net, str(node.target))))
    return FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None


def axes_of(rule: Rule, site: Site) -> Axes:
    """Where heads may lie in a call; nowhere if it cannot be said of it that one call does what K do."""
    read = [node for node in operands(site.node) if rule.reads(site, node)]
    if not read or any(node not in site.values.by_input for node in (*read, site.node)):
        return NOWHERE
    if site.node.op == "call_module" and any(why_alone(site.net, node) for node in site.twins):
        return NOWHERE
    return rule.axes(site)


def why_alone(net: fx.GraphModule, node: fx.Node) -> str:
    """Why the parameters of a module may not be stacked with those of others; "" if they may."""
    module: nn.Module = attribute(net, str(node.target))
    if vars(module).keys() & {"parametrizations", "forward"} or module._forward_pre_hooks or module._forward_hooks:
        return "its result is changed by a hook, or its class is not PyTorch's own"
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
    return (_FEATURES, _BATCH) if len(made) > 1 and len({shape[1] for shape in shapes}) == 1 else (_BATCH,)


def _function(site: Site) -> Axes:
    """The same, for functions, which may write into what they read."""
    return NOWHERE if site.node.kwargs.get("inplace") or "out" in site.node.kwargs else _one_by_one(site)


def _positions(ndim: int) -> Callable[[Site], Axes]:
    """A call that treats every feature by itself, in [batch, features, positions ...] of so many axes."""
    return lambda site: (_FEATURES, _BATCH) if site.ndim == ndim else NOWHERE


def _features(site: Site) -> Axes:
    """A convolution or normalisation of features."""
    module = site.modules[0]
    least = 2 + len(getattr(module, "kernel_size", ()))  # else there is no axis of the batch
    counted = getattr(module, "momentum", 0.1) is None  # statistics weigh by the number of batches seen, one for all
    return (_FEATURES,) if site.ndim >= least and not counted else NOWHERE


def _inputs(site: Site) -> Axes:
    """A call over the last axes, which treats every input of a batch by itself."""
    module = site.modules[0]
    inner = len(getattr(module, "normalized_shape", (1,)))
    scaled = not isinstance(module, nn.LayerNorm) or module.weight is not None
    return (_BATCH,) if site.ndim > inner and scaled else NOWHERE


def _softmax(site: Site) -> Axes:
    dim = site.modules[0].dim if site.node.op == "call_module" else site.argument(1, "dim", None)
    return (_BATCH,) if isinstance(dim, int) and dim % site.ndim > 0 else NOWHERE


def _flatten(site: Site) -> Axes:
    """Features and what is behind them become one axis: heads still lie one after another."""
    module = site.modules[0] if site.node.op == "call_module" else None
    begin = site.argument(1, "start_dim", 0) if module is None else module.start_dim
    end = site.argument(2, "end_dim", -1) if module is None else module.end_dim
    if not (isinstance(begin, int) and isinstance(end, int)) or begin % site.ndim == 0 or end % site.ndim == 0:
        return NOWHERE
    return _FEATURES, _BATCH


def _viewed(site: Site) -> Axes:
    """`x.view(x.size(0), -1)`, which is the same."""
    given = site.node.args[1] if len(site.node.args) == 2 else site.node.args[1:]
    sizes = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    flat = len(sizes) == 2 and sizes[1] == -1 and isinstance(sizes[0], fx.Node) and _is_batch_size(sizes[0], site)
    return (_FEATURES, _BATCH) if flat and site.ndim > 1 else NOWHERE


def _is_batch_size(node: fx.Node, site: Site) -> bool:
    """Whether a number is `x.size(0)` or `x.shape[0]`."""
    source: Any
    source, place = node.args if len(node.args) == 2 else (None, None)
    if node.target is operator.getitem and isinstance(source, fx.Node):
        shape = source.target == "size" and len(source.args) == 1
        named = source.target is getattr and source.args[1:] == ("shape",)
        source = source.args[0] if shape or named else None
    elif node.target != "size":
        return False
    return bool(place == 0) and source in site.values.by_input


def _mean(site: Site) -> Axes:
    given = site.argument(1, "dim", None)
    dims = given if isinstance(given, (tuple, list)) else (given,)
    if not dims or not all(isinstance(dim, int) for dim in dims):
        return NOWHERE
    least = min(dim % site.ndim for dim in dims)
    return (_FEATURES, _BATCH) if least > 1 else (_BATCH,) if least > 0 else NOWHERE


def _transpose(site: Site) -> Axes:
    dims = (site.argument(1, "dim0", 0), site.argument(2, "dim1", 0))
    moved = [dim % site.ndim for dim in dims if isinstance(dim, int)]
    return (_BATCH,) if len(moved) == 2 and min(moved) > 0 else NOWHERE


def _given_back(site: Site) -> Axes:
    """Features out of merged ones: of one value for all heads, by tables one below another."""
    first = {operands(node)[0] for node in site.twins}
    return (_FEATURES,) if len(first) == 1 and tuple(site.argument(2, "axes", ())) == (1,) else NOWHERE


def _convolution(modules: Sequence[Any], shared: bool) -> Any:
    """K times the groups; where all heads read one value, K times the outputs."""
    made = _with_joined_tensors(modules)
    made.out_channels *= len(modules)
    if not shared:
        made.in_channels *= len(modules)
        made.groups *= len(modules)
    return made


def _normalisation(modules: Sequence[Any], shared: bool) -> Any:
    made = _with_joined_tensors(modules)
    for name in ("num_features", "num_channels", "num_groups"):
        if hasattr(made, name):
            setattr(made, name, getattr(made, name) * len(modules))
    return made


def _with_joined_tensors(modules: Sequence[Any]) -> Any:
    """A copy of the first module whose tensors are those of all, one after another along their first axis."""
    return with_tensors(modules[0], lambda *own: torch.cat(own) if own[0].ndim else own[0].clone(), modules)


def with_tensors(module: nn.Module, function: Callable[..., Tensor], modules: Sequence[nn.Module]) -> Any:
    """A copy of a module that holds a function of what several modules hold under each name."""
    made = copy.copy(module)
    vars(made).update({key: copy.copy(vars(module)[key]) for key in ("_parameters", "_buffers")})
    for name, own in module._parameters.items():
        if own is not None:
            value = function(*(getattr(other, name).detach() for other in modules))
            made._parameters[name] = nn.Parameter(value, requires_grad=own.requires_grad)
    for name, held in module._buffers.items():
        if held is not None:
            made._buffers[name] = function(*(getattr(other, name) for other in modules))
    return made


def _stacked(modules: Sequence[Any], shared: bool) -> Any:
    """A module that only holds the parameters of all, [heads, ...]."""
    made = nn.Module()
    for name in ("weight", "bias"):
        own = [getattr(module, name) for module in modules]
        value = None if own[0] is None else nn.Parameter(torch.stack([p.detach() for p in own]), own[0].requires_grad)
        made.register_parameter(name, value)
    return made.train(modules[0].training)


_POINTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Identity, nn.Dropout,
)  # fmt: skip
_BY_POSITION: Mapping[int, tuple[type[nn.Module], ...]] = {
    3: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.Dropout1d),
    4: (
        nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d, nn.ZeroPad2d,
        nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Upsample,
    ),
    5: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d, nn.Dropout3d),
}  # fmt: skip

MODULES: Mapping[type[nn.Module], Rule] = {
    **dict.fromkeys(_POINTWISE, Rule(_one_by_one)),
    **{kind: Rule(_positions(ndim)) for ndim, kinds in _BY_POSITION.items() for kind in kinds},
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), Rule(_features, _convolution, shares=True)),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm), Rule(_features, _normalisation)),
    nn.Linear: Rule(_inputs, _stacked, linear_heads, shares=True),
    nn.LayerNorm: Rule(_inputs, _stacked, norm_heads, ("eps",)),
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
    **dict.fromkeys(("view", "reshape", torch.reshape), Rule(_viewed, None, torch.flatten, (1,), reads=_first)),
    **dict.fromkeys((torch.mean, "mean"), Rule(_mean)),
    **dict.fromkeys((torch.transpose, "transpose"), Rule(_transpose)),
    **dict.fromkeys((torch.softmax, F.softmax, "softmax"), Rule(_softmax)),
    **dict.fromkeys((unmerge, mix), Rule(_given_back, shares=True, reads=_first)),
}  # fmt: skip
"""By function, or by name of a method."""

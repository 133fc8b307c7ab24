"""What a model draws at random only while it trains: dropout, stochastic depth.

Programs are traced in eval mode, where such calls do nothing. Those that are modules stay what they are. Here a
`torch.nn.functional.dropout` that follows the mode of its module becomes an `nn.Dropout`, a module of a known package
that only acts in `train()` stays a module, and all others are named: the network has them no more. Whether anything
else that a model does in train mode is lost, a run of both tells, from the same random state.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from .allowed import is_known
from .calls import Call, map_tensors
from .dispatch_mode import DispatchMode
from .execution import difference, flat_inputs, modes_kept, quiet_execution
from .randomness import draws

_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_ABOUT_GRADIENTS = (
    "where gradients are enabled it takes another way at {}; the zipped network computes what it does without them"
)
_Owned = tuple[str, Any]  # path of a module, function


@dataclass(frozen=True)
class Strays:
    """What a model does in train mode that its graph does not do there.

    Attributes:
        lost: modules with random calls that the graph does not make.
        otherwise: it makes them all, and gives something else.
        gradients: the line at which it takes another way where gradients are enabled, in either mode; "" if none.
    """

    lost: tuple[str, ...] = ()
    otherwise: bool = False
    gradients: str = ""

    @property
    def notes(self) -> list[str]:
        """What the report says of it."""
        found = [_ABOUT_GRADIENTS.format(self.gradients)] if self.gradients else []
        if self.otherwise:
            return [
                *found,
                "in `train()` it computes something else than the zipped network does there: what its code does by "
                "`training`, tracing has seen in eval mode only",
            ]
        if not self.lost:
            return found
        return [
            *found,
            f"in `train()` it makes random calls in {names_of(self.lost)} that the zipped network does not make: "
            "tracing has seen them in eval mode only",
        ]


class Training:
    """A model run in train mode, on a few inputs: which module makes which random calls.

    Where it does not run in train mode, what it did until then counts.

    Attributes:
        dropouts: for each module and function of dropout its calls, in order: the probability, and whether it acts.
        random: for each module the number of random calls, those of modules inside it not counted.
        output: of the run; None where there is none.
    """

    def __init__(self, model: nn.Module, inputs: Call) -> None:
        self.dropouts: dict[_Owned, list[tuple[float, bool]]] = defaultdict(list)
        self.random: Counter[str] = Counter()
        self.output: Any = None
        path: list[str] = [""]
        own = map_tensors(torch.clone, inputs)
        with ExitStack() as stack:
            for context in (_training(model), _following(model, path), quiet_execution(), suppress(Exception)):
                stack.enter_context(context)
            for mode in (_Draws(path, self.random), _Dropouts(path, self.dropouts)):
                stack.enter_context(mode)
            self.output = model(*own.args, **own.kwargs)

    def keep_dropout(self, module: fx.GraphModule) -> bool:
        """Let calls of dropout in a graph follow its mode, in place, as they follow that of the model; whether any
        do."""
        found: dict[_Owned, list[fx.Node]] = defaultdict(list)
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target in _DROPOUTS and isinstance(node.args[0], fx.Node):
                found[owner_of(node), node.target].append(node)

        changed = False
        for key, nodes in found.items():
            calls = self.dropouts.get(key, [])
            if len(calls) != len(nodes):  # the model takes another way when it trains
                continue
            for node, (p, acts) in zip(nodes, calls, strict=True):
                if acts and _setting(node, 2, "training", True) is False:
                    _as_module(module, node, _DROPOUTS[node.target](p))
                    changed = True
        if changed:
            module.recompile()
        return changed

    def compared(self, module: fx.GraphModule, inputs: Call, expected: Any) -> Strays:
        """What of this a graph does not do in train mode. `expected`: what the model gives in eval mode."""
        if not self.random and (self.output is None or difference(self.output, expected) is None):
            return Strays()
        kept: Counter[str] = Counter()
        found = None
        with _training(module), quiet_execution(), suppress(Exception):
            found = _Counting(module, kept).run(*flat_inputs(module, inputs))
        lost = tuple(name or "the model itself" for name, times in self.random.items() if kept[name] < times)
        both = found is not None and self.output is not None
        return Strays(lost, both and not lost and difference(found, self.output) is not None)


def is_kept(module: nn.Module) -> bool:
    """Whether a module without parameters and parts does something else in train mode, and can stay a module: its class
    must be there where the network is loaded.

    >>> from torchvision.ops import StochasticDepth
    >>> is_kept(StochasticDepth(0.5, "row").eval()), is_kept(nn.Identity())
    (True, False)
    """
    held = (*module.parameters(), *module.buffers(), *module.children())
    return not held and is_known(type(module)) and _written(module, False) != _written(module, True)


def _written(module: nn.Module, training: bool) -> str:
    """What a module does in a mode, as far as a plain trace tells."""
    mode = module.training
    module.training = training
    try:
        return str(fx.Tracer().trace(module))
    except Exception as error:  # it asks for more than a name
        return type(error).__name__
    finally:
        module.training = mode


def owner_of(node: fx.Node) -> str:
    """The path of the module whose `forward` makes a call."""
    if "fxzip_owner" in node.meta:
        return str(node.meta["fxzip_owner"])
    if node.op == "call_module":
        return str(node.target)
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return str(paths[-1]) if paths else ""


def names_of(paths: Sequence[str]) -> str:
    """The first few of some modules, for a message.

    >>> names_of(["a", "b"])
    '`a`, `b`'
    """
    return ", ".join(f"`{path}`" for path in paths[:4]) + (", ..." if len(paths) > 4 else "")


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in train mode, but for normalisations: those would need more than the sample. Afterwards
    its state and modes are as they were."""
    kept = {tensor: tensor.detach().clone() for tensor in model.buffers()}
    try:
        with modes_kept(model):
            for module in model.modules():
                module.training = not isinstance(module, _NormBase)
            yield
    finally:
        for tensor, value in kept.items():
            with torch.no_grad():
                tensor.copy_(value)


@contextmanager
def _following(model: nn.Module, path: list[str], prefix: str = "") -> Iterator[None]:
    """Inside, the last entry of `path` is the module that runs; `prefix` is the path of the model itself."""
    handles = []

    def left(*_: Any) -> None:
        path.pop()

    for name, module in model.named_modules(prefix=prefix):
        handles.append(module.register_forward_pre_hook(lambda _, __, name=name: path.append(name)))
        handles.append(module.register_forward_hook(left))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Draws(DispatchMode):
    """Counts random calls by the module that makes them."""

    def __init__(self, path: list[str], counts: Counter[str]) -> None:
        super().__init__()
        self._path, self._counts = path, counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if draws(func, args, kwargs or {}):
            self._counts[self._path[-1]] += 1
        return func(*args, **(kwargs or {}))


class _Dropouts(TorchFunctionMode):
    """Files calls of dropout by the module that makes them."""

    def __init__(self, path: list[str], calls: dict[_Owned, list[tuple[float, bool]]]) -> None:
        super().__init__()
        self._path, self._calls = path, calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            acts = args[2] if len(args) > 2 else kwargs.get("training", True)
            self._calls[self._path[-1], func].append((float(p), bool(acts)))
        return func(*args, **kwargs)


class _Counting(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, counts: Counter[str]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._counts = counts

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and "fxzip_owner" not in n.meta:  # a leaf may make its calls in parts of its own
            leaf, path = self.fetch_attr(str(n.target)), [str(n.target)]
            with _following(leaf, path, str(n.target)), _Draws(path, self._counts):
                return super().run_node(n)
        with _Draws([owner_of(n)], self._counts):
            return super().run_node(n)


def _setting(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _as_module(module: fx.GraphModule, node: fx.Node, dropout: nn.Module) -> None:
    """Call a module in place of a function. The node keeps its name."""
    owner, name, number = owner_of(node), str(getattr(node.target, "__name__", "dropout")), 0
    while _holds(module, path := f"{owner}.{name}".lstrip(".")):
        number += 1
        name = f"{name.rstrip('_0123456789')}_{number}"
    if bool(_setting(node, 3, "inplace", False)):
        dropout.inplace = True  # type: ignore[assignment]
    module.add_submodule(path, dropout.eval())
    source: Any = node.args[0]
    with module.graph.inserting_before(node):
        called = module.graph.call_module(path, (source,))
    called.meta = {**node.meta, "fxzip_owner": owner}
    node.replace_all_uses_with(called)
    module.graph.erase_node(node)


def _holds(module: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        return hasattr(module.get_submodule(owner), name)
    except AttributeError:
        return False

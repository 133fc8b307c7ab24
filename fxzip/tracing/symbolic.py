"""The first rung: a symbolic trace whose leaves are the modules of torch.nn."""

from __future__ import annotations

import inspect
import traceback
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from .calls import Call
from .containers import Part, flatten, is_plain, is_written
from .guards import asked_by_model, form_of_argument, guard_kind, guard_type, is_trivial, require
from .names import check_arguments
from .python_numbers import plain_number
from .structure import Rebuild
from .training import is_kept
from .ways import entered

_TRACERS = (str(Path(fx.__file__).parent), str(Path(__file__).parent))
_COMPOSITE = ("torch.nn.modules.container", "torch.nn.modules.transformer")


def bind(model: nn.Module, call: Call) -> tuple[inspect.BoundArguments, dict[str, Any]]:
    """The call bound to the signature of the model, and its arguments by name, in the order of the signature.

    >>> list(bind(nn.Linear(1, 1), Call(("x",), {}))[1])
    ['input']
    """
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}_{index}": item for index, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    check_arguments(list(named))
    return bound, named


def _is_of_torch_nn(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))


def left_out(bound: inspect.BoundArguments) -> set[str]:
    """Names of the arguments that a call may leave out: those with a default, and what goes through `*` and `**`.

    >>> left_out(bind(nn.MultiheadAttention(2, 1), Call((1, 2, 3), {"key_padding_mask": 4}))[0])
    {'key_padding_mask'}
    """
    found = set[str]()
    for name in bound.arguments:
        parameter = bound.signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(bound.arguments[name])
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            found.update(f"{name}_{index}" for index in range(len(bound.arguments[name])))
        elif parameter.default is not inspect.Parameter.empty:
            found.add(name)
    return found


class SymbolicTracer(fx.Tracer):
    """Modules of torch.nn are leaves, except those that only hold others; so are those that train another way than
    they run (stochastic depth). A placeholder for each argument given. `asked`: the model may ask what its arguments
    are in ways that leave no guard behind."""

    def __init__(self, root: nn.Module, call: Call, *, asked: bool = False) -> None:
        super().__init__(param_shapes_constant=True)
        self._asked = asked
        self._call = call
        # found beforehand, since it takes traces of its own: inside this one they would record into its graph
        self._kept = {module for module in root.modules() if not _is_of_torch_nn(module) and is_kept(module)}
        self._given: dict[fx.Node, Tensor] = {}  # the tensors among the arguments

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.stack_trace = node.stack_trace or _lines_of_forward()
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if "forward" in vars(m):  # given to the instance: who knows what it does
            return False
        return not type(m).__module__.startswith(_COMPOSITE) if _is_of_torch_nn(m) else m in self._kept

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        bound, named = bind(self.root, self._call)
        optional = left_out(bound)
        proxies = {name: self._placeholder(name, value) for name, value in named.items()}
        for name, value in named.items():
            form = form_of_argument(value, self.reads, optional=name in optional, asked=self._asked)
            if not is_trivial(form):
                self.create_proxy("call_function", require, (proxies[name], form, name), {})
        given = {name: self._unpacked(proxies[name], value) for name, value in named.items()}
        for name in bound.arguments:
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                bound.arguments[name] = tuple(given[f"{name}_{i}"] for i in range(len(bound.arguments[name])))
            elif kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: given[key] for key in bound.arguments[name]}
            else:
                bound.arguments[name] = given[name]
        own = vars(self.root).get("forward")  # given to the instance, not by its class
        if own is not None:
            return lambda: entered(own, *bound.args, **bound.kwargs), []
        return lambda: entered(root_fn, self.root, *bound.args, **bound.kwargs), []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _UnknownProxy(node, self)

    def _placeholder(self, name: str, value: Any) -> fx.Proxy:
        return self.create_proxy("placeholder", name, (), {})

    def reads(self, value: Any) -> bool:
        """Whether the graph reads a value that it is given; else it is a constant, and a guard compares it."""
        return isinstance(value, Tensor)

    def _unpacked(self, proxy: Any, value: Any) -> Any:
        """Proxies in the structure of the argument; what the graph does not read is a constant."""
        if self.reads(value):
            if isinstance(value, Tensor):
                self._given[proxy.node] = value
            return proxy
        if not flatten(value, self.reads)[0]:
            return value
        if is_plain(value):
            if isinstance(value, dict):
                return {key: self._unpacked(proxy[key], item) for key, item in value.items()}
            items = [self._unpacked(proxy[index], item) for index, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        found, structure = flatten(value)
        parts = [
            self._unpacked(self.create_proxy("call_function", Part(place, len(found)), (proxy,), {}), leaf)
            for place, leaf in enumerate(found)
        ]
        return structure.build(parts)

    def stands_for(self, proxy: fx.Proxy, kinds: Any) -> bool:
        """Whether the model would find that a value is of such a kind."""
        value = self._known(proxy)
        guard_kind(self.graph, proxy.node, value, kinds)
        return isinstance(value, kinds)

    def type_of(self, proxy: fx.Proxy) -> type:
        """The type that the model would find a value to be of."""
        value = self._known(proxy)
        guard_type(self.graph, proxy.node, type(value))
        return type(value)

    def value_of(self, proxy: fx.Proxy) -> Any:
        """What the model asks about where it asks whether it can be called, or has an attribute."""
        value = self._known(proxy)
        guard_kind(self.graph, proxy.node, value, Tensor)
        return value

    def _known(self, proxy: fx.Proxy) -> Tensor:
        if proxy.node not in self._given:
            raise TypeError(f"what `{proxy.node.name}` is is not known without a value")
        return self._given[proxy.node]

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        a = plain_number(a)  # torch.fx writes `np.float64(8.0)` into its code, and knows no `np` there
        if not is_written(a) and not isinstance(a, (Tensor, slice, range)):
            found, structure = flatten(a, lambda value: issubclass(type(value), fx.Proxy))
            if found or isinstance(a, Enum):
                return self.create_node("call_function", Rebuild(structure), tuple(proxy.node for proxy in found), {})
        return super().create_arg(a)


def _lines_of_forward() -> str | None:
    """The calls that led here, from the first `forward` on, less those of tracers. What torch.fx records itself is the
    same, but it imports PyTorch's compiler for that, which takes seconds."""
    frames = list(traceback.walk_stack(None))[::-1]
    first = next((place for place, (frame, _) in enumerate(frames) if frame.f_code.co_name == "forward"), len(frames))
    shown = [own for own in frames[first:] if not own[0].f_code.co_filename.startswith(_TRACERS)]
    return "".join(traceback.StackSummary.extract(iter(shown)).format()).strip() or None


class _UnknownProxy(fx.Proxy):
    """A proxy that does not let the model take it for what it stands for: whether `str(x.shape[1])` is in a table, or
    `x.shape[1]` in a set, would always be answered with no."""

    def __hash__(self) -> int:
        self._refuse()
        return object.__hash__(self)

    def __str__(self) -> str:
        self._refuse()
        return super().__str__()

    def __format__(self, spec: str) -> str:
        self._refuse()
        return super().__format__(spec)

    def _refuse(self) -> None:
        if asked_by_model():
            raise TypeError(f"what `{self.node.name}` is, as a key or a text, is not known without a value")

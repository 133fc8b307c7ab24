"""The module that comes out: trunk and heads in one graph, and what its own nodes call."""

from __future__ import annotations

import copy
import inspect
import operator
import os
import warnings
from collections.abc import Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..errors import FxzipWarning, InputError
from ..ops import merge, mix, unmerge
from ..partition.alignment import attribute
from ..tracing import names_of, require
from ..tracing.provenance import provenance_of
from ..tracing.stored_graphs import FORMAT, Function, Reference, restored, written

if TYPE_CHECKING:
    from .report import Report

__all__ = [
    "EmittedModule",
    "ZippedModule",
    "is_unmerge",
    "merge",
    "mix",
    "part_of",
    "reuse_memory",
    "set_tensor",
    "sources_of",
    "unmerge",
]

_UNUSED: Sequence[str] = fx.GraphModule.__jit_unused_properties__
_restored, _Function, _Reference = restored, Function, Reference  # files of format 0 name them here


def part_of(node: fx.Node) -> str:
    """Which part of a zipped module a node belongs to: "trunk", "head 0", ...; with `start` also "stem 0", ... and
    "merge"; where heads run together also "batched"."""
    return provenance_of(node).part


def sources_of(node: fx.Node) -> tuple[str, ...]:
    """The nodes that a node of a zipped module stands for: of every model in the trunk, else of the model that the part
    belongs to."""
    return provenance_of(node).sources


def is_unmerge(node: fx.Node) -> bool:
    """Whether a node of a zipped module gives a head its own features back."""
    return provenance_of(node).unmerges


class _Called(fx.graph_module._WrappedCall):
    """What a graph module does when it is called; arguments other than the graph's are named."""

    def __call__(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(obj, *args, **kwargs)
        except (TypeError, AttributeError):
            if wrong := _misfit(type(obj).forward, args, kwargs):
                raise InputError(wrong) from None
            raise


def _misfit(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """In what arguments differ from those that a graph takes, and what to do; "" if in nothing.

    >>> _misfit(lambda self, x, mask: None, (1,), {})[:84]
    'The network takes what `sample_input` held, `(x, mask)`; `mask` is missing. What is '
    """
    names = list(inspect.signature(forward).parameters)[1:]
    given = dict(zip(names, args, strict=False)) | kwargs
    missing = [f"`{name}` is missing" for name in names if name not in given]
    missing += [f"`{name}` is None" for name in names if name in given and given[name] is None]
    further = [f"`{name}` is not among it" for name in kwargs if name not in names]
    further += [f"`{name}` is given twice" for name in names[: len(args)] if name in kwargs]
    if len(args) > len(names):
        further.append(f"there are {len(args)} by position")
    if not missing and not further:
        return ""
    return (
        f"The network takes what `sample_input` held, `({', '.join(names)})`; {', '.join(missing + further)}. What is "
        "missing must be passed, and what is not among it left out; or compile with a `sample_input` that has what you "
        "pass."
    )


class EmittedModule(fx.GraphModule):
    """A graph module that is pickled as its graph. `fx.GraphModule` pickles its code and traces it again, which looks
    into functions and computes what does not depend on the input, and so gives another graph, or none."""

    def recompile(self) -> Any:
        """Generate the code anew. Functions that are not PyTorch's are marked as one call each, for tracers."""
        for node in self.graph.nodes:
            own = node.op == "call_function" and isinstance(node.target, FunctionType)
            if own and str(node.target.__module__).partition(".")[0] != "torch":  # tracing knows those of PyTorch
                node.meta["is_wrapped"] = True
        own = type(self)  # a class of this one network
        if "_wrapped_call" not in vars(own):
            own._wrapped_call = _Called(own, vars(own).get("__call__"))  # type: ignore[attr-defined]
        return super().recompile()

    def __reduce__(self) -> Any:
        kind = next(base for base in type(self).__mro__ if "<locals>" not in base.__qualname__)  # each has its own
        return restored, (kind, _holder(self), written(self.graph), dict(self.meta), FORMAT)

    @property
    def report(self) -> Report:
        """What was shared and merged, what was not and why.

        Raises:
            AttributeError: there is none, as for one network of several (`single`).
        """
        if "fxzip_report" not in self.meta:
            raise AttributeError("this network has no report of its own; that of the zip it comes from is there")
        found: Report = self.meta["fxzip_report"]
        return found.of(self)

    def _repr_html_(self) -> str:
        from .report_page import network_brief

        return network_brief(self)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the network to a folder, which `fxzip.load` reads; see `fxzip.save`."""
        from .serialization import save

        save(self, folder)


class ZippedModule(EmittedModule):
    """A multi-task network: an ordinary `torch.fx.GraphModule` that returns a tuple with each model's output, or a dict
    of them by the names of the tasks."""

    # `torch.jit.script` compiles all other properties.
    __jit_unused_properties__ = [*_UNUSED, "code", "report", "heads", "tasks"]  # noqa: RUF012

    def train(self, mode: bool = True) -> ZippedModule:
        """Switch to train mode. Warns where the models draw random numbers there and this network does not, or compute
        something else there."""
        tracing = self.meta.get("fxzip_report", {}).get("tracing", ())
        if mode and not self.training and any(traced.get("otherwise") for traced in tracing):
            warnings.warn(
                "`train()`: the models compute something else there than this network does; what their code does by "
                "`training`, tracing has seen in eval mode only.",
                FxzipWarning,
                stacklevel=2,
            )
        lost = list(dict.fromkeys(name for traced in tracing for name in traced.get("lost", ())))
        if mode and not self.training and lost:
            warnings.warn(
                f"`train()`: the models make random calls in {names_of(lost)} that this network does not make; tracing "
                "has seen them in eval mode only.",
                FxzipWarning,
                stacklevel=2,
            )
        super().train(mode)
        return self

    @property
    def heads(self) -> tuple[Any, ...]:
        """What the graph returns for each model: nodes, in the structure of its output."""
        return _heads_of(self.graph)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in the order of the models; empty where they have none."""
        outputs: Any = self.graph.output_node().args[0]
        return tuple(outputs) if isinstance(outputs, dict) else ()

    def return_heads(self, heads: Sequence[Any]) -> None:
        """Let the graph return these nodes, one structure per model, under the names that the tasks have. In place."""
        output = self.graph.output_node()
        output.args = (dict(zip(self.tasks, heads, strict=True)) if self.tasks else tuple(heads),)

    def name_tasks(self, names: Sequence[str]) -> None:
        """Let the network return a dict with each model's output by the name of its task. In place."""
        self.graph.output_node().args = (dict(zip(names, self.heads, strict=True)),)
        self.recompile()

    def single(self, i: int | str) -> fx.GraphModule:
        """The network of task `i` alone, by its number or its name: trunk and head, the other heads removed. It shares
        parameters with this one.

        >>> import fxzip, torch
        >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
        >>> fxzip.compile_zip(a, b, torch.randn(16, 4)).single(1)(torch.randn(5, 4)).shape
        torch.Size([5, 3])

        Raises:
            IndexError: there is no head i. KeyError: there is no task of that name.
        """
        if isinstance(i, str):
            if i not in self.tasks:
                known = ", ".join(map(repr, self.tasks)) or "numbers only"
                raise KeyError(f"`single` takes the name of a task, {known}; found {i!r}.")
            i = self.tasks.index(i)
        graph = copy.deepcopy(self.graph)
        output, heads = graph.output_node(), _heads_of(graph)
        if not -len(heads) <= i < len(heads):
            raise IndexError(f"`single` takes the number of a head, 0 to {len(heads) - 1}; found {i}.")
        output.args = (heads[i],)
        own, root = f"head {i % len(heads)}", _holder(self)
        if any(part_of(node) == "batched" for node in graph.nodes):
            from .batching.one_head import alone  # which knows this module

            alone(graph, root, i % len(heads), len(heads))
        for node in reversed(list(graph.nodes)):
            kept = node.op in ("output", "placeholder") or node.users
            needed = part_of(node) in ("trunk", "batched", own) or part_of(node).startswith("stem ")
            acts = needed and (provenance_of(node).writes or node.target is require)
            if not kept and not acts:
                graph.erase_node(node)
        result = EmittedModule(root, graph)
        result.meta["fxzip_inputs"] = self.meta.get("fxzip_report", {}).get("inputs")
        return result


def _heads_of(graph: fx.Graph) -> tuple[Any, ...]:
    outputs: Any = graph.output_node().args[0]
    return tuple(outputs.values()) if isinstance(outputs, dict) else tuple(outputs)


def _holder(module: nn.Module) -> nn.Module:
    """A plain module with the same children, parameters and buffers, in the same mode."""
    holder = nn.Module()
    for name, child in module.named_children():
        holder.add_module(name, child)
    for name, param in module.named_parameters(recurse=False):
        holder.register_parameter(name, param)
    for name, buffer in module.named_buffers(recurse=False):
        holder.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    holder.training = module.training  # not `train()`: the children are those of `module`, each in its own mode
    return holder


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer a new value, in its own dtype; where it is shared it stays shared."""
    own = attribute(module, name)
    value = value.to(own.dtype)
    own.data = value.contiguous() if value.layout == torch.strided else value


def reuse_memory(module: fx.GraphModule) -> None:
    """Let ReLUs write over their input where nothing else reads it, as networks usually have it. In place.

    Tracing makes all calls out of place. A ReLU goes back where its input is the fresh result of a convolution, a
    linear call, a normalisation or a sum that has no other user. The gradient of a ReLU needs its result only.
    """
    sums = (operator.add, torch.add)
    makers = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    safe: dict[nn.Module, bool] = {}
    for node in module.graph.nodes:
        called = attribute(module, str(node.target)) if node.op == "call_module" else None
        if isinstance(called, nn.ReLU):
            source = node.all_input_nodes[0]
            fresh = (source.op == "call_function" and source.target in sums) or (
                source.op == "call_module" and isinstance(attribute(module, str(source.target)), makers)
            )
            tensors = len(source.all_input_nodes) == (2 if source.op == "call_function" else 1)
            safe[called] = safe.get(called, True) and fresh and tensors and len(source.users) == 1
    for relu, ready in safe.items():
        relu.inplace = ready  # type: ignore[assignment]

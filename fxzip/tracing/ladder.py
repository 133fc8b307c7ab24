"""The tracing ladder: the first rung that reproduces the model, on the sample and on another batch size, wins."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..errors import ContainerError, InputError, TraceError
from ..inputs import Call, as_call, batch_size, leaves, map_tensors, with_batch
from .execution import Record, difference, quiet_execution, run_eager, run_recorded
from .exporting import trace_export
from .inplace import out_of_place
from .preparation import Hooks, check_model, copied, first_line, folded, hooked, hooks_of, without_hooks
from .raising import raised
from .symbolic import SymbolicTracer
from .tidying import tidied
from .values import trace_with_values

RUNGS = ("symbolic", "symbolic with example values", "export")


@dataclass(frozen=True, eq=False)
class Program:
    """A model as a graph.

    Attributes:
        module: the graph, on an own copy of the parameters: eval mode, no hooks, parametrisations folded.
        call: the sample, detached.
        rung: "symbolic", "symbolic with example values" or "export".
        failures: why the earlier rungs failed, one sentence each.
        persistent: names of the buffers that are in the state dict.
        mutators: names of the nodes that write in place into a tensor made before them.
        batch_axes: for each node whose output is a tensor, the axes whose size changed with the batch size; empty if
            the model runs at one batch size only.
        shapes: for each node whose output is a tensor, its shape on the sample.
    """

    module: fx.GraphModule
    call: Call
    rung: str
    failures: tuple[str, ...] = ()
    persistent: frozenset[str] = frozenset()
    mutators: frozenset[str] = frozenset()
    batch_axes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reference:
    """What the eager model gives: on the sample and on fresh input, of another batch size where it can run one."""

    sample: Call
    fresh: Call
    expected: tuple[Any, Any]
    other_batch: bool


def trace(model: nn.Module, sample_input: Any, *, name: str = "model") -> Program:
    """Trace a model, which is left as it was.

    Raises TraceError when no rung reproduces the model, InputError when it cannot be run.

    >>> program = trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))
    >>> program.rung, [node.name for node in program.module.graph.nodes]
    ('symbolic', ['input_1', '_0', '_1', 'output'])
    """
    checked = check_model(model, name)
    call = map_tensors(lambda value: value.detach().clone(), as_call(sample_input))
    own = copied(checked, name)
    reference = _eager(own, call, name)
    hooks = hooks_of(folded(own))
    paths = without_hooks(own)
    persistent = frozenset(own.state_dict())
    failures: list[str] = []
    for kept, rung in product(([], hooks) if hooks else ([],), RUNGS):
        try:
            with hooked(kept):
                traced = _traced(own, rung, reference)
        except Exception as error:
            failures.append(f"{_title(rung, kept)} failed{_place(error)}: {type(error).__name__}: {first_line(error)}")
            continue
        _restore_persistence(traced, persistent)
        found = _verified(traced, reference)
        if not isinstance(found, str):
            return _program(*_with_modules(*found, reference), reference, rung, tuple(failures), persistent)
        failures.append(f"{_title(rung, kept)} gave another result than the model: {found}.")
    raise TraceError(_nothing_worked(name, failures, paths))


def _eager(own: nn.Module, call: Call, name: str) -> _Reference:
    """Run the copy, hooks and all, before anything is folded or dropped."""
    try:
        expected = run_eager(own, call)
        returned = leaves(expected)
    except ContainerError as error:
        raise TraceError(f"`{name}` must return tensors in containers that can be taken apart. {error}") from error
    except Exception as error:
        raise InputError(
            f"`{name}` must run on `sample_input`; it raised {type(error).__name__}: {first_line(error)} "
            "Pass one batch of what the models take."
        ) from error
    if not returned:
        raise TraceError(
            f"`{name}` must return at least one tensor; found none in the `{type(expected).__name__}` that it "
            "returned. Return the tensors that matter, in a tuple, list, dict or dataclass."
        )
    size = batch_size(call)
    if size is not None:
        fresh = with_batch(call, 3 if size != 3 else 2)
        try:
            return _Reference(call, fresh, (expected, run_eager(own, fresh)), True)
        except Exception:  # the model is made for one batch size
            pass
    fresh = with_batch(call, size or 0)
    return _Reference(call, fresh, (expected, run_eager(own, fresh)), False)


def _traced(own: nn.Module, rung: str, reference: _Reference) -> fx.GraphModule:
    with quiet_execution():
        if rung == "export":
            module = trace_export(own, reference.fresh, dynamic=reference.other_batch)
        else:
            sample = map_tensors(torch.clone, reference.sample)
            graph = SymbolicTracer(sample).trace(own) if rung == "symbolic" else trace_with_values(own, sample)
            module = fx.GraphModule(own, graph, "GraphModule")
    module.eval()
    return tidied(module)


def _verified(module: fx.GraphModule, reference: _Reference) -> tuple[fx.GraphModule, Record, Record] | str:
    """The program, with in-place calls replaced if that is right, and what its runs showed; or why it is not right."""
    try:
        changed = out_of_place(module, (reference.sample, reference.fresh))
    except Exception:  # the graph does not run: the comparison says why
        changed = None
    if changed is not None:
        better, flagged = changed
        better.eval()
        for leaf in flagged:
            leaf.inplace = False  # type: ignore[assignment]
        found = _compared(better, reference)
        if not isinstance(found, str):
            return better, *found
        for leaf in flagged:
            leaf.inplace = True  # type: ignore[assignment]
    found = _compared(module, reference)
    return found if isinstance(found, str) else (module, *found)


def _with_modules(
    module: fx.GraphModule, sample: Record, fresh: Record, reference: _Reference
) -> tuple[fx.GraphModule, Record, Record]:
    """The same with modules of torch.nn for functional calls on their parameters, if that is right."""
    better = raised(module, sample.shapes)
    if better is None:
        return module, sample, fresh
    found = _compared(better, reference)
    return (module, sample, fresh) if isinstance(found, str) else (better, *found)


def _compared(module: fx.GraphModule, reference: _Reference) -> tuple[Record, Record] | str:
    records: list[Record] = []
    size = batch_size(reference.sample)
    fresh = f"a batch of {batch_size(reference.fresh)}" if reference.other_batch else "fresh input"
    for call, expected, what in zip(
        (reference.sample, reference.fresh), reference.expected, ("`sample_input`", fresh), strict=True
    ):
        but = f"it reproduces `sample_input`, with its batch of {size}, but on {what} " if records else f"on {what} "
        try:
            records.append(run_recorded(module, call))
        except Exception as error:
            return f"{but}it raised {type(error).__name__}: {first_line(error).rstrip('.')}"
        reason = difference(records[-1].output, expected)
        if reason is not None:
            return but + reason
    return records[0], records[1]


def _program(
    module: fx.GraphModule,
    sample: Record,
    fresh: Record,
    reference: _Reference,
    rung: str,
    failures: tuple[str, ...],
    persistent: frozenset[str],
) -> Program:
    _restore_persistence(module, persistent)
    buffers = frozenset(name for name, _ in module.named_buffers(remove_duplicate=False)) & persistent
    axes: dict[str, tuple[int, ...]] = {}
    if reference.other_batch:
        for name, shape in sample.shapes.items():
            other = fresh.shapes.get(name, shape)
            pairs = enumerate(zip(shape, other, strict=True)) if len(other) == len(shape) else ()
            axes[name] = tuple(axis for axis, (a, b) in pairs if a != b)
    mutators = frozenset(sample.mutators | fresh.mutators)
    return Program(module, reference.sample, rung, failures, buffers, mutators, axes, sample.shapes)


def _restore_persistence(module: fx.GraphModule, persistent: frozenset[str]) -> None:
    """A GraphModule makes a persistent buffer of every tensor that a node gets; undo it for those that were none."""
    for name, _ in list(module.named_buffers(remove_duplicate=False)):
        if name not in persistent:
            owner, _, key = name.rpartition(".")
            module.get_submodule(owner)._non_persistent_buffers_set.add(key)


def _title(rung: str, hooks: Hooks) -> str:
    titles: dict[str, str] = {"export": "`torch.export`", "symbolic": "Symbolic tracing"}
    return titles.get(rung, "Symbolic tracing with example values") + (" (forward hooks kept)" if hooks else "")


def _place(error: BaseException) -> str:
    """Where in the model's source it happened, if that can be told."""
    inside = [str(Path(root.__file__ or "").parent) for root in (torch,)] + [str(Path(__file__).parent)]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*inside, "<"))]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _nothing_worked(name: str, failures: list[str], hooks: tuple[str, ...]) -> str:
    sample_only = any("but on a batch of" in failure for failure in failures)
    must = "must be traceable at every batch size; it was at that of `sample_input` only" if sample_only else ""
    message = f"`{name}` {must or 'must be traceable; no way of tracing reproduces it'}. " + " ".join(failures)
    if hooks:
        places = ", ".join(f"`{path or name}`" for path in hooks[:5]) + (" ..." if len(hooks) > 5 else "")
        return (
            f"{message} Tracing does not always see forward hooks, found on {places}: move what a hook does to the "
            "output into the `forward` of its module."
        )
    if any("Cache'" in failure for failure in failures):
        return f"{message} Set `{name}.config.use_cache = False`: what is not a tensor cannot be an output."
    return (
        f"{message} Replace conditions on the content of tensors by tensor operations such as `torch.where`, or pass "
        "the traceable part of the model."
    )

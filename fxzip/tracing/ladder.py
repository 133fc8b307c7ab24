"""The tracing ladder: the first rung that reproduces the model, on the sample and on another batch size, wins."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..errors import FxzipWarning, InputError, TraceError
from .aliasing import Sharing, sharing
from .calls import Call, as_call, map_tensors, select_rows
from .containers import flatten
from .example_values import trace_with_values
from .execution import Record, tracing_execution
from .exporting import trace_export
from .functional_to_modules import raised
from .inplace import out_of_place
from .kept_state import without_proxies
from .model_builtins import builtins_recorded
from .names import check_code, named_safely, safe_names
from .plain_contexts import plain_context
from .preparation import Hooks, check_dense, check_model, copied, first_line, folded, hooked, hooks_of, without_hooks
from .python_numbers import is_number
from .reference import Reference, compared, reference_of, with_several, without_idle_guards
from .steering import asks_of_arguments, astray, name_spaces, with_gradients
from .symbolic import SymbolicTracer
from .tidying import tidied
from .training import Strays, Training
from .unpacking import unpacked
from .unsteady import unsteady
from .wayouts import nothing_worked
from .ways import Way, watched

RUNGS = ("symbolic", "symbolic with example values", "export")
_FEW = 8  # inputs


@dataclass(frozen=True, eq=False)
class Program:
    """A model as a graph.

    Attributes:
        module: the graph, on an own copy of the parameters: eval mode, no hooks, parametrisations folded.
        call: the sample, detached; a single input twice, where the model runs at every batch size: which ATen calls a
            module makes can depend on whether there are several.
        sample: the sample as it was given, detached.
        rung: "symbolic", "symbolic with example values" or "export".
        failures: why the earlier rungs failed, one sentence each.
        persistent: names of the buffers that are in the state dict.
        mutators: names of the nodes that write in place into a tensor made before them.
        memory: which nodes see the same memory; empty if nothing is written in place.
        batch_axes: for each node whose output is a tensor, the axes whose size changed with the batch size; empty if
            the model runs at one batch size only.
        shapes: for each node whose output is a tensor, its shape on the sample.
        strays: what the model does in train mode that the graph does not do there.
        compared: the inputs on which the graph was compared with the model: the sample, a fresh one, others.
        origins: of its parameters and buffers the names in the model, parametrisations folded; what tracing has made is
            not in it.
        masked: names of its parameters that are computed weights with zeros that no training fills.
    """

    module: fx.GraphModule
    call: Call
    sample: Call
    rung: str
    failures: tuple[str, ...] = ()
    persistent: frozenset[str] = frozenset()
    mutators: frozenset[str] = frozenset()
    batch_axes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    compared: tuple[Call, ...] = ()
    memory: Sharing = field(default_factory=Sharing)
    strays: Strays = field(default_factory=Strays)
    origins: dict[str, str] = field(default_factory=dict)
    masked: frozenset[str] = frozenset()

    @cached_property
    def small_call(self) -> Call:
        """The sample with a few of its inputs, where the model runs at every batch size: it shows what is called."""
        return select_rows(self.call, slice(_FEW)) if self.batch_axes else self.call


@plain_context()
def trace(
    model: nn.Module, sample_input: Any, *, name: str = "model", others: Sequence[Call] = (), as_given: bool = False
) -> Program:
    """Trace a model, which is left as it was.

    `others`: inputs of other shapes that the graph has to be right on, too. `as_given`: a single input is not looked at
    twice, see `Program.call`.

    Raises TraceError when no rung reproduces the model, InputError when it cannot be run.

    >>> program = trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))
    >>> program.rung, [node.name for node in program.module.graph.nodes]
    ('symbolic', ['input_1', '_0', '_1', 'output'])
    """
    checked = check_model(model, name)
    call = map_tensors(lambda value: value.detach().clone(), as_call(sample_input))
    check_dense(call)
    own = copied(checked, name)
    reference = reference_of(own, call, others, name)
    if not as_given:
        reference = with_several(own, reference)
    hooks = hooks_of(folded(own))
    paths = without_hooks(own)
    paths_of = safe_names(own)
    persistent = frozenset(paths_of.get(name, name) for name in own.state_dict())
    failures: list[str] = []
    for kept, rung in product(([], hooks) if hooks else ([],), _rungs(call)):
        try:
            with hooked(kept), watched(any(way.calls for way in reference.ways)) as ways:
                traced = _traced(own, rung, reference)
        except Exception as error:
            failures.append(f"{_title(rung, kept)} failed{_place(error)}: {type(error).__name__}: {first_line(error)}")
            continue
        _restore_persistence(traced, persistent)
        found = _checked(traced, own, reference, rung, ways, kept)
        if isinstance(found, str):
            failures.append(f"{_title(rung, kept)} {found}")
            continue
        found = _improved(found, unpacked(found.module, found.sample.structures), reference)
        found = _improved(found, raised(found.module, found.sample.shapes), reference)
        check_code(found.module)
        training = Training(own, reference.fresh)
        if training.keep_dropout(found.module):
            again = compared(found.module, reference)
            assert not isinstance(again, str), again  # in eval mode dropout gives back its input
            found = _Verified(found.module, *again)
        strays = training.compared(found.module, reference.fresh, reference.expected[1])
        with hooked(kept):
            strays = replace(strays, gradients=with_gradients(own, reference))
        if strays.gradients:
            warnings.warn(f"`{name}`: {strays.notes[0]}.", FxzipWarning, stacklevel=2)
        program = _program(found, reference, rung, tuple(failures), persistent, strays)
        return replace(program, origins=_origins(program.module, own))
    raise TraceError(nothing_worked(name, failures, paths, unsteady(own, reference.sample)))


def _rungs(call: Call) -> tuple[str, ...]:
    """The rungs in order. Only one of them can read Python's numbers: with such arguments it is the first."""
    numbers = flatten((call.args, call.kwargs), is_number)[0]
    return tuple(sorted(RUNGS, key=lambda rung: rung != "symbolic with example values")) if numbers else RUNGS


def _traced(own: nn.Module, rung: str, reference: Reference) -> fx.GraphModule:
    with tracing_execution(), without_proxies(own):
        if rung == "export":
            if unsafe := list(safe_names(own)):
                raise InputError(f"Names of modules must be such as code can hold; found {unsafe[0]!r}. Rename it.")
            module = trace_export(own, reference.fresh, reference.dynamic_axes())
        else:
            sample = map_tensors(torch.clone, reference.sample)
            asked = asks_of_arguments(reference)
            with builtins_recorded(own, name_spaces(reference)):
                if rung == "symbolic":
                    graph = SymbolicTracer(own, sample, asked=asked).trace(own)
                else:
                    graph = trace_with_values(own, sample, asked=asked)
            module = named_safely(own, graph, safe_names(own))
    module.eval()
    return tidied(module)


@dataclass(frozen=True)
class _Verified:
    """A graph that computes what the model computes, and what its runs on the sample and on a fresh input showed."""

    module: fx.GraphModule
    sample: Record
    fresh: Record


def _checked(
    traced: fx.GraphModule, own: nn.Module, reference: Reference, rung: str, ways: Sequence[Way], kept: Hooks
) -> _Verified | str:
    """The program, if it is right and was traced on the way that the model goes, or what it did instead."""
    with hooked(kept):
        without_idle_guards(traced, own, reference)
    found = _verified(traced, reference)
    if isinstance(found, str):
        return f"gave another result than the model: {found}."
    with hooked(kept):
        elsewhere = astray(own, reference, ways, exported=rung == "export")
    return f"took another way than the model at {elsewhere}." if elsewhere else found


def _verified(module: fx.GraphModule, reference: Reference) -> _Verified | str:
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
        found = compared(better, reference)
        if not isinstance(found, str):
            return _Verified(better, *found)
        for leaf in flagged:
            leaf.inplace = True  # type: ignore[assignment]
    found = compared(module, reference)
    return found if isinstance(found, str) else _Verified(module, *found)


def _improved(plain: _Verified, better: fx.GraphModule | None, reference: Reference) -> _Verified:
    """Another module that should compute the same, if there is one and it does."""
    if better is None:
        return plain
    found = compared(better, reference)
    return plain if isinstance(found, str) else _Verified(better, *found)


def _program(
    found: _Verified,
    reference: Reference,
    rung: str,
    failures: tuple[str, ...],
    persistent: frozenset[str],
    strays: Strays,
) -> Program:
    module, sample, fresh = found.module, found.sample, found.fresh
    _restore_persistence(module, persistent)
    buffers = frozenset(name for name, _ in module.named_buffers(remove_duplicate=False)) & persistent
    axes: dict[str, tuple[int, ...]] = {}
    if reference.other_batch:
        for name, shape in sample.shapes.items():
            other = fresh.shapes.get(name, shape)
            pairs = enumerate(zip(shape, other, strict=True)) if len(other) == len(shape) else ()
            axes[name] = tuple(axis for axis, (a, b) in pairs if a != b)
    mutators = frozenset(sample.mutators | fresh.mutators)
    memory = sharing(module, reference.sample, mutators) if mutators else Sharing()
    return Program(
        module,
        reference.sample,
        reference.given,
        rung,
        failures,
        buffers,
        mutators,
        axes,
        sample.shapes,
        reference.calls,
        memory,
        strays,
    )


def _origins(module: fx.GraphModule, own: nn.Module) -> dict[str, str]:
    """`Program.origins`: a graph holds the tensors of the model's copy, or copies of them under safe names."""
    names: dict[int, str] = {}
    for name, tensor in _tensors(own):
        names.setdefault(id(tensor), name)
    old = {new: before for before, new in safe_names(own).items()}
    known = {name for name, _ in _tensors(own)}
    result = {}
    for name, tensor in _tensors(module):
        found = names.get(id(tensor), old.get(name, name) if old else "")
        if found in known:
            result[name] = found
    return result


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers, by each of their names."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


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

"""One ATen call: look its rule up, apply it, and file the labels of its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import RuleError
from ..tracing.dispatch_mode import DispatchMode
from ..tracing.randomness import unwatched
from .inplace_writes import Earlier, write_in_place, written_by
from .label_state import Barrier, Entry, Probed, Site, State, tensors
from .rules import AxisLabels, Invocation, Rule, contraction, elementwise, is_pointwise, is_random, movement, varying
from .rules.probing import probe
from .rules.uniform import FACTORIES, UNWRITTEN, uniform_axes


class LabelMode(DispatchMode):
    """Looks at every ATen call, applies its rule, and stores the result's fields."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        state = self.state
        inputs = list(tensors((args, kwargs)))
        for tensor in inputs:
            state.touch(tensor)

        twin = _out_of_place(func)
        if twin is None:
            written = written_by(func, args, kwargs)
            earlier = Earlier.of(state, inputs, written) if written else Earlier({}, {})
            out = func(*args, **kwargs)
        else:  # its values stay where they are, and it is a view of itself from here on
            before = torch.ops.aten.alias.default(args[0])
            state.file(replace(state.entry(args[0]), tensor=before))
            out = func(*args, **kwargs)
            func, args, written, earlier = twin, (before, *args[1:]), [], Earlier({}, {})
            inputs = list(tensors((args, kwargs)))

        name = func._schema.name.split("::")[-1]
        numbers: dict[int, Callable[[], None]] = {}
        with unwatched():
            call = Invocation(
                name.rstrip("_") if written else name, func, tuple(args), kwargs, out, state.store,
                lambda t: earlier.operands.get(id(t)) or state.operand(t), state.restart,
                state.lies_in_blocks,
                lambda t, why: numbers.update({id(t): why}),
            )  # fmt: skip
            self._label(call, inputs, written, earlier)
            for t in tensors(out) if numbers else ():
                state.entry(t).numbers = numbers.get(id(t))

        return out

    def _label(self, call: Invocation, inputs: list[Tensor], written: list[Tensor], earlier: Earlier) -> None:
        """Apply the rule of a call and file what it gives."""
        state, random = self.state, is_random(call.func)
        dynamic = random or any(not state.entry(t).static for t in inputs)
        if dynamic and _weighs(state, call):
            state.store.constraints.sums = True

        labelled = any(state.entry(t).fields for t in inputs)
        state.store.call, state.store.where = call.name, state.where
        for tensor in inputs:
            state.entry(tensor).used()
        result = _apply(state, call) if labelled or (random and call.name in state.rules) else None
        for first, second in state.store.crossed:
            state.lie_at_once(first, second)
        state.store.crossed.clear()
        for labels in () if dynamic or not labelled or not _is_elementwise(state, call) else elementwise.bent(call):
            state.store.touch("bent", labels)
        if written:
            write_in_place(state, call, written, result, dynamic, earlier)
        if not written or not any(call.out is t for t in written):
            _file(state, call, result, dynamic)

        _end_at_uncertain_sizes(state, call)
        _note_sites(state, call)
        state.calls += 1


def _out_of_place(func: Any) -> Any:
    """The call that gives a view, for one that gives its operand another shape (`squeeze_`, `t_`); None for others."""
    if torch.Tag.inplace_view not in getattr(func, "tags", ()):
        return None
    packet = getattr(torch.ops.aten, func._schema.name.split("::")[-1].rstrip("_"), None)
    return getattr(packet, func._overloadname, None)


def _weighs(state: State, call: Invocation) -> bool:
    """Whether a call on activations may sum over features with learned weights, or look them up in a learned table."""
    rule = _rule_of(state, call)
    weighing = contraction.product, contraction.convolution, movement.embedding, movement.embedding_bag
    if rule is not None and rule not in weighing:
        return False
    return any(entry.static and entry.learned for entry in map(state.entry, call.tensors()))


def _rule_of(state: State, call: Invocation) -> Rule | None:
    """The rule of a call; those that PyTorch tags as pointwise need no row in the table."""
    rule = state.rules.get(call.name)
    return elementwise.elementwise if rule is None and is_pointwise(call.func) else rule


def _is_elementwise(state: State, call: Invocation) -> bool:
    return _rule_of(state, call) in (elementwise.elementwise, elementwise.first_operand)


def _apply(state: State, call: Invocation) -> AxisLabels | list[AxisLabels] | None:
    """The fields of the result; a call without a rule pins all it touches."""
    rule = _rule_of(state, call)
    if rule is not None:
        result = rule(call)
    else:
        result = None if written_by(call.func, call.args, call.kwargs) else probe(call)
        if result is not None:
            state.probed.append(
                Probed(state.node, call.name, f"`{call.name}` ({state.where}) was probed on random data")
            )

    _check_fields(state, call, result)
    if result is None:
        reason = f"`{call.name}` ({state.where}) has no rule"
        state.barriers.append(Barrier(state.node, call.name, reason))
        for operand in call.operands():
            for labels in operand.fields:
                state.store.pin(labels, reason, "barrier")

    return result


def _check_fields(state: State, call: Invocation, result: Any) -> None:
    """A rule gives one tuple of fields for a tensor, a list of tuples for several; sizes 1 or the tensor's."""
    pairs = zip(call.out, result, strict=False) if isinstance(result, list) else [(call.out, result or ())]
    for tensor, fields in pairs:
        for labels in fields if isinstance(tensor, Tensor) else ():
            if labels.ndim != tensor.ndim or any(
                a not in (1, b) for a, b in zip(labels.shape, tensor.shape, strict=True)
            ):
                raise RuleError(
                    f"The rule of `{call.name}` must give fields with the axes of the result, each of size 1 or the "
                    f"result's, {tuple(tensor.shape)}; found {tuple(labels.shape)} at {state.where}."
                )


def _file(state: State, call: Invocation, result: AxisLabels | list[AxisLabels] | None, dynamic: bool) -> None:
    """File what is known of each tensor that the call returns."""
    entries = [state.entry(t) for t in call.tensors()][call.name in FACTORIES :]  # of those the first gives the shape
    known = all(entry.known for entry in entries) and call.name not in UNWRITTEN and not is_random(call.func)
    learned = any(state.entry(t).learned for t in call.tensors())
    outs = call.out if isinstance(call.out, (list, tuple)) else [call.out]
    uniform = iter(uniform_axes(call, state.uniform))

    for place, out in enumerate(outs):
        if not isinstance(out, Tensor):
            continue
        given: Any = result
        if call.out is not out:
            given = result[place] if isinstance(result, list) and place < len(result) else ()
        given = given if isinstance(given, tuple) else ()
        for labels in given:
            if not varying(labels):
                state.store.pin(labels, "it is taken out alone")
        fields = tuple(labels for labels in given if varying(labels))
        state.seen.update((id(f), f) for f in fields)
        state.file(Entry(out, fields, not dynamic, learned, known, next(uniform)))


def _end_at_uncertain_sizes(state: State, call: Invocation) -> None:
    """What takes as many elements as a value computed with parameters says gives each model another number of them."""
    if torch.Tag.dynamic_output_shape not in getattr(call.func, "tags", ()):
        return

    asked = list(call.tensors())
    if "index" in call.name or call.name in ("masked_select", "repeat_interleave"):
        asked = [t for t in asked[1:] if t.dtype in (torch.bool, torch.uint8) or call.name == "repeat_interleave"]

    if any(not state.entry(t).static and state.entry(t).learned for t in asked):
        reason = (
            f"how many elements `{call.name}` ({state.where}) takes is computed with parameters, so that each model "
            "takes others"
        )
        state.barriers.append(Barrier(state.node, call.name, reason))


_SUMS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "convolution": 0, "addmv": 1, "mv": 0, "embedding": 1}
"""Calls that sum over features, or take them out of a table, and the place of their first factor."""


def _note_sites(state: State, call: Invocation) -> None:
    """Remember where features go into a parameter's sum, and where they come out of one or of a table.

    Where nothing depends on the input (a position bias computed by a small network from a table of coordinates) the
    first factor counts as what moves, unless it is a parameter.
    """
    if call.name not in _SUMS:
        return

    nth = state.tally[state.node, call.name]
    state.tally[state.node, call.name] += 1
    values = [(place, t) for place, t in enumerate(call.args) if isinstance(t, Tensor)]
    moving = [(place, t) for place, t in values if not state.entry(t).static]
    if not moving:
        first = call.args[_SUMS[call.name]]
        if call.name == "embedding" or not state.entry(first).fields or state.lies_in_parameter(first):
            return
        moving = [(_SUMS[call.name], first)]

    for place, tensor in [*moving, (-1, call.out)]:
        for labels in state.entry(tensor).fields:
            consumed = place >= 0 and len(moving) == 1
            site = Site(state.node, state.calls, place, labels, tensor.shape, consumed, call.name, nth)
            state.sites.append(site)

"""What a model gives, to compare its traces with: on the sample, at another batch size, at other sizes of the data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ContainerError, InputError, TraceError
from .calls import Call, batch_size, map_tensors, twice, with_batch
from .containers import leaves
from .execution import Record, difference, quiet_execution, run_eager, run_recorded
from .kept_state import changed, marks, state_kept
from .preparation import first_line
from .randomness import HigherOrderCall
from .state import python_numbers, seed_python
from .tidying import tidied
from .training import names_of
from .ways import Way, entered, watched


@dataclass(frozen=True)
class Reference:
    """What the eager model gives, each time from another seed: a graph that holds numbers which were drawn while it was
    made, or that is not seeded as the model seeds itself, gives something else.

    Attributes:
        sample: the sample input; see `with_several`.
        fresh: input like it, of another batch size where the model runs at one.
        others: inputs of other shapes.
        expected: the outputs, in that order.
        other_batch: whether `fresh` is of another batch size.
        numbers: what the model does with random numbers that no graph does; "" if nothing.
        ways: those that it takes on the sample and on fresh input; none where they could not be watched.
        alone: the sample as it was given, if `sample` has its only input twice.
    """

    sample: Call
    fresh: Call
    others: tuple[Call, ...]
    expected: tuple[Any, ...]
    other_batch: bool
    numbers: str = ""
    ways: tuple[Way, ...] = ()
    alone: Call | None = None

    @property
    def given(self) -> Call:
        """The sample as it was given."""
        return self.sample if self.alone is None else self.alone

    @property
    def calls(self) -> tuple[Call, ...]:
        return self.sample, self.fresh, *self.others

    def dynamic_axes(self) -> list[tuple[int, ...]]:
        """For each tensor of the arguments the axes that are of different sizes."""
        shapes = [[value.shape for value in leaves((call.args, call.kwargs))] for call in self.calls]
        return [
            tuple(axis for axis, sizes in enumerate(zip(*own, strict=False)) if len(set(sizes)) > 1)
            for own in zip(*shapes, strict=True)
        ]


def reference_of(own: nn.Module, call: Call, others: Sequence[Call], name: str) -> Reference:
    """Run the copy, hooks and all, before anything is folded or dropped. Calls that the model does not take are left
    out of `others`.

    Raises:
        InputError: the model does not run on `call`.
        TraceError: what it returns holds no tensors, or holds them in what cannot be taken apart.
    """
    try:
        before = marks(own)
        with state_kept(own), watched() as ways:
            expected, numbers = _run_watched(own, call)
            written = changed(before, marks(own))
        returned = leaves(expected)
    except ContainerError as error:
        raise TraceError(f"`{name}` must return tensors in containers that can be taken apart. {error}") from error
    except HigherOrderCall as error:
        raise TraceError(
            f"`{name}` must consist of calls on tensors; it calls `{error}`, which is given functions, and what these "
            "compute is not seen. Write it with plain calls: `torch.where` in place of `torch.cond`, a loop of Python "
            "over a fixed number of steps in place of `while_loop` and scans, `scaled_dot_product_attention` with a "
            "mask in place of `flex_attention`."
        ) from error
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
    odd = next(filter(None, map(_no_array, returned)), None)
    if odd is not None:  # what is returned is compared place by place
        raise TraceError(f"`{name}` must return dense tensors; found {odd} of what the zip returns.")
    if written:
        _check_state(own, call, name, written)
    size = batch_size(call)
    if size is not None:
        fresh = with_batch(call, 3 if size != 3 else 2)
        try:
            with watched() as more:
                given = run_eager(own, fresh, seed=1)
            found = _with_others(own, (call, fresh), (expected, given), others, other_batch=True)
            return replace(found, numbers=numbers, ways=(*ways, *more))
        except Exception:  # the model is made for one batch size
            pass
    fresh = with_batch(call, size or 0)
    with watched() as more:
        given = run_eager(own, fresh, seed=1)
    found = _with_others(own, (call, fresh), (expected, given), others, other_batch=False)
    return replace(found, numbers=numbers, ways=(*ways, *more))


def with_several(own: nn.Module, reference: Reference) -> Reference:
    """The reference with a sample of two equal inputs for one of a single input, if the model runs at any batch size;
    the single one is among the others."""
    if not reference.other_batch or batch_size(reference.sample) != 1:
        return reference
    both, alone = twice(reference.sample), reference.sample
    try:
        with watched() as more:
            given = run_eager(own, both)
        calls, expected = (both, reference.fresh), (given, reference.expected[1])
        found = _with_others(own, calls, expected, (alone, *reference.others), other_batch=True)
    except Exception:  # two do not go together with what else it is given
        return reference
    if not found.others or found.others[0] is not alone:
        return reference
    return replace(found, numbers=reference.numbers, ways=(*reference.ways, *more), alone=alone)


def _no_array(value: Tensor) -> str | None:
    """What a tensor is that is no array of numbers, and what to return in its place; None if it is one."""
    if value.is_nested:
        return "a nested one. Return its parts, padded to one length, and make it nested"
    if value.is_quantized:
        return "a quantized one. Return it by `.dequantize()`, and quantize it"
    if value.layout != torch.strided:
        return f"one of layout `{value.layout}`. Return it by `.to_dense()`, or what it is made of, and make it sparse"
    return None


def _check_state(own: nn.Module, call: Call, name: str, written: Sequence[str]) -> None:
    """A graph gives the same for the same input, whatever it was given before. `written`: what a call changes.

    Raises:
        TraceError: the model gives something else.
    """
    fresh = with_batch(call, batch_size(call) or 0)
    with state_kept(own):
        try:
            alone = run_eager(own, fresh)
        except Exception:  # input like it is no input: nothing can be said
            return
    with state_kept(own):
        first = run_eager(own, call)
        later = [(run_eager(own, call), first), (run_eager(own, fresh), alone)]

    if all(difference(found, expected) is None for found, expected in later):
        return
    raise TraceError(
        f"`{name}` must give the same for the same input; it keeps state between calls, in {names_of(written)}, and "
        "gives something else after another call. Make that state an argument and an output of the model."
    )


def _with_others(
    own: nn.Module, calls: tuple[Call, Call], expected: tuple[Any, Any], others: Sequence[Call], *, other_batch: bool
) -> Reference:
    taken: list[tuple[Call, Any]] = []
    for call in others:
        with suppress(Exception):  # said where the data are used
            taken.append((call, run_eager(own, call, seed=2 + len(taken))))
    found = tuple(call for call, _ in taken)
    return Reference(*calls, found, (*expected, *(output for _, output in taken)), other_batch)


def compared(module: fx.GraphModule, reference: Reference) -> tuple[Record, Record] | str:
    """What the runs on the sample and on fresh input showed, or why the graph is not the model."""
    records: list[Record] = []
    size = batch_size(reference.sample)
    fresh = f"a batch of {batch_size(reference.fresh)}" if reference.other_batch else "fresh input"
    others = ["`sample_input`" if c is reference.alone else f"`data` of shape {_shapes(c)}" for c in reference.others]
    names = ("`sample_input`" if reference.alone is None else "`sample_input`, twice", fresh, *others)
    for seed, (call, expected, what) in enumerate(zip(reference.calls, reference.expected, names, strict=True)):
        but = f"it reproduces `sample_input`, with its batch of {size}, but on {what} " if records else f"on {what} "
        try:
            records.append(run_recorded(module, call, seed=seed))
        except Exception as error:
            return f"{but}it raised {type(error).__name__}: {first_line(error).rstrip('.')}"
        reason = difference(records[-1].output, expected)
        if reason is not None:
            return f"{but}{reason}; {reference.numbers}" if reference.numbers else but + reason
    return records[0], records[1]


def without_idle_guards(module: fx.GraphModule, own: nn.Module, reference: Reference) -> None:
    """Take out, in place, the guards that a batch of one fails although the graph is right there: code that only asks
    whether it has to broadcast, or PyTorch, which looks at a number that then goes into a call (`groups=len(x)`).

    A loop over rows that was unrolled is right at every batch that is smaller than the sample, and wrong at larger
    ones: what fails at a larger batch too is taken out only if the graph is right there.
    """
    size = batch_size(reference.sample)
    if not reference.other_batch or size is None or size == 1:
        return
    failed = _failed_where_right(module, own, with_batch(reference.sample, 1))
    if not failed or _failed_where_right(module, own, reference.sample) != set():
        return  # what fails on the sample, too, says that the graph is wrong

    if _failed_where_right(module, own, with_batch(reference.sample, 2 * size + 1)) is None:
        failed -= _failed_where_right(module, own, reference.fresh) or failed
    for node in list(module.graph.nodes):
        if node.name in failed:
            module.graph.erase_node(node)
    tidied(module)


def _failed_where_right(module: fx.GraphModule, own: nn.Module, call: Call) -> set[str] | None:
    """The guards that fail on a call; None: the model does not take it, or gives something else than the graph."""
    try:
        expected = run_eager(own, call)
        record = run_recorded(module, call, lenient=True)
    except Exception:
        return None
    return record.failed if difference(record.output, expected) is None else None


def _run_watched(own: nn.Module, call: Call) -> tuple[Any, str]:
    """`run_eager`, and what the model does there with random numbers that no graph does, with a way out; "" if
    nothing."""
    given = map_tensors(lambda value: value.detach().clone(), call)
    with quiet_execution() as seeds:
        seed_python(0)
        before = python_numbers()
        output = entered(own, *given.args, **given.kwargs)
        drawn = python_numbers() != before
    if seeds.seeded:
        return output, (
            "its `forward` seeds random numbers, or a generator of them, which no graph does: draw them once, in "
            "`__init__`, into a buffer, or leave out the seed"
        )
    if drawn:
        return output, (
            "its `forward` may draw random numbers of Python or NumPy, which no graph does: draw them with PyTorch, "
            "e.g. `torch.rand_like`"
        )
    return output, ""


def _shapes(call: Call) -> str:
    return " and ".join(str(tuple(value.shape)) for value in leaves((call.args, call.kwargs)))

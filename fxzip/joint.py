"""Heads that decide together: logits of different heads made comparable, without touching what each head says.

Head k gives logits z_k(x) over its own classes. Whoever lets all heads decide takes the argmax over all logits side by
side; but no network has ever seen the inputs of another, and how large its logits are there is chance. With data per
model it is known which model an input belongs to (its *task*), though not which class. So a shift is fitted for each
head,

    z_k'(x) = z_k(x) + s_k(x),    s_k(x) = v_k · h_k(x) + c_k,

the same for all classes of the head, where h_k are the features that its last linear call reads (averaged over
positions, if there are any). Order and softmax of a head's own logits stay what they were: the accuracy of each task
cannot change. `shifts.py` finds v and c.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .align import attribute
from .batches import not_finite
from .calibration import Calibration
from .errors import DataError, InputError
from .inputs import as_call
from .report import Report
from .shifts import FOLDS, Evidence, Shifts, fit_shifts
from .tracing import run_eager
from .zipped import ZippedModule

_LINEAR = (F.linear, torch.ops.aten.linear.default)
_CONVS = (nn.modules.conv._ConvNd,)


def shift(features: Tensor, direction: Tensor, offset: Tensor, axis: int) -> Tensor:
    """One number for each input, [batch]: v · h + c, with h the mean of the features over all positions.

    >>> shift(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([1.0, 0.5]), torch.tensor(1.0), 2)
    tensor([4.5000])
    """
    return pooled(features, axis) @ direction.to(features.dtype) + offset.to(features.dtype)


def pooled(features: Tensor, axis: int) -> Tensor:
    """[batch, features]: the mean over all other axes.

    >>> pooled(torch.ones(2, 3, 4, 4), 1).shape
    torch.Size([2, 3])
    """
    return features.movedim(axis, 1).unsqueeze(-1).flatten(2).mean(2)  # no branch: it can be traced again


def lift(logits: Tensor, amount: Tensor) -> Tensor:
    """All logits of an input moved by the same amount: [batch, classes] and [batch].

    >>> lift(torch.zeros(2, 2), torch.tensor([1.0, -1.0]))
    tensor([[ 1.,  1.],
            [-1., -1.]])
    """
    return logits + amount[:, None].to(logits.dtype)


def calibrate_joint(
    network: ZippedModule, sample_input: Any, data: Any, *, progress: bool | None = None
) -> ZippedModule:
    """A copy of a multi-head classifier whose heads can be compared: argmax over all their logits side by side.

    Each head's logits are moved by one number per input, the same for all of its classes, so what a head says of its
    own classes stays the same.

    >>> import fxzip
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    >>> x = torch.randn(40, 4)
    >>> both = calibrate_joint(fxzip.side_by_side([a, b], x), x, fxzip.PerModel([x + 1], [x - 1]))
    >>> bool((both(x)[1].argmax(1) == b(x).argmax(1)).all())
    True

    Args:
        network: of `compile_zip` or `side_by_side`, or any with their interface, whose heads give [batch, classes].
        sample_input: as the network takes it.
        data: `fxzip.PerModel` of batches for each head: unlabelled inputs of its own task.
        progress: show a bar; None: on a terminal only.

    Raises:
        InputError: a head does not return one tensor of logits [batch, classes], or no linear call computes it.
        DataError: data is not given per model, or there are fewer than five inputs of a task.
    """
    heads = _heads(network)
    calibration = Calibration.of(data, as_call(sample_input), len(heads), progress)
    return with_shifts(network, calibration)


def with_shifts(network: ZippedModule, calibration: Calibration) -> ZippedModule:
    """The stage itself: multi-head network, calls of each task -> network with a shift for each head."""
    result = copy.deepcopy(network)
    heads = _heads(result)
    needs_tasks(calibration, len(heads))
    found = fit_shifts(_observe(result, heads, calibration))
    if found.ridge is not None:
        _emit(result, heads, found)
    report: Report | None = result.report
    if report is not None:
        result.meta["fxzip_report"] = report.noting(_note(found))
    return result


def needs_tasks(calibration: Calibration, heads: int) -> None:
    """Whether the calibration knows which model an input belongs to.

    Raises:
        DataError: it does not.
    """
    if len(calibration.sources) != heads:
        raise DataError(
            f"Joint decisions need to know which model an input belongs to; found {len(calibration.sources)} sources "
            f"of data for {heads} heads. Pass `data=fxzip.PerModel(inputs of a, inputs of b, ...)`."
        )


def _note(found: Shifts) -> str:
    before, after = (f"{100 * share:.1f} %" for share in found.known)
    if found.ridge is None:
        return f"joint: no shift of the heads' logits was better than none; together they name the task of {before}"
    return (
        f"joint: the heads' logits are shifted so that together they name the task of {after} of the inputs (before "
        f"{before}; cross-validated, ridge {found.ridge:g})"
    )


@dataclass(frozen=True, eq=False)
class _Ending:
    """How a head ends: `logits` is what it returns, `source` what its last linear call `call` reads, features on
    `axis`."""

    logits: fx.Node
    call: fx.Node
    source: fx.Node
    axis: int


def _heads(network: fx.GraphModule) -> list[_Ending]:
    outputs = network.graph.output_node().args[0] if isinstance(network, fx.GraphModule) else None
    if not isinstance(outputs, (tuple, list)) or len(outputs) < 2:
        raise InputError(
            "`calibrate_joint` needs a network that returns a tuple with each model's output, of `compile_zip` or "
            f"`side_by_side`; found `{type(network).__name__}`."
        )
    order = {node: place for place, node in enumerate(network.graph.nodes)}
    return [_ending(network, k, output, order) for k, output in enumerate(outputs)]


def _ending(network: fx.GraphModule, k: int, output: Any, order: dict[fx.Node, int]) -> _Ending:
    returned: list[fx.Node] = []
    fx.node.map_arg(output, returned.append)
    if len(returned) != 1:
        raise InputError(f"Joint decisions need one tensor of logits of each head; head {k} returns {len(returned)}.")
    for node in sorted(_ancestors(returned[0]), key=order.__getitem__, reverse=True):
        axis = _feature_axis(network, node)
        if axis is not None:
            return _Ending(returned[0], node, node.all_input_nodes[0], axis)
    raise InputError(
        f"Joint decisions need a linear or convolutional call whose inputs tell the tasks apart; head {k} has none in "
        f"front of node `{returned[0].name}`."
    )


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, todo = {node}, [node]
    while todo:
        new = set(todo.pop().all_input_nodes) - found
        found |= new
        todo += new
    return found


def _feature_axis(network: fx.GraphModule, node: fx.Node) -> int | None:
    """Where the features lie in what a linear call reads; None for other calls."""
    if node.op == "call_module":
        called = attribute(network, str(node.target))
        return -1 if isinstance(called, nn.Linear) else 1 if isinstance(called, _CONVS) else None
    return -1 if node.op == "call_function" and node.target in _LINEAR else None


def _observe(network: ZippedModule, heads: Sequence[_Ending], calibration: Calibration) -> Evidence:
    """Run the network on all inputs of all tasks."""
    probe = _probe(network, heads)
    features: list[list[Tensor]] = [[] for _ in heads]
    scores, tasks = [], []
    for index, (task, call) in enumerate(calibration("joint").labelled()):
        seen, logits = run_eager(probe, call)
        for k, (own, z) in enumerate(zip(seen, logits, strict=True)):
            _check(own, z, k, heads[k], index)
            features[k].append(own.cpu().double())
        scores.append(torch.stack([z.cpu().double().logsumexp(1) for z in logits], 1))
        tasks.append(torch.full((len(scores[-1]),), task))
    counts = torch.bincount(torch.cat(tasks), minlength=len(heads)).tolist()
    if min(counts) < FOLDS:
        raise DataError(
            f"Joint decisions need at least {FOLDS} inputs of each task; found {', '.join(map(str, counts))}."
        )
    return Evidence(tuple(torch.cat(own) for own in features), torch.cat(scores), torch.cat(tasks))


def _probe(network: ZippedModule, heads: Sequence[_Ending]) -> fx.GraphModule:
    """The network, returning what the last linear calls read, averaged over positions, and the logits."""
    graph = copy.deepcopy(network.graph)
    twins = dict(zip(network.graph.nodes, graph.nodes, strict=True))
    seen = []
    for head in heads:
        with graph.inserting_before(twins[head.call]):
            seen.append(graph.call_function(pooled, (twins[head.source], head.axis)))
    graph.output_node().args = ((tuple(seen), tuple(twins[head.logits] for head in heads)),)
    return fx.GraphModule(network, graph).eval()


def _check(own: Tensor, logits: Any, k: int, head: _Ending, index: int) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"`{type(logits).__name__}`"
        raise InputError(f"Joint decisions need logits [batch, classes] of each head; head {k} returns {found}.")
    if own.ndim != 2 or len(own) != len(logits):
        raise InputError(
            f"Joint decisions need features of each input; node `{head.call.name}`, the last linear call of head {k}, "
            f"reads {tuple(own.shape)} for {len(logits)} inputs."
        )
    bad = int((~own.isfinite()).any(0).sum()) + int((~logits.isfinite()).any(0).sum())
    if bad:
        raise not_finite(bad, head.call.name, f"head {k}", index)


def _emit(network: ZippedModule, heads: Sequence[_Ending], found: Shifts) -> None:
    """Write the shifts into the graph. In place."""
    graph = network.graph
    for k, (head, direction, offset) in enumerate(zip(heads, found.directions, found.offsets, strict=True)):
        like = next(network.parameters()).device
        names = list(_free_names(network, k))
        for name, value in zip(names, (direction, offset), strict=True):
            network.register_buffer(name, value.float().to(like))
        with graph.inserting_before(head.call):
            amount = graph.call_function(shift, (head.source, *(graph.get_attr(name) for name in names), head.axis))
        with graph.inserting_before(graph.output_node()):
            lifted = graph.call_function(lift, (head.logits, amount))
        for node in (*amount.all_input_nodes[1:], amount, lifted):
            node.meta["fxzip"] = {"part": f"head {k}", "from": [], "writes": False}
        outputs = list(graph.output_node().args[0])  # type: ignore[arg-type]
        outputs[k] = fx.node.map_arg(outputs[k], _always(lifted))
        graph.output_node().args = (tuple(outputs),)
    graph.lint()
    network.recompile()


def _always(node: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda _: node


def _free_names(network: nn.Module, k: int) -> Iterator[str]:
    """Names of two buffers that the network does not have yet: a network may be calibrated again."""
    number = 0
    while hasattr(network, f"joint_{k}_{number}_direction"):
        number += 1
    yield from (f"joint_{k}_{number}_{what}" for what in ("direction", "offset"))

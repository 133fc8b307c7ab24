"""Heads that decide together: logits of different heads made comparable, without touching what each head says.

Head k gives logits z_k(x) over its own classes. Whoever lets all heads decide takes the argmax over all logits side by
side; but no network has ever seen the inputs of another, and how large its logits are there is chance. With data per
model it is known which model an input belongs to (its *task*), though not which class. So a shift is fitted for each
head,

    z_k'(x) = z_k(x) + s_k(x),    s_k(x) = v_k · (h_k(x) - m_k) + c_k,

the same for all classes of the head, where h_k are the features that its last linear or convolutional module reads (of
a convolution, their mean over positions). Order and softmax of a head's own logits stay what they were, up to rounding:
the accuracy of each task cannot change. `refit/joint/logistic.py` finds v and c.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...calibration import processes
from ...calibration.data_forms import MAX_BATCHES
from ...calibration.rejections import not_finite
from ...calibration.sources import Calibration
from ...errors import DataError, InputError
from ...ops import lift, pooled, shift
from ...partition.alignment import attribute
from ...rewriting.module import ZippedModule
from ...rewriting.report import Report
from ...tracing import Program, plain_context, run_eager
from ...tracing.calls import Call, JointCall, as_call, batch_size, with_batch
from ...tracing.option_values import checked
from ...tracing.provenance import Provenance, mark
from .classifier_heads import Ending, check_features, check_logits, ending
from .logistic import Evidence, Shifts, fit_shifts

LEAST = 10  # inputs of each task


@processes.together()
@plain_context()
@checked
def calibrate_joint(
    network: ZippedModule,
    sample_input: Any,
    data: Any,
    *,
    progress: bool | None = None,
    max_batches: int = MAX_BATCHES,
) -> ZippedModule:
    """A copy of a multi-head classifier whose heads can be compared: argmax over all their logits side by side.

    Each head's logits are moved by one number per input, the same for all of its classes, so their order and softmax
    stay what they were. What does not stay is a decision by threshold, as of sigmoids.

    >>> import fxzip
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    >>> x = torch.randn(40, 4)
    >>> both = calibrate_joint(fxzip.side_by_side([a, b], x), x, fxzip.PerModel([x + 1], [x - 1]))
    >>> bool((both(x)[1].argmax(1) == b(x).argmax(1)).all())
    True

    Args:
        network: of `compile_zip` or `side_by_side`, whose heads give logits [batch, classes].
        sample_input: as the network takes it.
        data: `fxzip.PerModel` of batches for each head: unlabelled inputs of its own task.
        progress, max_batches: as in `compile_zip`.

    Returns:
        The copy, in eval mode. Its report notes the share of inputs whose task the heads name, before and after.

    Raises:
        InputError: a head does not return one tensor of logits [batch, classes], or its last linear module reads no
            features of each input.
        DataError: data is not given per model, or there are fewer than ten inputs of a task.
    """
    heads = _heads(network)
    calibration = Calibration.of(data, as_call(sample_input), len(heads), progress, max_batches)
    return with_shifts(network, calibration)


def with_shifts(network: ZippedModule, calibration: Calibration) -> ZippedModule:
    """The stage itself: multi-head network, calls of each task -> network with a shift for each head."""
    result = copy.deepcopy(network).eval()
    heads = _heads(result)
    needs_tasks(calibration, len(heads))
    with torch.inference_mode(False):
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
        DataError: it does not. InputError: models with inputs of their own, of which it cannot.
    """
    if isinstance(calibration.sample, JointCall):
        raise InputError(
            "Joint decisions need inputs that every model takes, to know which model one belongs to; found models with "
            "inputs of their own."
        )
    if len(calibration.sources) != heads:
        raise DataError(
            f"Joint decisions need a source of data for each of the {heads} heads, to know which model an input "
            f"belongs to; found {len(calibration.sources)}. Pass `data=fxzip.PerModel(inputs of a, inputs of b, ...)`."
        )


def needs_classifiers(programs: Sequence[Program]) -> None:
    """Whether traced models can be heads that decide together.

    Raises:
        InputError: they cannot.
    """
    for k, program in enumerate(programs):
        head = ending(program.module, k, program.module.graph.output_node().args[0])
        check_logits(program.shapes.get(head.logits.name), k)


def _note(found: Shifts) -> str:
    before, after = (f"{100 * share:.1f} %" for share in (found.before, found.after))
    if found.ridge is None:
        return f"joint: no shift of the heads' logits was better than none; together they name the task of {before}"
    return (
        f"joint: the heads' logits are shifted so that together they name the task of {after} of the inputs (before "
        f"{before}; cross-validated on the calibration inputs, which flatters a network that was refitted on them; "
        f"ridge {found.ridge:g})"
    )


def _heads(network: Any) -> list[Ending]:
    outputs = network.heads if isinstance(network, ZippedModule) else ()
    if len(outputs) < 2:
        raise InputError(
            "`calibrate_joint` needs a network that returns a tuple with each model's output, of `compile_zip` or "
            f"`side_by_side`; found `{type(network).__name__}`."
        )
    return [ending(network, k, output) for k, output in enumerate(outputs)]


def _observe(network: ZippedModule, heads: Sequence[Ending], calibration: Calibration) -> Evidence:
    """Run the network on all inputs of all tasks."""
    probe = _probe(network, heads)
    features: list[list[Tensor]] = [[] for _ in heads]
    scores, tasks, shares = [], [], [True] * len(heads)
    precision = 0.0
    for index, (task, call) in enumerate(calibration("joint").by_source()):
        if index == 0:
            _check_batch(probe, heads, call)
        seen, logits = run_eager(probe, call)
        for k, (own, z) in enumerate(zip(seen, logits, strict=True)):
            _check(own, z, k, heads[k], index)
            features[k].append(pooled(own, heads[k].axis).cpu().double())
            precision = max(precision, torch.finfo(own.dtype).eps)
            shares[k] &= bool((z >= 0).all() and ((z.float().sum(1) - 1).abs() < 1e-2).all())
        scores.append(torch.stack([z.amax(1).cpu().double() for z in logits], 1))
        tasks.append(torch.full((len(scores[-1]),), task, device="cpu"))
    shares = [all(own) for own in zip(*processes.everyone(shares), strict=True)]
    if any(shares):
        raise InputError(
            f"Joint decisions need logits of each head; head {shares.index(True)} returns shares that sum to one, as a "
            "softmax gives. Let the model end in front of it."
        )
    evidence = _of_all([torch.cat(own) for own in features], torch.cat(scores), torch.cat(tasks), precision)
    counts = torch.bincount(evidence.tasks, minlength=len(heads)).tolist()
    if min(counts) < LEAST:
        raise DataError(
            f"Joint decisions need at least {LEAST} inputs of each task; found {', '.join(map(str, counts))}."
        )
    return evidence


def _of_all(features: Sequence[Tensor], scores: Tensor, tasks: Tensor, precision: float) -> Evidence:
    """What all processes have seen, task by task: in the order in which one process would have seen it."""
    if processes.count() == 1:
        return Evidence(tuple(features), scores, tasks, precision)
    tasks = processes.gathered(tasks)
    order = tasks.argsort(stable=True)
    features = [processes.gathered(own)[order] for own in features]
    precision = max(processes.everyone(precision))
    return Evidence(tuple(features), processes.gathered(scores)[order], tasks[order], precision)


def _check_batch(probe: fx.GraphModule, heads: Sequence[Ending], call: Call) -> None:
    """Axis 0 of what the last calls read must be the batch, and not be as long by chance."""
    try:
        seen, logits = run_eager(probe, with_batch(call, (batch_size(call) or 1) + 1))
    except Exception:  # a network of one batch size
        return
    for k, (own, z) in enumerate(zip(seen, logits, strict=True)):
        if isinstance(z, Tensor) and z.ndim == 2 and z.is_floating_point():
            check_features(own, len(z), k, heads[k])


def _probe(network: ZippedModule, heads: Sequence[Ending]) -> fx.GraphModule:
    """The network, returning copies of what the last linear calls read, and the logits."""
    graph = copy.deepcopy(network.graph)
    twins = dict(zip(network.graph.nodes, graph.nodes, strict=True))
    seen = []
    for head in heads:
        with graph.inserting_before(twins[head.call]):
            seen.append(graph.call_method("clone", (twins[head.source],)))
    graph.output_node().args = ((tuple(seen), tuple(twins[head.logits] for head in heads)),)
    return fx.GraphModule(network, graph)


def _check(own: Tensor, logits: Any, k: int, head: Ending, index: int) -> None:
    real = isinstance(logits, Tensor) and logits.is_floating_point()
    check_logits(logits.shape if real else None, k)
    check_features(own, len(logits), k, head)
    if bad := int((~own.isfinite()).flatten(1).any(0).sum()):
        raise not_finite(bad, head.source.name, f"head {k}", index)
    if bad := int((~logits.amax(1).isfinite()).sum()):
        raise DataError(
            f"The greatest logit of every input must be finite; head {k} gave {bad} that are not on batch {index} of "
            "`data`."
        )


def _emit(network: ZippedModule, heads: Sequence[Ending], found: Shifts) -> None:
    """Write the shifts into the graph. In place."""
    graph = network.graph
    for k, (head, *values) in enumerate(zip(heads, found.directions, found.means, found.offsets, strict=True)):
        names = list(_free_names(network, k))
        device = _device(network, head.call)
        for name, value in zip(names, values, strict=True):
            network.register_buffer(name, value.float().to(device))
        with graph.inserting_before(head.call):
            tables = [graph.get_attr(name) for name in names]
            amount = graph.call_function(shift, (head.source, *tables, head.axis))
        output = graph.output_node()
        with graph.inserting_before(output if head.wrapper is None else head.wrapper):
            lifted = graph.call_function(lift, (head.logits, amount))
        for node in (*tables, amount, lifted):
            mark(node, Provenance(f"head {k}"))
        if head.wrapper is None:
            outputs = list(network.heads)
            outputs[k] = fx.node.map_arg(outputs[k], _always(lifted))
            network.return_heads(outputs)
        else:
            head.wrapper.replace_input_with(head.logits, lifted)
    graph.lint()
    network.recompile()


def _device(network: fx.GraphModule, call: fx.Node) -> torch.device | None:
    """Where the weights of a call lie."""
    held = [attribute(network, str(call.target))] if call.op == "call_module" else []
    tensors = [t for module in held for t in (*module.parameters(), *module.buffers())]
    return next((t.device for t in (*tensors, *network.parameters(), *network.buffers())), None)


def _always(node: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda _: node


def _free_names(network: nn.Module, k: int) -> Iterator[str]:
    """Names of three buffers that the network does not have yet: a network may be calibrated again."""
    number = 0
    while hasattr(network, f"joint_{k}_{number}_direction"):
        number += 1
    yield from (f"joint_{k}_{number}_{what}" for what in ("direction", "mean", "offset"))

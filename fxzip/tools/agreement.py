"""Is a zip good? How far its heads agree with their originals, and how accurate they are on labelled inputs.

Head k is compared with model k on the same inputs, by the figures of `calibration/agreement.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.agreement import Comparison, HeadAgreement
from ..calibration.batches import as_tensors, call_of
from ..calibration.data_forms import MAX_BATCHES, Source
from ..calibration.rejections import describe, run_on
from ..calibration.sources import PerModel
from ..errors import DataError, InputError
from ..rewriting.module import ZippedModule
from ..tracing import modes_kept, plain_context, run_eager
from ..tracing.calls import Call, batch_size, leaves, moved
from ..tracing.option_values import checked


@dataclass(frozen=True)
class Agreement:
    """How far the heads of a zip agree with their originals; printable.

    Attributes:
        heads: one for each model.
        inputs: number of inputs that each head was compared on.
        tasks: names of the tasks; empty where they have none.
    """

    heads: tuple[HeadAgreement, ...]
    inputs: tuple[int, ...]
    tasks: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = []
        for k, (head, inputs) in enumerate(zip(self.heads, self.inputs, strict=True)):
            name = self.tasks[k] if self.tasks else f"head {k}"
            lines.append(f"{name}: {head} on {inputs} inputs")
        return "\n".join(lines)


@plain_context()
@checked
def agreement(
    zipped: nn.Module, models: Sequence[nn.Module] | Mapping[str, nn.Module], data: Any,
    *, max_batches: int = MAX_BATCHES,
) -> Agreement:  # fmt: skip
    """How far each head of a zipped network agrees with its original.

    >>> import fxzip, torch
    >>> models = {name: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for name in ("low", "high")}
    >>> x = torch.randn(64, 4)
    >>> both = fxzip.side_by_side(list(models.values()), x)
    >>> print(agreement(both, models, [x]))
    head 0: same class 100.0 %, relative error 0, R² 1.000 on 64 inputs
    head 1: same class 100.0 %, relative error 0, R² 1.000 on 64 inputs

    Args:
        zipped: of `compile_zip` or `side_by_side`.
        models: the originals, in their order or by the names of the tasks. They are run in eval mode.
        data: batches that no fit has seen: tensors, tuples or lists that begin with the inputs, or dicts of inputs. Or
            `fxzip.PerModel` of one such iterable for each model, or a dict of them by task; then a head is compared on
            its own inputs.
        max_batches: most batches of each source.

    Raises:
        InputError: the numbers of heads, models and sources differ. DataError: there is no batch, or the models do not
            take one.
    """
    network, tasks, sources = _prepared(zipped, data)
    originals = list(models.values()) if isinstance(models, Mapping) else list(models)
    if not all(isinstance(model, nn.Module) for model in originals):
        found = next(model for model in originals if not isinstance(model, nn.Module))
        raise InputError(f"`models` must hold the networks that were zipped; found a `{type(found).__name__}`.")
    if len(originals) != len(network.heads):
        raise InputError(f"`models` must be one for each of the {len(network.heads)} heads; found {len(originals)}.")
    sums = [Comparison() for _ in originals]
    with modes_kept(network, *originals):
        for model in (network, *originals):
            model.eval()
        for source, index, call, _ in _calls(network, sources, max_batches):
            outputs = _outputs(_run(network, call, index, network))
            for k, (own, model) in enumerate(zip(sums, originals, strict=True)):
                if len(sources) == 1 or source == k:
                    own.add(leaves([outputs[k]]), leaves([_run(model, call, index, network)]), batch_size(call) or 1)
    return Agreement(tuple(own.result() for own in sums), tuple(own.inputs for own in sums), tasks)


@dataclass(frozen=True)
class Evaluation:
    """Accuracies of the heads on labelled inputs, in [0, 1]; printable.

    Attributes:
        per_task: of each head on the inputs of its task.
        inputs: number of inputs of each task.
        tasks: names of the tasks; empty where they have none.
    """

    per_task: tuple[float, ...]
    inputs: tuple[int, ...]
    tasks: tuple[str, ...] = ()

    @property
    def average(self) -> float:
        """The mean over tasks."""
        return sum(self.per_task) / len(self.per_task)

    def __str__(self) -> str:
        names = self.tasks or tuple(f"head {k}" for k in range(len(self.per_task)))
        rows = zip(names, self.per_task, self.inputs, strict=True)
        return "\n".join(f"{name}: {100 * share:.2f} % of {inputs} inputs" for name, share, inputs in rows)


@plain_context()
@checked
def evaluate(zipped: nn.Module, data: Any, *, max_batches: int = MAX_BATCHES) -> Evaluation:
    """Accuracy of each head of classifiers on labelled inputs of its task.

    >>> import fxzip, torch
    >>> models = [nn.Linear(4, 3), nn.Linear(4, 2)]
    >>> x = torch.randn(32, 4)
    >>> labelled = fxzip.PerModel(*([(x, model(x).argmax(1))] for model in models))
    >>> evaluate(fxzip.side_by_side(models, x), labelled).per_task
    (1.0, 1.0)

    Args:
        zipped: of `compile_zip` or `side_by_side`; every head gives logits [batch, classes].
        data: `fxzip.PerModel`, or a dict by task, of an iterable of batches (inputs, labels) for each head; labels
            [batch] count the classes of that head from 0.
        max_batches: most batches of each source.

    Raises:
        InputError: there is not one source for each head, or a batch is no pair of inputs and labels. DataError: a
            source has no batch.
    """
    network, tasks, sources = _prepared(zipped, data)
    if len(sources) != len(network.heads):
        raise InputError(
            f"`evaluate` needs labelled data for each of the {len(network.heads)} heads, `fxzip.PerModel` or a dict by "
            f"task; found {len(sources)} source{'s' if len(sources) > 1 else ''}."
        )
    right, rows = [0] * len(sources), [0] * len(sources)
    with modes_kept(network):
        network.eval()
        for source, index, call, labels in _calls(network, sources, max_batches):
            found = leaves([_outputs(_run(network, call, index, network))[source]])
            if (
                not isinstance(labels, Tensor)
                or len(found) != 1
                or found[0].ndim != 2
                or labels.shape != found[0].shape[:1]
            ):
                raise InputError(
                    "`evaluate` needs batches (inputs, labels) with labels [batch], and heads that give [batch, "
                    f"classes]; found {'no labels' if labels is None else describe(labels)} for outputs "
                    f"{[tuple(y.shape) for y in found]}."
                )
            right[source] += int((found[0].argmax(1).cpu() == labels.cpu()).sum())
            rows[source] += len(labels)
    return Evaluation(tuple(hits / n for hits, n in zip(right, rows, strict=True)), tuple(rows), tasks)


def _prepared(zipped: nn.Module, data: Any) -> tuple[ZippedModule, tuple[str, ...], list[Iterable[Any]]]:
    """The network, the names of its tasks, and the sources of batches in the order of its heads."""
    if not isinstance(zipped, ZippedModule):
        raise InputError(f"This takes a network of `compile_zip` or `side_by_side`; found `{type(zipped).__name__}`.")
    tasks = zipped.tasks
    if isinstance(data, Mapping):
        if not tasks or set(data) != set(tasks):
            known = ", ".join(map(repr, tasks)) or "none"
            raise InputError(f"`data` by name must have the names of the tasks, {known}; found {list(data)}.")
        return zipped, tasks, [data[task] for task in tasks]
    if isinstance(data, PerModel):
        if len(data) != len(zipped.heads):
            raise InputError(f"`data` must be one source for each of {len(zipped.heads)} heads; found {len(data)}.")
        return zipped, tasks, list(data)
    return zipped, tasks, [[data] if isinstance(data, Tensor) else data]


def _calls(network: ZippedModule, sources: Sequence[Iterable[Any]], limit: int) -> Iterator[tuple[int, int, Call, Any]]:
    """The batches of all sources as calls, with the number of their source, their own, and labels where they have any.

    Raises:
        DataError: a source gives no batch, or one of another form than that of the inputs of the sample.
    """
    for number, source in enumerate(sources):
        sample = _sample(network, by_name=False)
        index, rows = -1, 0
        for index, given in enumerate(Source(source, sample, limit, lambda _: None)):
            batch = as_tensors(given)
            by_name = isinstance(batch, Mapping)
            own = _sample(network, by_name=True) if by_name else sample
            call = moved(call_of(batch, index, own), own) if leaves(own) else _taken(batch, len(own.args))
            size = batch_size(call)
            if size == 0:
                continue
            rows += size or 1
            yield number, index, call, None if by_name else _labels(batch, call)
        if index < 0:
            raise DataError("`data` must yield at least one batch; a source gave none.")
        if not rows:
            raise DataError(f"`data` must yield at least one input; all {index + 1} batches of a source are empty.")


def _taken(batch: Any, inputs: int) -> Call:
    """A batch as a call of a network of which only the number of inputs is known."""
    if isinstance(batch, Mapping):
        return Call((), dict(batch))
    items = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if len(items) < inputs:
        raise DataError(f"A batch must begin with the {inputs} inputs of the network; found {len(items)}.")
    return Call(tuple(items[:inputs]), {})


def _labels(batch: Any, call: Call) -> Any:
    """What lies behind the inputs in a batch; None if nothing does."""
    if not isinstance(batch, (tuple, list)):
        return None
    taken = 1 if isinstance(batch[0], (tuple, list)) and isinstance(call.args[0], Tensor) else len(call.args)
    return batch[taken] if len(batch) > taken else None


def _sample(network: ZippedModule, *, by_name: bool) -> Call:
    """A call of the form that the network was traced with, of zeros; where its report has no shapes, of what it takes
    nothing is known but the number of inputs."""
    names = [str(node.target) for node in network.graph.nodes if node.op == "placeholder"]
    known = network.meta.get("fxzip_report", {}).get("inputs") or []
    device = next((value.device for value in (*network.parameters(), *network.buffers())), torch.device("cpu"))
    values: list[Any] = [
        torch.zeros((), dtype=getattr(torch, own["dtype"]), device=device).expand(own["shape"]) for own in known
    ] or [None] * len(names)
    return Call((), dict(zip(names, values, strict=True))) if by_name else Call(tuple(values), {})


def _run(model: nn.Module, call: Call, index: int, network: ZippedModule) -> Any:
    """What a model, or the network, gives on a batch."""
    sample = _sample(network, by_name=bool(call.kwargs))
    return run_on(lambda: run_eager(model, call), call, index, sample if leaves(sample) else call)


def _outputs(returned: Any) -> list[Any]:
    return list(returned.values()) if isinstance(returned, Mapping) else list(returned)

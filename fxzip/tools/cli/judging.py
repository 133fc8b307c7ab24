"""Labelled data as `fxzip.evaluate` takes them, and networks in ONNX files as it takes those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxzip.rewriting.module import ZippedModule

from ...errors import RecipeError
from .packages import first_line, needed
from .sources import Moved, Source


@dataclass(frozen=True, eq=False)
class _Labelled:
    """Batches (inputs ..., labels), with inputs in the order that a network takes them."""

    batches: Any
    inputs: tuple[str, ...]
    classes: int | None
    where: str

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for held, labels in self.batches:
            if (
                self.classes is not None
                and len(labels)
                and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes
            ):
                raise RecipeError(
                    f"`{self.where}`: labels must count the {self.classes} classes of the head from 0; found "
                    f"{int(labels.min())} to {int(labels.max())}."
                )
            if isinstance(held, Mapping):
                missing = [name for name in self.inputs if name not in held]
                if missing:
                    raise RecipeError(f"`{self.where}` has no {', '.join(missing)}, which the network takes.")
                yield (*(held[name] for name in self.inputs), labels)
            else:
                yield (*held, labels) if isinstance(held, (tuple, list)) else (held, labels)


def labelled_batches(network: nn.Module, sources: Mapping[str, Source], device: torch.device) -> dict[str, Any]:
    """The batches of each task for `fxzip.evaluate`.

    Raises:
        RecipeError: a source has not as many classes as its head; found when the batches are read: other labels.
    """
    graph: Any = network.graph
    inputs = tuple(str(node.target) for node in graph.nodes if node.op == "placeholder")
    found: dict[str, Any] = {}
    for place, (task, source) in enumerate(sources.items()):
        classes = _classes(network, place, Moved(source.batches, device), inputs)
        if source.classes and classes is not None and len(source.classes) != classes:
            raise RecipeError(
                f"`{task}`: the data has {len(source.classes)} classes, the head {classes} outputs; which is which "
                "must be known. Name all classes in the order of the outputs, one a line, in a file under `classes`."
            )
        found[task] = _Labelled(Moved(source.batches, device), inputs, classes, task)
    return found


def _classes(network: nn.Module, place: int, batches: Any, inputs: tuple[str, ...]) -> int | None:
    """How many outputs the head of a task has; None where it is no classifier."""
    first = next(iter(_Labelled(batches, inputs, None, "data")), None)
    if first is None:
        return None
    with torch.no_grad():
        outputs = network.eval()(*(value[:1] for value in first[:-1]))
    head = list(outputs.values() if isinstance(outputs, Mapping) else outputs)[place]
    values = [value for value in (head.values() if isinstance(head, Mapping) else [head]) if isinstance(value, Tensor)]
    return int(values[0].shape[1]) if len(values) == 1 and values[0].ndim == 2 else None


class _Session(nn.Module):
    """A file of ONNX as a module, run by onnxruntime."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.names = [entry.name for entry in session.get_inputs()]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = {name: value.detach().cpu().numpy() for name, value in zip(self.names, inputs, strict=True)}
        return tuple(torch.from_numpy(np.asarray(found)) for found in self.session.run(None, given))


def onnx_network(path: Path) -> ZippedModule:
    """A zipped network that `fxzip export` has written as ONNX, run by onnxruntime, with a head for each output.

    Raises:
        RecipeError: onnxruntime is missing, or the file is no ONNX.
    """
    runtime: Any = needed("onnxruntime", "onnx")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has exceptions of its own
        raise RecipeError(f"`{path}` cannot be read as ONNX: {first_line(error)}") from error
    root = nn.Module()
    root.add_module("session", module := _Session(session))
    graph = fx.Graph()
    inputs = tuple(graph.placeholder(name) for name in module.names)
    outputs = graph.call_module("session", inputs)
    heads = [graph.call_method("__getitem__", (outputs, k)) for k in range(len(session.get_outputs()))]
    names = [entry.name for entry in session.get_outputs()]
    unnamed = names == [f"head_{k}" for k in range(len(names))]
    graph.output(tuple(heads) if unnamed else dict(zip(names, heads, strict=True)))
    return ZippedModule(root, graph).eval()

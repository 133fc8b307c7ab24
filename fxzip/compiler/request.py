"""What a request consists of, in words and checksums: two that say the same of it give the same zip."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.rules import RULES
from ..calibration import processes
from ..calibration.sources import Calibration
from ..refit import LeastSquares, fit_least_squares
from ..tracing import Program
from ..tracing.calls import leaves
from ..tracing.tensor_bytes import bytes_of
from .arguments import Given
from .options import CutRequest, Options, Recipe

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


_DERIVED = {"refit_name", "data_free", "automatic", "nearness", "by_position", "compared_by"}
"""What follows from other options."""

_FREE = {"memory"}
"""Settings of refits on which nothing that comes of them depends."""


def facts_of(given: Given, options: Options, recipe: Recipe, cut: CutRequest) -> dict[str, str]:
    """Versions, models, sample input and options.

    >>> given = Given.of((nn.Linear(2, 1), nn.Linear(2, 1), torch.ones(1, 2)))
    >>> from .options import FixedCut
    >>> facts = facts_of(given, Options(), Recipe.of("zip", "repair", calibrated=True), FixedCut("layer3"))
    >>> facts["`until`"], facts["`method`"], len(facts["model 1"])
    ("FixedCut(until='layer3')", 'Zip(alpha=1.0, beta=1.0)', 64)
    """
    facts = {"version of fxzip": _version(), "version of PyTorch": str(torch.__version__)}
    facts["number of processes"] = str(processes.count())
    for k, network in enumerate(given.networks):
        facts[f"model `{given.tasks[k]}`" if given.tasks else f"model {k}"] = _of_network(network)
    facts["`sample_input`"] = digest(leaves(given.call))
    facts["`until`"] = _text(cut)
    if recipe.refit is fit_least_squares:
        recipe = replace(recipe, refit=LeastSquares())  # another bound on memory may be asked for when it is resumed
    for part in (recipe, options):
        facts |= {f"`{own.name}`": _text(getattr(part, own.name)) for own in fields(part) if own.name not in _DERIVED}
    if recipe.automatic:
        facts["`method`"] += ", as it was left open"
    return facts


def facts_of_data(calibration: Calibration) -> dict[str, str]:
    """What the batches hold, in their order; one pass."""
    sums = [hashlib.sha256() for _ in calibration.sources]
    for source, call in calibration.unmoved("looking at the data").by_source():
        sums[source].update(digest(leaves(call)).encode())
    return {"data": " ".join(own.hexdigest() for own in sums)}


def facts_of_graphs(programs: Iterable[Program]) -> dict[str, str]:
    """What the code of the models computes, whatever their parameters are."""
    return {f"graph of model {k}": _checksum(program.module.code) for k, program in enumerate(programs)}


def digest(tensors: Iterable[Tensor]) -> str:
    """A checksum of tensors: values, dtypes and shapes.

    >>> digest([torch.ones(2)]) == digest([torch.ones(2).double()])
    False
    """
    result = hashlib.sha256()
    for value in tensors:
        result.update(f"{value.dtype} {tuple(value.shape)} {value.device.type}".encode())
        result.update(bytes_of(value))
    return result.hexdigest()


def _of_network(network: nn.Module) -> str:
    both = (*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False))
    names = " ".join(name for name, _ in both)
    return _checksum(f"{type(network).__qualname__} {names} {digest(value for _, value in both)}")


def _text(value: Any) -> str:
    """An option in words that are the same in another process."""
    if isinstance(value, Tensor):
        return digest([value])
    if isinstance(value, Mapping):
        changed = {k: v for k, v in value.items() if not (k in RULES and RULES[k] is v)}
        return "{" + ", ".join(f"{k!r}: {_text(changed[k])}" for k in sorted(changed, key=str)) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_text, value)) + "]"
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in fields(value) if field.name not in _FREE}
        return f"{type(value).__name__}(" + ", ".join(f"{k}={_text(v)}" for k, v in own.items()) + ")"
    if not callable(value) or isinstance(value, nn.Module):
        return _ADDRESS.sub("", repr(value))
    return _of_function(value)


def _of_function(function: Callable[..., Any]) -> str:
    own = function if hasattr(function, "__qualname__") else type(function)
    return f"{own.__module__}.{own.__qualname__}"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _version() -> str:
    return str(getattr(sys.modules[__name__.partition(".")[0]], "__version__", "unknown"))

"""Statistics of normalisations as they are, so that the zipped network computes the same in `train()`.

A BatchNorm in evaluation is affine, and the same map for any mean μ' and variance σ'² if scale and shift follow:

    γ (x - μ) / √(σ² + ε) + β  =  γ' (x - μ') / √(σ'² + ε) + β',
    γ' = γ √((σ'² + ε) / (σ² + ε)),      β' = β + γ (μ' - μ) / √(σ² + ε).

Merging averages statistics, REPAIR corrects scales and shifts around them, least squares makes BatchNorms the
identity: what is stored then is not what the BatchNorm reads. In evaluation that does not matter, but in training it
normalises by the statistics of the batch, and the network would be another function. So after every refit μ' and σ'²
become mean and variance of what the BatchNorm of the zipped network reads, over all calibration data, and scale and
shift follow. Least squares has seen what most of them read on its way (`readings`); a pass shows the others.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ..calibration import processes
from ..rewriting.batchnorm_affine import restate
from ..rewriting.module import ZippedModule
from ..tracing import TOLERANCE, quiet_execution
from ..tracing.aten_calls import run
from ..tracing.calls import Call
from .linear_calls.norms import norms_of
from .readings import NO_READINGS, Reading, Readings
from .refitted import Refitted

_FEW = 16  # values of a feature, below which its variance is hardly known
_CONSTANT = 1e-12  # a variance below this share of the mean square is rounding
_UNMEASURED = (
    "no data was run, so normalisations keep merged statistics: in `train()`, where those of the batch are taken, "
    "the network may compute something else than in `eval()`"
)
_NEAR = 0.01  # share of the standard deviation, see `restate`


def record_statistics(zipped: ZippedModule, data: Iterable[Call]) -> ZippedModule:
    """The same network in evaluation, whose normalisations have stored the statistics of what they read. A new module.

    One pass over `data`.
    """
    return recorded_statistics(zipped, data).module


def recorded_statistics(zipped: ZippedModule, data: Iterable[Call], known: Readings = NO_READINGS) -> Refitted:
    """`record_statistics` with notes: they name what keeps other statistics.

    `known`: what normalisations read on `data`, where that was seen before; without others no pass is made.
    """
    result = copy.deepcopy(zipped)
    found, unseen = list[Reading](), list[Reading]()
    for norm, name in norms_of(result).items():
        if name in known.by_name:
            found.append(replace(known.by_name[name], norm=norm))
        else:
            unseen.append(Reading(norm, name))
            found.append(unseen[-1])
    if not found:
        return Refitted(result)
    batches = _watched(result, data, unseen) if unseen else known.batches
    batches = processes.before([batches])[1][0]
    if not batches:
        return Refitted(result, (_UNMEASURED,))
    for own in found:
        own.join()
    shared = _held_twice(result)
    for own in found:
        with torch.no_grad():
            own.wrong = own.wrong or _record(own, shared, batches)
    return Refitted(result, tuple(_notes(found)))


def _watched(network: ZippedModule, data: Iterable[Call], unseen: Sequence[Reading]) -> int:
    """Run the network, so that normalisations are seen; the number of batches."""
    hooks = [own.norm.register_forward_pre_hook(_taking(own), with_kwargs=True) for own in unseen]
    batches = 0
    try:
        with quiet_execution():
            for call in data:
                run(network, call)
                batches += 1
    finally:
        for hook in hooks:
            hook.remove()
    return batches


def _taking(own: Reading) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own.take(args[0] if args else next(iter(kwargs.values()), None))

    return hook


def _held_twice(network: nn.Module) -> set[int]:
    """Tensors that several modules hold, or that the graph reads by themselves."""
    times: Counter[int] = Counter()
    for module in network.modules():
        times.update({id(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None})
    if isinstance(network, fx.GraphModule):
        for node in network.graph.nodes:
            if node.op == "get_attr":
                times.update([id(fx.graph_module._get_attr(network, str(node.target)))] * 2)
    return {held for held, count in times.items() if count > 1}


def _record(own: Reading, shared: set[int], batches: int) -> str:
    """Store the statistics of one normalisation; why not, if that cannot be done."""
    norm = own.norm
    if not own.calls:
        return "" if own.wrong else "nothing calls it"
    if any(id(held) in shared for held in (norm.running_mean, norm.running_var, norm.weight, norm.bias)):
        return "its tensors belong to other calls, too"
    mean, variance = own.statistics()
    if not bool(mean.isfinite().all() and variance.isfinite().all()):
        return "what it reads is not finite"
    assert own.rows is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    before, held = norm(own.rows), (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    usual = _normalises(norm, own.rows)
    if usual:
        _move(norm, mean, variance)
    if not usual or not _near(norm(own.rows), before, before):
        norm.running_mean, norm.running_var, norm.weight, norm.bias = held
        norm.affine = norm.weight is not None
        return f"`{type(norm).__name__}` does not normalise what it is given, by these statistics alone"
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(batches)
    return ""


def _near(found: Tensor, expected: Tensor, of: Tensor) -> bool:
    """Whether two tensors differ by rounding, in values of the size of a third."""
    return bool((found - expected).abs().amax() <= 10 * TOLERANCE.get(of.dtype, 2e-2) * of.abs().amax())


def _normalises(norm: _NormBase, rows: Tensor) -> bool:
    """Whether what a copy keeps of some rows in training are the rows' own statistics: a subclass may do more."""
    if rows[:, 0].numel() < 2 or (isinstance(norm, _InstanceNorm) and rows[0, 0].numel() < 2):
        return True
    probe = copy.deepcopy(norm).train()
    probe.momentum = 1.0
    probe(rows)
    assert probe.running_mean is not None
    mean = rows.mean([a for a in range(rows.ndim) if a != 1], dtype=probe.running_mean.dtype)
    return _near(probe.running_mean, mean, rows)


def _move(norm: _NormBase, mean: Tensor, variance: Tensor) -> None:
    """Store these statistics, but for the variance of features that do not vary: those are only shifted."""
    assert norm.running_var is not None
    constant = variance <= _CONSTANT * (variance + mean.square())
    restate(norm, mean, torch.where(constant, norm.running_var.double(), variance), near=_NEAR)


def _notes(found: list[Reading]) -> list[str]:
    notes = []
    for why in dict.fromkeys(own.wrong for own in found if own.wrong):
        names = ", ".join(f"`{own.name}`" for own in found if own.wrong == why)
        notes.append(f"statistics are not those of the calibration data, since {why}: {names}")
    few = [own for own in found if not own.wrong and own.sums.count < _FEW]
    if few:
        least = int(min(own.sums.count for own in few))
        names = ", ".join(f"`{own.name}`" for own in few[:4]) + (", ..." if len(few) > 4 else "")
        notes.append(
            f"statistics rest on very few values, {least} of each feature: in `train()` the network may be another "
            f"function than in `eval()` ({names}); larger `data` mends that"
        )
    return notes

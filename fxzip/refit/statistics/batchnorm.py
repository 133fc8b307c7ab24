"""Refit by new BatchNorm statistics: the running ones of averaged networks are not those of the average."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...calibration import processes
from ...calibration.rejections import not_finite
from ...rewriting.module import ZippedModule
from ...rewriting.zip_plan import ZipPlan
from ...tracing import quiet_execution
from ...tracing.aten_calls import run
from ...tracing.calls import Call
from ..linear_calls.norms import norms_of
from ..refitted import Refitted, noting


@noting
def reset_batchnorm(zipped: ZippedModule, _plan: ZipPlan, data: Iterable[Call]) -> Refitted:
    """BatchNorm statistics re-estimated on `data`: the mean over batches, in training mode. A new module."""
    result = copy.deepcopy(zipped)
    norms = {norm: name for norm, name in norms_of(result).items() if isinstance(norm, _BatchNorm)}
    if not norms:
        return Refitted(result, ("the networks have no BatchNorm with statistics: the refit changed nothing",))

    reading = _Reading(result)
    momenta = {norm: norm.momentum for norm in norms}
    hooks = [norm.register_forward_pre_hook(reading.check(name), with_kwargs=True) for norm, name in norms.items()]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        with quiet_execution():
            for reading.batch, call in enumerate(data):
                run(result, call, only=lambda node: node.op != "output")
    finally:
        for hook in hooks:
            hook.remove()

    for norm, momentum in momenta.items():
        _average(norm)
        norm.momentum = momentum
        norm.eval()
    return Refitted(result)


def _average(norm: _BatchNorm) -> None:
    """The mean over the batches of all processes, of means over those of each."""
    if processes.count() == 1:
        return
    assert norm.num_batches_tracked is not None
    own = norm.num_batches_tracked.double()
    every = processes.total(own)
    for held in (norm.running_mean, norm.running_var):
        if held is not None:
            held.copy_(processes.total(held.double() * own) / every)
    norm.num_batches_tracked.copy_(every)


class _Reading:
    """Looks at what BatchNorms read: statistics that are not finite once would stay so."""

    def __init__(self, net: ZippedModule) -> None:
        self.batch = 0
        self.sources = {str(n.target): n.all_input_nodes[0].name for n in net.graph.nodes if n.op == "call_module"}

    def check(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """What to do in front of the BatchNorm of that name."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value: Tensor = args[0] if args else kwargs["input"]
            sums = value.sum([a for a in range(value.ndim) if a != 1], dtype=torch.float64)
            if bad := int((~sums.isfinite()).sum()):
                raise not_finite(bad, self.sources.get(name, name), "the zipped network", self.batch)

        return hook

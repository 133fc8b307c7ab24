"""Refit by new BatchNorm statistics: the running ones of averaged networks are not those of the average."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from ...calibration.batches import not_finite
from ...partition.alignment import attribute
from ...rewriting.module import ZippedModule, part_of
from ...rewriting.zip_plan import ZipPlan
from ...tracing import flat_inputs, quiet_execution
from ...tracing.calls import Call


class _Estimating(fx.Interpreter):
    """Runs the zipped network and looks at what its BatchNorms read."""

    def __init__(self, module: ZippedModule, norms: Sequence[nn.Module]) -> None:
        super().__init__(module)
        self.norms, self.number = norms, 0

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return None
        if n.op == "call_module" and any(attribute(self.module, str(n.target)) is norm for norm in self.norms):
            value = self.env[n.all_input_nodes[0]]
            sums = value.sum([a for a in range(value.ndim) if a != 1], dtype=torch.float64)
            if bad := int((~sums.isfinite()).sum()):
                raise not_finite(bad, n.all_input_nodes[0].name, "the zipped network", self.number)
        return super().run_node(n)


def reset_batchnorm(zipped: ZippedModule, _plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
    """BatchNorm statistics re-estimated on `data`: the mean over batches, in training mode. A new module."""
    result = copy.deepcopy(zipped)
    shared = [n for n in result.graph.nodes if n.op == "call_module" and not part_of(n).startswith("stem ")]
    called = [attribute(result, str(node.target)) for node in shared]
    norms = [norm for norm in dict.fromkeys(called) if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        result.meta["fxzip_fit"] = "the networks have no BatchNorm with statistics: the refit changed nothing"
        return result
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    run = _Estimating(result, norms)
    with quiet_execution():
        for run.number, call in enumerate(data):
            run.run(*flat_inputs(result, call))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return result

"""RegMean (Jin et al., ICLR 2023, arXiv 2212.09849, section 3): the linear call nearest to those of all models.

For inputs X_k that model k sees in its own run, with Gram matrix G_k = X_kᵀ X_k, the weights that minimise
Σ_k ‖X_k W - X_k W_k‖² are

    W* = (Σ_k G̃_k)⁻¹ Σ_k G̃_k W_k,        G̃_k = α G_k + (1 - α) diag(G_k)

with the off-diagonal entries shrunk by α < 1. Linear calls and convolutions (through their patches), wherever they are
made, inside leaf modules too; everything else, biases too, is the mean, as the zip has it. It asks for networks whose
features correspond one to one: fine-tunes of one initialisation (method "average"), or networks aligned by
permutations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration.sources import with_sources
from ..errors import OptionError
from ..matching.linalg import ridged_cholesky
from ..rewriting.module import ZippedModule, part_of, set_tensor
from ..rewriting.paired_parameters import aligned_tensors, check_paired
from ..rewriting.zip_plan import ZipPlan
from ..tracing import quiet_execution
from ..tracing.aten_calls import AtenCall, run
from ..tracing.calls import Call
from .linear_calls.kernels import Kernel, sampled_places
from .linear_calls.parameter_uses import survey
from .linear_calls.units import Unit, find_units


@dataclass(frozen=True)
class RegMean:
    """The refit with its settings.

    >>> import fxzip
    >>> from torch import nn
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    >>> x = torch.randn(64, 4)
    >>> fxzip.compile_zip(a, b, x, data=[x], method="average", refit=RegMean(alpha=0.5), progress=False).report["refit"]
    RegMean(alpha=0.5, positions=4096)

    Attributes:
        alpha: how much of the off-diagonal entries of a Gram matrix counts, in [0, 1]; the paper's 0.9.
        positions: sampled outputs per batch and call.
    """

    alpha: float = 0.9
    positions: int = 4096

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"`RegMean` needs 0 <= alpha <= 1; found alpha={self.alpha}. The paper's is 0.9.")

    def __call__(self, zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call]) -> ZippedModule:
        """Refit the trunk. A new module; one pass over `data` per model.

        With data per model, G_k is taken on the data of model k, as in the paper.
        """
        check_paired(plan, "`RegMean`")
        result, own = copy.deepcopy(zipped), copy.deepcopy(zipped)
        found: dict[_Place, _Sum] = {}
        sample = plan.trunk.alignment.programs[0].call
        models = len(plan.trunk.alignment.programs)
        with quiet_execution():
            for k in range(models):
                for name, value in aligned_tensors(plan, k).items():
                    set_tensor(own, f"trunk.{name}", value)
                numbered = list(with_sources(data)[0])
                several = len({source for source, _ in numbered}) == models
                units = _units(own, sample)
                grams = _Grams(own, units.values(), self.positions)
                for source, call in numbered:
                    if not several or source == k:
                        grams.take(call)
                for place, gram in grams.found.items():
                    found.setdefault(place, _Sum()).add(self._shrunk(gram), _kernel(units[place]).flat)
            for place, unit in _units(result, sample).items():
                if place in found:
                    _kernel(unit).put(found[place].solution())
        return result

    def _shrunk(self, gram: Tensor) -> Tensor:
        return self.alpha * gram + (1 - self.alpha) * torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))


@dataclass
class _Sum:
    """Σ G̃_k and Σ G̃_k W_k, [groups, inputs, inputs] and [groups, inputs, outputs], and Σ W_k."""

    gram: Tensor | None = None
    product: Tensor | None = None
    weights: Tensor | None = None
    count: int = 0

    def add(self, gram: Tensor, flat: Tensor) -> None:
        weight = flat.transpose(1, 2)
        self.gram = gram if self.gram is None else self.gram + gram
        self.product = gram @ weight if self.product is None else self.product + gram @ weight
        self.weights = weight if self.weights is None else self.weights + weight
        self.count += 1

    def solution(self) -> Tensor:
        """[groups, outputs, inputs]. Inputs that are always zero keep the mean of the weights."""
        assert self.gram is not None
        assert self.product is not None
        assert self.weights is not None
        mean = self.weights / self.count
        scale = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=torch.finfo(torch.float64).tiny)
        factor, ridge = ridged_cholesky(self.gram, 1e-12, scale[:, :, 0])
        return torch.cholesky_solve(self.product + ridge * scale * mean, factor).transpose(1, 2)


_Place = tuple[str, int]
"""The first call of a unit: name of the node, and the call's number inside it."""


def _units(net: ZippedModule, sample: Call) -> dict[_Place, Unit]:
    """The linear calls of the trunk, inside leaf modules too."""
    nodes = {node for node in net.graph.nodes if part_of(node) == "trunk"}
    units, _ = find_units(net, survey(net, sample), nodes, still=True)
    return {(unit.sites[0].node.name, unit.sites[0].call): unit for unit in units if unit.kernel is not None}


def _kernel(unit: Unit) -> Kernel:
    assert unit.kernel is not None
    return unit.kernel


class _Grams:
    """Runs the trunk and sums up the Gram matrix of the inputs of every linear call."""

    def __init__(self, module: ZippedModule, units: Iterable[Unit], positions: int) -> None:
        self.module, self.positions = module, positions
        self.generator = torch.Generator().manual_seed(0)
        self.sites = {(site.node.name, site.call): (unit, site) for unit in units for site in unit.sites}
        self.found: dict[_Place, Tensor] = {}

    def take(self, call: Call) -> None:
        """A batch."""
        trunk = {node for node in self.module.graph.nodes if part_of(node) == "trunk"}
        run(self.module, call, on_call=self._see, only=trunk.__contains__)

    def _see(self, call: AtenCall) -> Any:
        out = call.make()
        unit, site = self.sites.get((call.node.name, call.number), (None, None))
        if unit is None or site is None or call.name != site.name:
            return out

        kernel, first = _kernel(unit), unit.sites[0]
        places = sampled_places(out.shape, kernel.axes, self.positions, self.generator)
        x = kernel.patches(call.args[site.at], places).transpose(0, 1)  # [groups, places, inputs]
        gram = (x.transpose(1, 2) @ x).double()
        place = first.node.name, first.call
        self.found[place] = self.found[place] + gram if place in self.found else gram
        return out

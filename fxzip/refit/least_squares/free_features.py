"""Which results of a trunk may come in other combinations of features than the merge says, and what reads them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, fx

from ...analysis.spaces import Layout
from ...matching.energy.energy import downstream_metric
from ...matching.moments import Moments
from ...rewriting.downstream import downstream_weights
from ...rewriting.zip_plan import ZipPlan
from .blocks import Blocks
from .dataflow import Flow, Function, Site
from .regression_targets import RegressionTarget, TrunkTargets

_ROWS = 20  # positions for each feature, of which correlations are taken


class Freedom:
    """Looks up nodes of the trunk.

    Args:
        plan: what was zipped.
        targets: of its trunk.
        flow: where the values of the zipped network go.
        fitted: the linear calls that will be fitted and read all features at once.
    """

    def __init__(self, plan: ZipPlan, targets: TrunkTargets, flow: Flow, fitted: Collection[Site]) -> None:
        self.plan, self.targets, self.flow, self.fitted = plan, targets, flow, fitted
        self._downstream = downstream_weights(plan.trunk, plan.reach)
        self._found: dict[fx.Node, Function | None] = {}

    def function(self, node: fx.Node) -> Function | None:
        """What acts on each feature of the result before it is read; None if its features are not free."""
        if node not in self._found:
            target = self.targets.at(node)
            found = None
            if target is not None and target.merging is not None and len(target.axes) == 1:
                layouts = target.merging.layouts
                if all(map(self._free, layouts, range(len(layouts)))):
                    found = self.flow.freedom(node, target.axes[0], self.fitted)
            self._found[node] = found
        return self._found[node]

    def _free(self, layout: Layout, k: int) -> bool:
        """Whether averaging the features of this run is exact, each by itself."""
        spaces = self.plan.trunk.spaces[k].spaces
        own = [spaces[s] if s >= 0 else None for s in layout.space.unique().tolist()]
        return all(s is not None and s.legality == "free" and s.tie is None and s.blocks is None for s in own)

    def metric(self, target: RegressionTarget, features: Blocks) -> Tensor:
        """How the originals read the features of a result: float64 [N, N], all models side by side.

        Args:
            target: of the result.
            features: of all models side by side, behind what acts on them, [places, N].
        """
        assert target.merging is not None
        sizes = [len(own.space) for own in target.merging.layouts]
        every = max(1, features.rows // (_ROWS * sum(sizes)))
        some = features.select(lambda own: own[::every].double())
        seen = Moments(float(some.rows), some.sum(), some.gram(), tuple(sizes))
        read = downstream_metric(seen, [self._weights(layout, k) for k, layout in enumerate(target.merging.layouts)])
        scale = seen.covariance.diagonal().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
        scale = torch.where(seen.alive, scale, 0.0)
        return read * scale[:, None] * scale

    def _weights(self, layout: Layout, k: int) -> list[Tensor]:
        """The weights of model k that read a run, [outputs, taps, n_k] each."""
        result = []
        for space in layout.space.unique().tolist():
            here = (layout.space == space).nonzero().flatten()
            for weight in self._downstream[space][k]:
                full = weight.new_zeros(*weight.shape[:2], len(layout.space))
                full[:, :, here.to(weight.device)] = weight[:, :, layout.feature[here].to(weight.device)]
                result.append(full)
        return result

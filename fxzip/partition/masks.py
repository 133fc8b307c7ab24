"""Masked weights: zeros that no value of the parameters fills, by which features do not depend on others.

A fixed mask, as in `W * mask`, is what makes a network autoregressive, or causal. As long as the zeros lie in the same
places for all features, as those of a kernel over positions do, any merge keeps them: W* is a sum of weights that are
all zero there. Where they differ from feature to feature, as in MADE (arXiv 1502.03509), a merge of two features
depends on what either of them depended on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.rules import varying
from ..analysis.spaces import FeatureSpaces
from ..tracing import Program, quiet_execution


def masked_weights(program: Program, computed: Mapping[str, Collection[fx.Node]]) -> frozenset[str]:
    """Those of the nodes whose values hold zeros, however the parameters are that they are computed from.

    Args:
        computed: nodes that do not depend on the input, each with the nodes that it needs.
    """
    signs = [_Random(program.module, sign) for sign in (1.0, -1.0)]
    result = set()
    with quiet_execution():
        for name, needed in computed.items():
            zero = [value == 0 for value in (own.value(name, needed) for own in signs) if isinstance(value, Tensor)]
            if len(zero) == len(signs) and bool(torch.stack(zero).all(0).any()):
                result.add(name)
    return frozenset(result)


class _Random(fx.Interpreter):
    """Runs nodes on random parameters; what is 0 and 1 only is a mask, and stays."""

    def __init__(self, module: fx.GraphModule, sign: float) -> None:
        super().__init__(module)
        self.sign = sign

    def value(self, name: str, needed: Collection[fx.Node]) -> Any:
        """The value of a node, with all that it needs; None: it cannot be had on such parameters."""
        env: dict[fx.Node, Any] = {}
        for node in self.graph_module.graph.nodes:
            if node not in needed:
                continue
            self.env = env
            try:
                env[node] = self.run_node(node)
            except Exception:  # a decomposition, say, that wants parameters of its own kind
                return None
        return next((value for node, value in env.items() if node.name == name), None)

    @property
    def graph_module(self) -> fx.GraphModule:
        assert isinstance(self.module, fx.GraphModule)
        return self.module

    def fetch_attr(self, target: str) -> Any:
        held = super().fetch_attr(target)
        if not isinstance(held, Tensor) or not held.is_floating_point() or bool(((held == 0) | (held == 1)).all()):
            return held.clone() if isinstance(held, Tensor) else held
        generator = torch.Generator(device="cpu").manual_seed(0)
        drawn = torch.randn(held.shape, generator=generator, dtype=torch.float32, device="cpu")
        return (self.sign * (drawn + drawn.sign())).to(held)


def differ_by_feature(zeros: Tensor, runs: Sequence[Tensor], spaces: FeatureSpaces) -> bool:
    """Whether the zeros of a parameter are in other places for some features of a matched space than for others.

    Args:
        zeros: bool, as the parameter.
        runs: its labels, a field per axis, from the spaces' labelling.
    """
    for run in runs:
        several = [s for s in spaces.space_of[spaces.klass[run[run > 0]]].unique().tolist() if s >= 0]
        moving = any(spaces.spaces[s].size > 1 for s in several)
        if moving and any(bool((zeros != zeros.narrow(axis, 0, 1)).any()) for axis in varying(run)):
            return True
    return False


def about_masks(nodes: Sequence[str]) -> str:
    """What a user should know of nodes whose masks the zip does not keep."""
    names = ", ".join(f"`{name}`" for name in nodes)
    return (
        f"the weights of {names} are masked, feature by feature, and the zip does not keep that: a merged feature "
        f"depends on all that its members depend on. Where outputs must not depend on some inputs, as in "
        f"autoregressive models, let each model keep these layers: `until` in front of {names}"
    )

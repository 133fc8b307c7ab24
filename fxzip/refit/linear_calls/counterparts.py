"""Which ATen calls of the originals are those of the zipped network.

A node makes the same linear calls in all networks, but not as the same ATen calls: a product is one call with its bias
(`addmm`) where its input lies in one run, and a copy, `mm` and `add` behind a transposition; and whether it lies in one
run differs between an original and a zip that gathers features in front of a head. So linear calls are counted within
their node, whatever they are made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from ...analysis import Labelling
from ...tracing import Program
from ..unfit import Unfit
from .parameter_uses import Survey, survey
from .units import Site, biases_apart


@dataclass(frozen=True)
class LinearCall:
    """Where a linear call begins and, with its bias, ends: node and number of the ATen call; `name`: of the last."""

    start: tuple[fx.Node, int]
    end: tuple[fx.Node, int]
    name: str
    biased: bool


def linear_calls(found: Survey) -> Mapping[str, Sequence[LinearCall]]:
    """The linear calls of a network by the name of their node, in order.

    >>> from torch import nn
    >>> import torch
    >>> from fxzip.tracing.calls import Call
    >>> net = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    >>> {name: len(own) for name, own in linear_calls(survey(net, Call((torch.ones(1, 2),), {}))).items()}
    {'_0': 1, '_2': 1}
    """
    uses = dict(enumerate(found.uses))
    result: dict[str, list[LinearCall]] = {}
    for number, use in uses.items():
        if use.kernel is not None:
            last = uses[biases_apart(uses, [number]).get(number, number)]
            biased = use.kernel.bias is not None or last is not use
            call = LinearCall((use.node, use.call), (last.node, last.call), last.name, biased)
            result.setdefault(use.node.name, []).append(call)
    return result


@dataclass(frozen=True, eq=False)
class Counterparts:
    """The linear calls of one original, looked up by those of the zipped network.

    Attributes:
        zipped: what the run of the zipped network showed.
        program: the original; it is run on its sample when it is first asked for.
    """

    zipped: Survey
    program: Program

    @cached_property
    def _own(self) -> Mapping[str, Sequence[LinearCall]]:
        return linear_calls(survey(self.program.module, self.program.small_call))

    @cached_property
    def _theirs(self) -> Mapping[str, Sequence[LinearCall]]:
        return linear_calls(self.zipped)

    def of(self, site: Site, name: str, *, biased: bool) -> LinearCall:
        """The call of the original's node `name` that a call of the zipped network stands for.

        Raises:
            Unfit: there is none that computes the same.
        """
        mine, own = self._theirs.get(site.node.name, ()), self._own.get(name, ())
        ranks = [rank for rank, call in enumerate(mine) if call.start == (site.node, site.call)]
        if len(mine) != len(own) or not ranks or own[ranks[0]].biased != biased:
            raise Unfit("an original makes other linear calls there")
        return own[ranks[0]]


def labels_at(label: Labelling, node: str, call: int | None) -> Sequence[Tensor]:
    """The fields of what a node returns, or of the result of a linear call inside it."""
    if call is None:
        return label.fields.get(node, ())
    found = {id(s.labels): s.labels for s in label.sites if (s.node, s.call, s.arg) == (node, call, -1)}
    return list(found.values())

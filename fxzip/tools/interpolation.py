"""The line between two networks, after the second has been relabelled into the basis of the first.

With features matched by a permutation P of each space, θ_b' is θ_b with every written axis moved by P and every axis
that is summed over by Pᵀ: the same function as b. The networks on the line are θ(t) = (1 - t) θ_a + t θ_b'. The barrier
is how far a loss rises above the straight line between its values at the ends (Frankle et al., ICML 2020, section 2;
Entezari et al., ICLR 2022, definition 2.1):

    height = max_t  L(θ(t)) - [(1 - t) L(θ_a) + t L(θ_b')]

For a score that is better when greater, the signs change. With a refit, each θ(t) is corrected first, with targets
interpolated in the same way (REPAIR, Jordan et al., ICLR 2023, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.rules import Rule
from ..calibration.data_forms import MAX_BATCHES
from ..calibration.observer import observe
from ..calibration.processes import together
from ..compiler.arguments import Given
from ..compiler.options import Options
from ..compiler.placement import brought_back, device_of
from ..compiler.progress import Display
from ..compiler.session import Session
from ..errors import InputError, OptionError
from ..matching import Merge, Method, resolve
from ..partition.region import Trunk
from ..refit import Refit, refits
from ..rewriting.emit import rewrite
from ..rewriting.module import set_tensor
from ..rewriting.paired_parameters import aligned_tensors, check_paired
from ..rewriting.zip_plan import ZipPlan, plan
from ..tracing import plain_context
from ..tracing.option_values import checked
from .plotting import axes


@dataclass(frozen=True)
class Barrier:
    """A loss or score along the line from a to b.

    >>> line = Barrier((0.0, 0.5, 1.0), (0.1, 0.9, 0.3), "loss")
    >>> round(line.height, 3), line.worst
    (0.7, 0.5)

    Attributes:
        points: t, from 0 (a) to 1 (b).
        values: at each point.
        kind: "loss" (less is better) or "score" (greater is better).
    """

    points: tuple[float, ...]
    values: tuple[float, ...]
    kind: str

    @property
    def rises(self) -> tuple[float, ...]:
        """How much worse than the straight line between the ends it is at each point."""
        first, last = self.values[0], self.values[-1]
        sign = 1 if self.kind == "loss" else -1
        pairs = zip(self.points, self.values, strict=True)
        return tuple(sign * (value - ((1 - t) * first + t * last)) for t, value in pairs)

    @property
    def height(self) -> float:
        """The barrier: the greatest rise, 0 at least, since the ends are on the line."""
        return max(self.rises)

    @property
    def worst(self) -> float:
        """The point of the greatest rise."""
        return self.points[self.rises.index(self.height)]

    def plot(self, ax: Any = None, *, label: str | None = None) -> Any:
        """Draw the values over t, the straight line between the ends dashed, and the barrier where it is highest, with
        its height in the unit of the values. Returns matplotlib axes."""
        ax = axes(ax)
        (drawn,) = ax.plot(self.points, self.values, marker="o", label=label)
        first, last, t = self.values[0], self.values[-1], self.worst
        ax.plot((0, 1), (first, last), linestyle="--", color=drawn.get_color())
        if self.height > 0:
            ends = (1 - t) * first + t * last, self.values[self.points.index(t)]
            ax.vlines(t, *ends, linestyle=":", color=drawn.get_color())
            ax.annotate(f"barrier {self.height:.3g}", (t, sum(ends) / 2), xytext=(5, 0), textcoords="offset points")
        ax.set_title(f"The {self.kind} between two networks")
        ax.set_xlabel("t, share of b: from a (0) to b (1)")
        ax.set_ylabel(f"{self.kind} ({'less' if self.kind == 'loss' else 'greater'} is better)")
        if label is not None:
            ax.legend()
        return ax


@together()
@plain_context()
@checked
def barrier(
    a: nn.Module,
    b: nn.Module,
    sample_input: Any,
    *,
    loss: Callable[[nn.Module], float] | None = None,
    score: Callable[[nn.Module], float] | None = None,
    data: Any = None,
    method: str | Method = "permute",
    points: int = 11,
    refit: str | Refit | None = None,
    verify: bool = True,
    rules: Mapping[str, Rule] | None = None,
    progress: bool | None = None,
    max_batches: int = MAX_BATCHES,
) -> Barrier:
    """A loss or score at points on the line between two networks, after features have been matched one to one.

    >>> x = torch.randn(64, 4)
    >>> a = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> from fxzip import relabel
    >>> line = barrier(a, relabel(a, x), x, loss=lambda net: (net(x) - a(x)).square().mean(), points=5, progress=False)
    >>> line.points, abs(line.height) < 1e-6
    ((0.0, 0.25, 0.5, 0.75, 1.0), True)

    Args:
        a, b: of one architecture, widths and outputs included.
        sample_input, data, verify, rules, progress, max_batches: as in `compile_zip`.
        loss, score: one of them; a function of one network in evaluation mode. Of a loss less is better, of a score
            greater.
        method: what matches: "permute", "weights" or any that pairs features one to one; "average" leaves b as it is,
            which gives the naive line.
        points: how many, the ends included; at least 3.
        refit: of the network at each point, from `data`: None, "batchnorm", "repair".

    Raises:
        InputError: both or none of `loss` and `score`, fewer than 3 points, a method that does not pair features one to
            one, networks that part. And what `compile_zip` raises.
    """
    measure, kind = _measure(loss, score)
    if points < 3:
        raise OptionError(f"`points` must be at least 3, with both ends; found {points}. The usual number is 11.")
    chosen, corrected = resolve(method), refits(refit)
    given = Given.of((a, b, sample_input), "barrier", own_inputs=False)
    options = Options(hold_out=False, verify=verify, max_batches=max_batches, rules=rules)
    with Display(show=progress) as display:
        session = Session.open(given, data, options, display)
    found, calibration = session.survey, session.calibration
    if found.alignment.parting[0]:
        raise InputError(
            "`barrier` needs networks that agree from the input to the outputs; they part: the first "
            f"{found.alignment.parting[0]}."
        )
    trunk = found.trunk(whole=True)
    _check_shapes(trunk)
    aligned = plan(trunk, observe(trunk, calibration("observing")), chosen)
    line = _Line.of(aligned)
    places = [i / (points - 1) for i in range(points)]
    values = []
    for t in places:
        network = corrected(line.at(t), line.plan_at(t), calibration("refitting")).single(0)
        values.append(_number(measure, brought_back(network, device_of(given)), kind))
    return Barrier(tuple(places), tuple(values), kind)


@dataclass(frozen=True, eq=False)
class _Line:
    """Parameters of a, and of b in a's basis, both under the names of a."""

    plan: ZipPlan
    ends: tuple[dict[str, Tensor], dict[str, Tensor]]

    @classmethod
    def of(cls, aligned: ZipPlan) -> _Line:
        check_paired(aligned, "`barrier`")
        return cls(aligned, (aligned_tensors(aligned, 0), aligned_tensors(aligned, 1)))

    def plan_at(self, t: float) -> ZipPlan:
        """The plan whose merged features are those of a and b, weighted by 1 - t and t."""
        merges = {
            s: Merge(torch.cat([(1 - t) * merge.U(0).T, t * merge.U(1).T], 1), merge.unmerge, merge.sizes,
                     merge.correlation)
            for s, merge in self.plan.merges.items()
        }  # fmt: skip
        return replace(self.plan, merges=merges)

    def at(self, t: float) -> Any:
        """θ(t), as a zipped module with the output of either network."""
        result = rewrite(self.plan)
        for name, value in self.ends[0].items():
            set_tensor(result, f"trunk.{name}", torch.lerp(value, self.ends[1][name], t))
        return result


def _check_shapes(trunk: Trunk) -> None:
    for name, twins in trunk.alignment.params.items():
        shapes = [
            dict([*p.module.named_parameters(), *p.module.named_buffers()])[own].shape
            for p, own in zip(trunk.alignment.programs, twins, strict=True)
        ]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"`barrier` needs networks of equal widths and outputs; `{name}` has the shapes {tuple(shapes[0])} and "
                f"{tuple(shapes[1])}. Between networks that differ there is no line."
            )


def _measure(
    loss: Callable[[nn.Module], float] | None, score: Callable[[nn.Module], float] | None
) -> tuple[Callable[[nn.Module], float], str]:
    if loss is not None and score is None:
        return loss, "loss"
    if score is not None and loss is None:
        return score, "score"
    raise InputError(
        "`barrier` needs either `loss` (less is better) or `score` (greater is better), a function of a network; found "
        f"{'both' if loss is not None else 'neither'}."
    )


def _number(measure: Callable[[nn.Module], float], network: nn.Module, kind: str) -> float:
    with torch.no_grad():
        found = measure(network.eval())
    try:
        return float(found)
    except (TypeError, ValueError):
        raise InputError(f"`{kind}` must return a number; found `{type(found).__name__}`.") from None

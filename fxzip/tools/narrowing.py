"""One network made cheaper without training: a zip of one.

What is redundant within the network is computed once: features are merged with one another where that loses the least,
by need under a budget of FLOPs, and least squares corrects what is left. The same passes as for several networks do it.
Networks narrowed each by itself to 1/K of their cost, side by side, are what every zip of K has to be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from ..analysis.rules import Rule
from ..calibration.data_forms import MAX_BATCHES
from ..calibration.processes import together
from ..calibration.sources import as_batch
from ..compiler.arguments import Given
from ..compiler.assembling import assemble
from ..compiler.options import Options, Recipe
from ..compiler.pipeline import finished
from ..compiler.placement import brought_back, device_of
from ..compiler.progress import Display
from ..compiler.session import Candidate, Session
from ..errors import AlignError, InputError, OptionError
from ..matching import Method
from ..partition.cut_points import Cut
from ..refit import Refit
from ..rewriting.module import EmittedModule, ZippedModule
from ..rewriting.report import Report
from ..tracing import plain_context
from ..tracing.calls import JointCall
from ..tracing.option_values import checked
from ..widths.requests import Currency, rank_request, width_request
from .unmerged import side_by_side


@together()
@plain_context()
@checked
def narrow(
    model: nn.Module,
    sample_input: Any,
    *,
    data: Any = None,
    max_cost: float = 0.5,
    budget: Currency | None = None,
    rank: Literal["auto"] | float = 1.0,
    method: str | Method = "auto",
    refit: str | Refit | None = "auto",
    hold_out: bool = True,
    verify: bool = True,
    progress: bool | None = None,
    max_batches: int = MAX_BATCHES,
    rules: Mapping[str, Rule] | None = None,
) -> EmittedModule:
    """A narrower network that computes nearly what the model does, without training.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    >>> x = torch.randn(200, 8)
    >>> narrowed = narrow(model, x[:4], data=[x], max_cost=0.5, budget="flops", progress=False)
    >>> narrowed(x).shape, narrowed.report.cost <= 0.5
    (torch.Size([200, 3]), True)

    Args:
        model: a trained network.
        sample_input: as in `compile_zip`.
        data: unlabelled calibration data, as in `compile_zip`; None: the sample input serves, which is far too little.
        max_cost: what the result may cost relative to the model, in (0, 1].
        budget: what that counts, as in `compile_zip`: "latency" by default, "flops", "memory" or "parameters".
        rank: "auto": convolutions and linear layers may become two calls of a lower rank, too, by need within
            `max_cost`. 1: they stay one.
        method: "auto" ("energy" under least squares, else "zip"), "energy" or "zip"; other methods match features of
            several models.
        refit, hold_out, verify, progress, max_batches, rules: as in `compile_zip`.

    Returns:
        A `torch.fx.GraphModule` in eval mode; takes and returns what the model does. `.report` says what was merged,
        how far the outputs agree on held-out inputs, and the latency.

    Raises:
        OptionError: `max_cost` is out of range. CostError: what has to keep its size takes more. And what `compile_zip`
            raises.
    """
    given = Given.one(model, sample_input, "narrow")
    if max_cost is None or not 0 < max_cost <= 1:
        raise OptionError(f"`max_cost` of `narrow` must lie in (0, 1]; found {max_cost!r}. Half the cost is 0.5.")
    width = width_request("auto", max_cost, 1, budget)
    ranks = rank_request(rank, max_cost, budget)
    recipe = Recipe.of(method, refit, calibrated=data is not None, width=width, rank=ranks)
    options = Options(hold_out=hold_out, verify=verify, max_batches=max_batches, rules=rules)
    with Display(show=progress) as display:
        session = Session.open(given, data, options, display)
        whole = session.survey.whole_trunks.get(0)
        if whole is None:
            raise AlignError("`narrow` needs a network with parameters; found none that the output depends on.")
        candidate = Candidate(Cut.of(None), session.observed(whole, recipe))
        zipped = brought_back(finished(session, assemble(session, candidate, recipe)), device_of(given))
    result = zipped.single(0)
    assert isinstance(result, EmittedModule)
    result.meta["fxzip_report"] = zipped.report
    return result


def narrowed_apart(
    session: Session, cost: float = 1.0, budget: Currency = "flops", rank: Literal["auto"] | float = 1.0
) -> ZippedModule:
    """Each network of a session narrowed by itself to its share of `cost`, all of them side by side.

    Nothing is shared. With `cost` relative to the first model, model k of K may cost cost / K of what the first model
    does, in the currency of `budget`; `rank` as in `narrow`. The report's costs are relative to the models as they
    were.

    Raises:
        InputError: the models have inputs of their own. CostError: what has to keep its size takes more.
    """
    given, flops = session.given, [sum(own.values()) for own in session.survey.flops]
    if isinstance(given.call, JointCall):
        raise InputError("Models with inputs of their own cannot be narrowed in one table with their zips.")

    spent = [sum(price.at(1.0) for price in own.values()) for own in session.prices(budget)]
    batches: list[list[Any]] = [[] for _ in session.calibration.sources]
    for source, call in session.calibration("observing").by_source():
        batches[source].append(as_batch(call))
    apart = []
    for k, network in enumerate(given.networks):
        own = batches[k] if len(batches) == len(given.networks) else batches[0]
        share = cost * spent[0] / (len(given.networks) * spent[k] or 1)
        options = session.options
        narrower = narrow(
            network, given.sample, data=own, max_cost=min(share, 1.0), budget=budget, rank=rank, hold_out=False,
            verify=options.verify, progress=False, rules=options.rules,
        )  # fmt: skip
        apart.append(narrower)

    both = side_by_side(apart, given.sample)
    originals = {
        "flops": flops,
        "parameters": [sum(p.numel() for p in network.parameters()) for network in given.networks],
    }
    values = both.report.as_dict()
    for name, each in originals.items():
        values[name] = {**values[name], "originals": each, "side_by_side": sum(each)}
    both.meta["fxzip_report"] = Report({**values, "method": "alone"})
    return both

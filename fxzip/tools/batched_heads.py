"""Heads of equal shape in batched and grouped calls, where that is faster.

K heads that run one after another are K times as many calls, and a small call takes its time whatever it computes. One
call for all heads computes the same numbers up to rounding. Whether it is faster depends on the device, the batch and
the threads, so it is timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..analysis.flops import count_flops
from ..compiler.timing import fastest
from ..errors import FxzipError, OptionError
from ..rewriting.batching import PART, batchable, emitted, padded, values_of
from ..rewriting.module import ZippedModule, part_of, sources_of
from ..rewriting.node_facts import node_facts
from ..rewriting.report import Report
from ..tracing import difference, modes_kept, plain_context, run_eager
from ..tracing.calls import Call, batch_size, with_batch
from ..tracing.option_values import checked
from .exporting import inputs_of

GAIN = 0.02
"""What has to be saved at least: times that lie closer together are the same."""
_LAYOUTS = ((0, 1), (1,), (0,))
"""Along which axes heads may lie: both; convolutions and what is between them only; linear calls only."""


@plain_context()
@checked
def batch_heads(network: ZippedModule, sample_input: Any = None, *, timed: bool = True) -> ZippedModule:
    """The same network with one call where all heads make the same one, if that is faster: convolutions become grouped
    ones, linear calls a batched product, and what is between them runs once.

    >>> import fxzip, torch
    >>> from torch import nn
    >>> models = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3, 2)]
    >>> apart = fxzip.side_by_side(models, torch.randn(16, 4))
    >>> together = fxzip.batch_heads(apart, timed=False)
    >>> together.report["batched"]["calls"]
    ['_0', '_1']
    >>> all(torch.allclose(y, z, atol=1e-5) for y, z in zip(together(torch.ones(5, 4)), apart(torch.ones(5, 4))))
    True

    Calls are taken together that *all* heads make with one setting; others stay as they are. Where only their widths
    differ, as behind `width="auto"`, narrower layers get features of zeros if that is faster; `single` keeps them.

    It is the last step before a network is used: parameters of heads are stacked, so their names change
    (`batched.PATH`), and a network that is trained further has them as one. `single`, `save`, `export`, `train()` and
    gradients work as before.

    Args:
        network: a zip, or what `side_by_side` gives.
        sample_input: one batch of what it takes, of the size and on the device that it is to run with. None: made up
            in the shapes and dtypes of the compile's.
        timed: False: whatever can be one call is, without timing, so that the result is the same on every machine.

    Returns:
        A network in eval mode, which shares the parameters of the trunk with `network`; to the bit the same function
        where no call was taken together. `report["batched"]` has "calls" (the nodes that compute for all heads),
        "apart" (calls of modules that each head makes for itself), "flops", and "seconds" ("apart" and "together"; None
        where nothing was timed).

    Raises:
        OptionError: the network is no zip of several, or its heads run together. InputError: there is no sample.
        FxzipError: the result would be another function.
    """
    if not isinstance(network, ZippedModule) or len(network.heads) < 2:
        raise OptionError(
            "`batch_heads` needs a network with several heads, from `compile_zip` or `side_by_side`; found "
            f"`{type(network).__name__}`" + (" with one head." if isinstance(network, ZippedModule) else ".")
        )
    if any(part_of(node) == PART for node in network.graph.nodes):
        raise OptionError("The heads of this network run together already; pass the network with its heads apart.")
    call = inputs_of(network, sample_input)
    with modes_kept(network):
        network.eval()
        layouts = _LAYOUTS if timed else _LAYOUTS[:1]
        made = _different([emitted(network, []), *_together(network, call, layouts)])
        for own in made[1:]:
            _check(network, own, call)
        seconds = fastest(made, call) if timed and len(made) > 1 else None
    best = _chosen(seconds, len(made))
    made[best].meta["fxzip_report"] = _report(made[best], network, call, seconds)
    return made[best]


def _together(network: ZippedModule, call: Call, layouts: Sequence[Sequence[int]]) -> Iterator[ZippedModule]:
    """For each layout the network with all calls made together that can be; and again with heads brought to one width
    first, if these are more calls then."""
    values = values_of(network, call)
    wider = padded(network, values)
    wider_values = None if wider is None else values_of(wider, call)
    for axes in layouts:
        calls = batchable(network, values, axes)
        yield emitted(network, calls)
        more = [] if wider is None or wider_values is None else batchable(wider, wider_values, axes)
        if wider is not None and len(more) > len(calls):
            yield emitted(wider, more)


def _different(networks: Sequence[ZippedModule]) -> list[ZippedModule]:
    """Those whose calls differ; of each the first."""
    found: dict[str, ZippedModule] = {}
    for network in networks:
        found.setdefault(network.code, network)
    return list(found.values())


def _chosen(seconds: Sequence[float] | None, made: int) -> int:
    """The number of the network that is taken; the first has its heads apart."""
    if seconds is None:
        return made - 1
    best = min(range(made), key=seconds.__getitem__)
    return best if seconds[best] < (1 - GAIN) * seconds[0] else 0


def _check(network: ZippedModule, own: ZippedModule, call: Call) -> None:
    """Compare the outputs on batches of several sizes.

    Raises:
        FxzipError: they differ by more than rounding.
    """
    for size in (batch_size(call) or 1, 1, 3):
        other = with_batch(call, size)
        reason = difference(run_eager(own, other), run_eager(network, other))
        if reason is not None:
            raise FxzipError(
                f"Heads that run together must give what they give apart; on a batch of {size}, {reason}. Keep the "
                "network as it is, and report the calls of its heads."
            )


def _report(made: ZippedModule, network: ZippedModule, call: Call, seconds: Sequence[float] | None) -> Report:
    """The report of the network with what has become of its heads; its latency in the ratio that was timed."""
    before = network.report
    calls = [node.name for node in made.graph.nodes if part_of(node) == PART and sources_of(node)]
    apart = [node.name for node in made.graph.nodes if part_of(node).startswith("head ") and node.op == "call_module"]
    counted = count_flops(made, call)
    found = node_facts(made, counted)
    nodes = {name: facts if name in calls else before["nodes"].get(name, facts) for name, facts in found.items()}
    taken = None if seconds is None else {"apart": seconds[0], "together": min(seconds[1:])}
    told = {"calls": calls, "apart": apart, "seconds": taken, "flops": counted.total}
    values = {**before.as_dict(), "nodes": nodes, "batched": told}
    if calls and taken is not None and values.get("latency"):
        share = taken["together"] / taken["apart"]
        values["latency"] = {**values["latency"], "zipped": share * values["latency"]["zipped"]}
    zeros = counted.total / max(before["flops"]["total"], 1) - 1
    return Report(values).noting(_told(calls, taken), *_widened(zeros))


def _widened(zeros: float) -> list[str]:
    """A note where there are features of zeros; `zeros`: what they add to the FLOPs, as a share."""
    return [f"features of zeros bring heads to one width: {zeros:.0%} more FLOPs"] if zeros > 1e-3 else []


def _told(calls: Sequence[str], taken: Mapping[str, float] | None) -> str:
    if taken is None:
        return f"heads run together in {len(calls)} calls" if calls else "heads have no calls that can be made together"
    ratio = taken["together"] / taken["apart"]
    if not calls:
        return f"heads run apart: together they take {ratio:.2f}x the time"
    return f"heads run together in {len(calls)} calls: {ratio:.2f}x the time of the network with its heads apart"

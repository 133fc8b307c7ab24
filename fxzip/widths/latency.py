"""Prices in seconds, measured: what every node takes when its model's spaces are narrower or wider.

Each model is emitted by itself with all spaces that can have another size at some shares of their features, by the very
passes that emit a zip, and run on the sample; the least of several times counts. Nodes that call the same thing on
tensors of the same shapes are timed once, and kept per device in the user's cache folder (`cached_seconds.py`): so a
second compile on the same machine finds the same prices, and chooses the same widths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from ..analysis.random_trial import tensors_of
from ..matching import Merge
from ..partition.alignment import attribute
from ..partition.region import Trunk
from ..rewriting.emit import rewrite
from ..rewriting.module import reuse_memory
from ..rewriting.zip_plan import planned
from ..tracing import Program
from ..tracing.calls import Call, map_tensors
from ..tracing.execution import flat_inputs
from ..tracing.provenance import provenance_of
from ..tracing.state import restored_state, wait_for
from .cached_seconds import CachedSeconds
from .costs import axes_of
from .levers import TRUNK
from .prices import Price, Prices
from .resizable import Elastic

SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Of the features of every space that can have another size."""

ROUNDS, FEWEST, SECONDS = 30, 5, 1.0
"""Runs of each network: at most, at least, and how long."""

SETTLED = 0.005
"""Runs end when three in a row have made the sum of the least times of all nodes no smaller than this share."""

Timer = Callable[[Callable[[], Any], torch.device], tuple[Any, float]]
"""Runs a call; its result and its seconds."""


def multiple_of(size: int, device: torch.device) -> int:
    """What numbers of features should be a multiple of, so that vector units are full: a power of two.

    That of the device, or less for a space of less than twice as many: it would have no choice.
    """
    lanes = 8
    if device.type == "cpu":
        lanes = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
    while lanes > max(1, size // 2):
        lanes //= 2
    return lanes


def latency_prices(
    programs: Sequence[Program], alone: Mapping[int, tuple[Trunk, Elastic]], known: CachedSeconds,
    timer: Timer | None = None,
) -> Prices:  # fmt: skip
    """Seconds of every node of every model on its sample.

    Args:
        programs: of all models.
        alone: models by themselves, by number, with the spaces that can have another size; others are timed as they
            are.
        known: what was timed before; is given what is timed now.
        timer: how a call is timed; None: by the clock.
    """
    result = []
    for k, program in enumerate(programs):
        points: dict[str, dict[float, float]] = {}
        trunk, elastic = alone.get(k, (None, None))
        for share in SHARES if elastic is not None and elastic.spaces else (1.0,):
            network, ratio = (program.module, {}) if trunk is None or elastic is None else _at(trunk, elastic, share)
            for node, seconds in _by_node(network, program.sample, known, timer or _clocked).items():
                work = 1.0 if trunk is None else _work(trunk, node, ratio)
                own = points.setdefault(node, {})
                own[work] = min(seconds, own.get(work, seconds))
        result.append({node: _price(own) for node, own in points.items()})
    return result


def _price(points: Mapping[float, float]) -> Price:
    found = sorted(points.items())
    return Price(tuple(found)) if len(found) > 1 else Price(((0.0, found[0][1]), (1.0, found[0][1])))


def _at(trunk: Trunk, elastic: Elastic, share: float) -> tuple[fx.GraphModule, dict[int, float]]:
    """A model by itself whose spaces have that share of their features; the shares that they really have."""
    spaces = trunk.spaces[0].spaces
    device = trunk.alignment.programs[0].call.device
    kept = {}
    for s in sorted(elastic.spaces):
        lanes = multiple_of(spaces[s].size, device)
        kept[s] = max(1, round(share * spaces[s].size / lanes)) * lanes
    for group in elastic.alike:
        kept |= dict.fromkeys(group, kept[min(group)])

    merges = {s: _resized(space.size, kept.get(s, space.size)) for s, space in enumerate(spaces)}
    network = rewrite(planned(trunk, merges, trunk.reach, kept=kept), [tensors_of(trunk.alignment.programs[0])])
    reuse_memory(network)
    return network, {s: size / spaces[s].size for s, size in kept.items()}


def _resized(size: int, kept: int) -> Merge:
    """A merge of one model's features into so many: by turns, copies where there are more."""
    places, rows = (
        torch.arange(max(size, kept), device="cpu"),
        torch.zeros(kept, size, dtype=torch.float64, device="cpu"),
    )
    rows[places % kept, places % size] = 1.0
    return Merge(rows / rows.sum(1, keepdim=True), rows.T / rows.T.sum(1, keepdim=True), (size,), 1.0)


def _work(trunk: Trunk, node: str, ratio: Mapping[int, float]) -> float:
    """How many times its work a node has with spaces of these sizes."""
    result = 1.0
    for _, shares in axes_of(trunk, 0, node, trunk.labellings[0].touches.get(node, frozenset()), TRUNK):
        result *= 1 + sum(share * (ratio.get(int(s), 1.0) - 1) for (_, s), share in shares.items())
    return round(result, 9)


class _Timed(fx.Interpreter):
    """Runs a graph, and keeps the least seconds of each node. Nodes that do nothing are left out."""

    def __init__(self, module: fx.GraphModule, timer: Timer) -> None:
        super().__init__(module)
        self.graph_module = module
        self.timer = timer
        self.seconds: dict[str, float] = {}
        self.signatures: dict[str, str] = {}
        self._device = torch.device("cpu")

    def once(self, call: Call) -> None:
        """One run on copies of the inputs."""
        own = map_tensors(torch.clone, call)  # some networks write into their inputs
        self._device = call.device
        self.run(*flat_inputs(self.graph_module, own), enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_module", "call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.name not in self.signatures:
            self.signatures[n.name] = signature(self.module, n, args, kwargs)
        result, seconds = self.timer(lambda: getattr(self, n.op)(n.target, args, kwargs), self._device)
        self.seconds[n.name] = min(seconds, self.seconds.get(n.name, seconds))
        return result


def signature(module: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> str:
    """What a node calls on what: nodes with one signature take the same time."""
    if node.op == "call_module":
        called = attribute(module, str(node.target))
        held = [_shape(value) for value in (*called.parameters(), *called.buffers())]
        what = f"{type(called).__module__}.{called!r} {held}"
    else:
        what = node.target if isinstance(node.target, str) else torch.typename(node.target)
        what = f"{what} {getattr(node.target, '__name__', '')}"
    return f"{what} {tree_map(_shape, (args, kwargs))}"


def _shape(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return f"{value.dtype}{list(value.shape)}{list(value.stride()) if value.layout == torch.strided else value.layout}"


def _clocked(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    wait_for(device)
    start = time.perf_counter()
    result = run()
    wait_for(device)
    return result, time.perf_counter() - start


def _by_node(module: fx.GraphModule, call: Call, known: CachedSeconds, timer: Timer) -> dict[str, float]:
    """Seconds of each node, by the name of the node of the model that it stands for."""
    timed = _Timed(module, timer)
    with restored_state(), torch.no_grad():
        timed.once(call)  # warms up, and tells the signatures
        timed.seconds.clear()
        if any(known.get(own) is None for own in timed.signatures.values()):
            begin = time.perf_counter()
            sums: list[float] = []
            while len(sums) < ROUNDS and (len(sums) < FEWEST or time.perf_counter() - begin < SECONDS):
                timed.once(call)
                sums.append(sum(timed.seconds.values()))
                if len(sums) >= FEWEST and sums[-4] - sums[-1] < SETTLED * sums[-1]:
                    break
            known.add({timed.signatures[name]: seconds for name, seconds in timed.seconds.items()})

    result: dict[str, float] = {}
    for node in module.graph.nodes:
        if node.name in timed.signatures:
            seconds = known.get(timed.signatures[node.name])
            found = provenance_of(node)
            name = found.sources[0] if found is not None and found.sources else node.name
            result[name] = result.get(name, 0.0) + (seconds or 0.0)
    return result

"""Observe features: one pass over calibration data, all models side by side, moments per feature space.

Features are watched where they are summed over with weights, at the ATen calls themselves, so that features inside leaf
modules (the heads of `nn.MultiheadAttention`) are seen too. Positions are subsampled evenly, `POSITIONS` per batch and
place, which keeps the cost of the products below that of the forward passes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .analysis.spaces import slots
from .errors import DataError
from .inputs import Call, wrong_shape
from .moments import Moments
from .rules import varying
from .tracing import flat_inputs, quiet_execution
from .trunk import Trunk


@dataclass(frozen=True, eq=False)
class Watch:
    """One place where features of a space can be seen in all models.

    `index[k]` has shape [occurrences, n_k]: where the features sit along the run made of `axes`.
    """

    space: int
    node: tuple[str, ...]
    call: int
    arg: int
    axes: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    index: tuple[Tensor, ...]


def watches(trunk: Trunk) -> list[Watch]:
    """Where to look: for each space the places where its features are summed over with weights, else where they arise."""
    found: list[tuple[bool, Watch]] = []
    sites = [{(s.node, s.call, s.arg, tuple(sorted(varying(s.labels)))): s for s in label.sites} for label in trunk.labellings]
    names = [trunk.names(k) for k in range(len(trunk.spaces))]
    for (node, call, arg, axes), site in sites[0].items():
        if node not in names[0]:
            continue
        twins = [own.get((names[k][node], call, arg, axes)) for k, own in enumerate(sites)]
        if any(twin is None for twin in twins):
            continue
        layouts = [trunk.spaces[k].layout(twin.labels) for k, twin in enumerate(twins) if twin is not None]
        for space in layouts[0].space.unique().tolist():
            if space >= 0:
                index = tuple(slots(layout, trunk.partners[k][space]) for k, layout in enumerate(layouts))
                sizes = tuple(tuple(twin.shape[a] for a in axes) for twin in twins if twin is not None)
                whole = all(index[k].shape[1] == trunk.spaces[k].spaces[trunk.partners[k][space]].size for k in range(len(index)))
                if whole:
                    twin_nodes = tuple(names[k][node] for k in range(len(index)))
                    found.append((site.consumed, Watch(space, twin_nodes, call, arg, axes, sizes, index)))
    result = []
    for space in {watch.space for _, watch in found}:
        own = [(consumed, watch) for consumed, watch in found if watch.space == space]
        narrow = min(len(watch.axes) for _, watch in own)
        own = [(consumed, watch) for consumed, watch in own if len(watch.axes) == narrow]
        result += [w for c, w in own if c] or [w for _, w in own]
    return result


class _Watcher(TorchDispatchMode):
    """Takes the watched tensors of one model as they pass; sampled positions only."""

    def __init__(self, wanted: dict[tuple[str, int], list[tuple[int, Watch]]], k: int) -> None:
        super().__init__()
        self.wanted, self.k = wanted, k
        self.node, self.calls = "", 0
        self.taken: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for number, watch in self.wanted.get((self.node, self.calls), ()):
            value = out if watch.arg < 0 else args[watch.arg]
            features = _features(value, watch, self.k)
            if features is not None:
                self.taken[number] = features
        self.calls += 1
        return out


def _features(value: Tensor, watch: Watch, k: int) -> Tensor | None:
    """[positions, n_k], at most `POSITIONS` evenly spread positions; None if the run has another length than traced."""
    if tuple(value.shape[a] for a in watch.axes) != watch.sizes[k]:
        return None
    ends = tuple(range(value.ndim - len(watch.axes), value.ndim))
    run = value.detach().movedim(watch.axes, ends).flatten(value.ndim - len(watch.axes))
    rest = run.shape[:-1].numel()
    if rest > POSITIONS:
        places = torch.arange(POSITIONS, device=run.device) * rest // POSITIONS
        run = run[_unravel(places, run.shape[:-1])]
    else:
        run = run.reshape(rest, run.shape[-1])
    parts = [run[:, row.to(run.device)] for row in watch.index[k]]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _unravel(places: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    result = []
    for size in reversed(shape):
        result.append(places % size)
        places = places // size
    return tuple(reversed(result))


POSITIONS = 4096  # per batch and place; images and pixels are spread evenly


class _WatchedRun(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, watcher: _Watcher) -> None:
        super().__init__(module)
        self.watcher = watcher
        self.extra_traceback = False
        self.last = max(
            (place for place, node in enumerate(module.graph.nodes) if any(name == node.name for name, _ in watcher.wanted)),
            default=-1,
        )
        self.place = -1

    def run_node(self, n: fx.Node) -> Any:
        self.place += 1
        if self.place > self.last and n.op != "placeholder":
            return None  # heads need not run
        self.watcher.node, self.watcher.calls = n.name, 0
        return super().run_node(n)


def observe(trunk: Trunk, data: Iterable[Call], *, progress: Callable[[], None] | None = None) -> dict[int, Moments]:
    """Moments of every space of the trunk, all models side by side, over calibration data.

    In: a trunk and calls (see `inputs.batches`). Out: space number of model 0 -> `Moments`. One pass; memory is that
    of the statistics and one batch. Raises `DataError` on non-finite features, and where the models reject a batch.
    """
    places = watches(trunk)
    models = range(len(trunk.spaces))
    watchers = []
    for k in models:
        wanted: dict[tuple[str, int], list[tuple[int, Watch]]] = defaultdict(list)
        for number, watch in enumerate(places):
            wanted[watch.node[k], watch.call].append((number, watch))
        watchers.append(_Watcher(dict(wanted), k))
    result: dict[int, Moments] = {}
    for index, call in enumerate(data):
        for k in models:
            program = trunk.alignment.programs[k]
            watchers[k].taken = {}
            try:
                with quiet_execution(), sdpa_kernel(SDPBackend.MATH), watchers[k]:
                    _WatchedRun(program.module, watchers[k]).run(*flat_inputs(program.module, call))
            except RuntimeError as error:
                raise wrong_shape(call, index, program.call, error) from error
        for number, watch in enumerate(places):
            features = [watchers[k].taken.get(number) for k in models]
            if any(f is None for f in features):
                continue
            seen = _joint_moments([f for f in features if f is not None], watch, index)
            result[watch.space] = result[watch.space] + seen if watch.space in result else seen
        if progress is not None:
            progress()
    return result


def _joint_moments(features: list[Tensor], watch: Watch, batch: int) -> Moments:
    """Products in the features' own precision, centred; sums in float64."""
    joint = torch.cat(features, dim=1)
    if joint.dtype in (torch.float16, torch.bfloat16):
        joint = joint.float()
    total = joint.double().sum(0)
    if not bool(total.isfinite().all()):
        bad = int((~joint.isfinite().all(0)).sum())
        raise DataError(
            f"Features must be finite; node `{watch.node[0]}` gave {bad} non-finite features on batch {batch} of `data`."
        )
    count = len(joint)
    centre = (total / max(count, 1)).to(joint.dtype)
    centred = joint - centre
    outer = (centred.T @ centred).double()
    mean, shift = total, centre.double()
    outer = outer + torch.outer(mean, shift) + torch.outer(shift, mean) - count * torch.outer(shift, shift)
    return Moments(float(count), total, outer, tuple(f.shape[1] for f in features))

"""Observe features: one pass over calibration data, all models side by side, moments per feature space.

Features are taken at the places that `places` chooses, at the ATen calls themselves, so that features inside leaf
modules (the heads of `nn.MultiheadAttention`) are seen too. Positions are subsampled evenly, `POSITIONS` per batch and
space, which keeps the cost of the products well below that of the forward passes. Where it is known how many inputs
come, only one in n of each batch is run, as many as give `ENOUGH` positions of each space.

Products are taken in the features' own precision, of x - c with a fixed centre c (the first batch's mean), and summed
in float64:  Σ x xᵀ = Σ (x - c)(x - c)ᵀ + c sᵀ + s cᵀ + n c cᵀ  with  s = Σ (x - c).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..matching.moments import SAMPLES, Moments
from ..partition.region import Trunk
from ..tracing import Program, quiet_execution
from ..tracing.aten_calls import AtenCall, run
from ..tracing.calls import Call, batch_size, leaves, select_rows
from ..tracing.precision import full_precision
from .holdout import checksum
from .hook_points import VALUE, Spot, Watch, watches
from .moment_sums import Centres, MomentSums, moments_of_all, share_centres
from .rejections import not_finite, run_on

POSITIONS = (192, 8192)  # per batch and space, least and most; images, pixels and places are spread evenly
_COST = 8e8  # multiplications per batch and space that decide in between
SAMPLES_A_BATCH = SAMPLES // 2
ENOUGH = (20, 10_000)  # positions of a space: for each feature, and at least


def _positions(watch: Watch) -> int:
    """How many positions of a space to take from a batch."""
    features = sum(run.shape[1] for run in watch.index)
    least, most = POSITIONS
    return max(least, min(most, int(_COST / features**2)))


class _Watcher:
    """Takes the watched tensors of one model as they pass; sampled positions only."""

    def __init__(self, places: list[Watch], k: int) -> None:
        self.k = k
        self.wanted: dict[tuple[str, Spot], list[tuple[int, Watch]]] = defaultdict(list)
        for number, watch in enumerate(places):
            self.wanted[watch.node[k], watch.call].append((number, watch))
        tally = Counter(watch.space for watch in places if not watch.sample)
        self.positions = [SAMPLES_A_BATCH if w.sample else -(-_positions(w) // tally[w.space]) for w in places]
        self.nodes = {node for node, _ in self.wanted}
        self.calls: Counter[tuple[str, str]] = Counter()  # by node and name
        self.taken: dict[int, Tensor] = {}
        self.done: set[int] = set()  # watches of which enough has been taken

    def run(self, program: Program, call: Call) -> None:
        """Run the model on a batch, as far as there is something to watch."""
        self.taken = {}
        self.calls.clear()
        left = set(self.nodes)

        def on_call(made: AtenCall) -> Any:
            out = made.make()
            name = made.func._schema.name.split("::")[-1]
            self._take(made.node.name, (name, self.calls[made.node.name, name]), made.args, out)
            self.calls[made.node.name, name] += 1
            return out

        def on_node(node: fx.Node, value: Any) -> Any:
            self._take(node.name, VALUE, (), value)
            left.discard(node.name)
            return value

        with quiet_execution():
            run(program.module, call, on_node=on_node, on_call=on_call, only=lambda _: bool(left))

    def _take(self, node: str, call: Spot, args: Sequence[Any], out: Any) -> None:
        """What is watched of a call of a node, or of its value (`VALUE`)."""
        for number, watch in self.wanted.get((node, call), ()):
            if number in self.done:
                continue
            value = out if watch.arg < 0 else args[watch.arg]
            features = _features(value, watch, self.k, self.positions[number])
            if features is not None:
                self.taken[number] = features


def _features(value: Tensor, watch: Watch, k: int, positions: int) -> Tensor | None:
    """[positions, n_k], at most so many evenly spread ones, copied, since a later call may write into the value.

    None if the run has another length than traced.
    """
    if max(*watch.axes, *watch.pooled, 0) >= value.ndim:
        return None
    if tuple(value.shape[a] for a in watch.axes) != watch.sizes[k]:
        return None
    axes, pooled = watch.axes, watch.pooled
    if watch.period and value.shape[0] % watch.period == 0:
        value = value.unflatten(0, (-1, watch.period))
        axes, pooled = tuple(a + 1 for a in axes), tuple(a + 1 for a in pooled)
    if pooled:
        value = value.mean(pooled, keepdim=True)
    ends = tuple(range(value.ndim - len(axes), value.ndim))
    run = value.detach().movedim(axes, ends)
    outer = run.shape[: value.ndim - len(axes)]
    rest = outer.numel()
    if rest > positions:
        places = torch.arange(positions, device=run.device) * rest // positions
        run = run[_unravel(places, outer)].flatten(1)
    else:
        run = run.clone(memory_format=torch.contiguous_format).reshape(rest, -1)
    if run.is_complex():  # real and imaginary parts are features at two positions
        run = torch.cat([run.real, run.imag])
    if run.dtype in (torch.float16, torch.bfloat16):
        run = run.float()
    if watch.in_order[k]:
        return run
    parts = [run[:, row.to(run.device)] for row in watch.index[k]]
    if watch.crossed:
        return torch.stack(parts).mean(0)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _unravel(places: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    result = []
    for size in reversed(shape):
        result.append(places % size)
        places = places // size
    return tuple(reversed(result))


def observe(trunk: Trunk, data: Iterable[Call], *, inputs: int | None = None) -> dict[int, Moments]:
    """Moments of every space of the trunk, all models side by side, over calibration data.

    In: a trunk and calls (see `inputs.batches`); how many inputs these hold, of all processes, where only as many are
    to be run as it takes (`ENOUGH`). Out: space number of model 0 -> `Moments`; spaces that no batch
    reached are absent. One pass; memory is that of the statistics and one batch.

    Raises:
        DataError: features are not finite, or the models reject a batch.
    """
    return observe_all([trunk], data, inputs=inputs)[0]


def observe_all(
    trunks: Sequence[Trunk], data: Iterable[Call], *, memory: int = 4 << 30, inputs: int | None = None
) -> list[dict[int, Moments]]:
    """`observe` for several trunks of the same models, one pass for all that fit into `memory` bytes of statistics.

    Spaces that are seen at the same places in several trunks are observed once, and share their moments.
    """
    groups: dict[tuple[Any, ...], int] = {}
    places: list[Watch] = []
    wanted: list[dict[int, int]] = [{} for _ in trunks]
    cost = 0
    for trunk, own in zip(trunks, wanted, strict=True):
        by_space: dict[int, list[Watch]] = defaultdict(list)
        for watch in watches(trunk):
            by_space[watch.space].append(watch)
        for space, found in by_space.items():
            key = tuple(watch.identity for watch in found)
            if key not in groups:
                groups[key] = len(groups)
                places += [replace(watch, space=groups[key]) for watch in found]
                cost += 8 * sum(run.shape[1] for run in found[0].index) ** 2
            own[space] = groups[key]
    if cost > memory and len(trunks) > 1:
        half = len(trunks) // 2
        parts = (trunks[:half], trunks[half:])
        return [own for part in parts for own in observe_all(part, data, memory=memory, inputs=inputs)]
    seen = _observed(trunks[0].alignment.programs, places, data, inputs)
    return [{space: seen[group] for space, group in own.items() if group in seen} for own in wanted]


def observe_values(
    programs: Sequence[Program], values: Sequence[tuple[Sequence[str], int]], data: Iterable[Call]
) -> list[Moments | None]:
    """Moments of the features of values, of all models side by side, over calibration data; None of those that no batch
    has in the shape that was traced.

    Args:
        programs: the models.
        values: for each the nodes that give it, one of every model, and the axis that its features lie along, from the
            end or from the front.
        data: calls.
    """
    places = []
    for number, (nodes, axis) in enumerate(values):
        shapes = [program.shapes[node] for program, node in zip(programs, nodes, strict=True)]
        sizes = tuple((shape[axis],) for shape in shapes)
        index = tuple(torch.arange(size, device="cpu")[None] for (size,) in sizes)
        axes = (axis % len(shapes[0]),)
        places.append(Watch(number, tuple(nodes), VALUE, -1, axes, (), sizes, index))
    seen = _observed(programs, places, data)
    return [seen.get(number) for number in range(len(values))]


def _observed(
    programs: Sequence[Program], places: list[Watch], data: Iterable[Call], inputs: int | None = None
) -> dict[int, Moments]:
    """Moments by the places' `space` number, in one pass; `inputs`: of all batches, where not all have to be run."""
    watchers = [_Watcher(places, k) for k in range(len(programs))]
    every = 1 if inputs is None else _spacing(programs, places, inputs)
    sums: dict[int, MomentSums] = {}
    centres: Centres | None = None
    for index, call in enumerate(data):
        some = call if every == 1 or not _is_finite(call) else _thinned(call, every)
        for program, watcher in zip(programs, watchers, strict=True):
            run_on(partial(watcher.run, program, some), some, index, program.call)
        _check_finite(places, watchers, index, call)
        with full_precision():
            centres = _take(sums, places, watchers, centres)
    if centres is None:  # a process all of whose inputs are held out
        centres = share_centres(sums)
    return moments_of_all({space: found for space, found in sums.items() if found.count}, centres)


def _spacing(programs: Sequence[Program], places: list[Watch], inputs: int) -> int:
    """n, if one in n inputs of a batch gives enough positions of each space, by what the sample shows."""
    call, (each, least) = programs[0].small_call, ENOUGH
    dense = all(value.layout == torch.strided for value in leaves(call))
    if not dense or not places or not all(program.batch_axes for program in programs):
        return 1
    watcher, rows = _Watcher(places, 0), Counter[int]()
    watcher.run(programs[0], call)
    for number, taken in watcher.taken.items():
        rows[places[number].space] += 0 if places[number].sample else len(taken)
    all_rows = {space: inputs * rows[space] / (batch_size(call) or 1) for space in {watch.space for watch in places}}
    wanted = {watch.space: max(least, each * sum(run.shape[1] for run in watch.index)) for watch in places}
    return max(1, int(min(all_rows[space] / wanted[space] for space in wanted)))


def _is_finite(call: Call) -> bool:
    """Of what is not, all is run, to be named."""
    return all(bool(value.isfinite().all()) for value in leaves(call))


def _thinned(call: Call, every: int) -> Call:
    """One in n inputs of a batch, two at least (see `joining.py`), drawn by its content: the same whichever process has
    the batch.

    Not every n-th one, for inputs of several tasks may come by turns."""
    size, generator = batch_size(call) or 1, torch.Generator().manual_seed(checksum(call))
    count = max(-(-size // every), 2)
    return select_rows(call, torch.randperm(size, generator=generator, device="cpu")[:count].sort().values)


def _take(
    sums: dict[int, MomentSums], places: list[Watch], watchers: list[_Watcher], centres: Centres | None
) -> Centres:  # fmt: skip
    """Add what was taken from a batch, one product per space. `centres`: of all processes; None: to be shared now."""
    seen: dict[int, list[Tensor]] = defaultdict(list)
    drawn: list[tuple[int, Tensor]] = []
    for number, watch in enumerate(places):
        features = [watcher.taken[number] for watcher in watchers if number in watcher.taken]
        if len(features) < len(watchers) or len({len(own) for own in features}) > 1:
            continue  # rows that each model picks by itself do not belong together
        joint = torch.cat(features, dim=1)
        if watch.sample:
            drawn.append((number, joint))
            continue
        seen[watch.space].append(joint)
        if watch.space not in sums:
            sums[watch.space] = MomentSums.like(joint, tuple(own.shape[1] for own in features))
    centres = share_centres(sums) if centres is None else centres
    for space, parts in seen.items():
        sums[space].add(torch.cat(parts) if len(parts) > 1 else parts[0])
    for number, joint in drawn:
        own = sums.get(places[number].space)
        if own is not None:
            own.samples.append(joint)
            if len(own.samples) == SAMPLES // SAMPLES_A_BATCH:
                for watcher in watchers:
                    watcher.done.add(number)
    return centres


def _check_finite(places: list[Watch], watchers: list[_Watcher], batch: int, call: Call) -> None:
    """Names the first place at which a model computed features that are not finite.

    All places are asked about at once: a device is waited for once for each batch.
    """
    sums = [own.sum().double() for watcher in watchers for own in watcher.taken.values()]
    if not sums or bool(torch.stack(sums).isfinite().all()):
        return
    for k, watcher in enumerate(watchers):
        for number, own in watcher.taken.items():  # in the order in which the model ran
            if not bool(own.sum().isfinite()) and (bad := int((~own.isfinite().all(0)).sum())):
                raise not_finite(bad, places[number].node[k], f"model {k}", batch, call)

"""Refit by least squares: closed form, front to back, on the merged network's own inputs.

For a linear call with inputs x* (as the merged network has them, calls in front refitted already) and the target
t = Σ_k M_k y_k (what the originals give there, merged), the new weights are

    W = argmin Σ ‖x* W - t‖² + λ ‖W - W_zip‖²,        λ = ridge · mean diagonal of Σ x*ᵀ x*

in float64 by Cholesky. A BatchNorm behind the call is folded into W_zip, its target is the target, and it becomes the
identity. Where a residual sum follows, the target is the sum's target less what the other path really carries, so each
block repairs the errors in front of it. Where only a ReLU follows, what lies below zero does not matter: targets t ≤ 0
are met by any value ≤ 0 (a few rounds of majorisation). With one source of data per model, the features that a
cluster has in model k are its target on the data of model k.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..align import attribute
from ..analysis.spaces import Layout, slots
from ..inputs import Call
from ..plan import ZipPlan
from ..zipped import ZippedModule
from ..rules import varying
from ..tracing import flat_inputs, quiet_execution

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ADDS = (operator.add, torch.add, torch.ops.aten.add.Tensor)
_RELUS = (F.relu, torch.relu, torch.ops.aten.relu.default)


@dataclass(frozen=True)
class LeastSquares:
    """Settings of the refit. The defaults are those of every figure in the docs.

    Attributes:
        ridge: λ relative to the mean diagonal of the Gram matrix.
        positions: sampled positions per input dimension of a call, and at least `least` in all.
        least: see `positions`.
        rounds: of majorisation in front of a ReLU.
        memory: bytes that the activations of all batches may take; batches beyond are left out.
        other: weight of data from other models' sources when the head of a model is fitted.
    """

    ridge: float = 1e-4
    positions: int = 24
    least: int = 16384
    rounds: int = 3
    memory: int = 6 << 30
    other: float = 1.0
    own: bool = True
    heads: str = "first"


class _Net:
    """One network run in lockstep over all batches: node by node, values freed after their last use."""

    def __init__(self, module: fx.GraphModule, calls: Sequence[Call]) -> None:
        self.module = module
        self.interpreter = fx.Interpreter(module)
        self.envs: list[dict[fx.Node, Any]] = []
        self.nodes = {node.name: node for node in module.graph.nodes}
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        for call in calls:
            self.envs.append(dict(zip(placeholders, flat_inputs(module, call), strict=True)))
        self.waiting = {node: len(node.users) for node in module.graph.nodes}

    def run(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            return
        for env in self.envs:
            self.interpreter.env = env
            env[node] = self.interpreter.run_node(node)

    def release(self, node: fx.Node) -> None:
        """The node is done: free inputs that no later node needs."""
        for source in node.all_input_nodes:
            self.waiting[source] -= 1
            if self.waiting[source] == 0:
                for env in self.envs:
                    env.pop(source, None)

    def values(self, node: fx.Node) -> list[Any]:
        return [env[node] for env in self.envs]


@dataclass(frozen=True, eq=False)
class _Unit:
    """A linear call, the BatchNorm right behind it, and the residual sum behind that."""

    call: fx.Node
    norm: fx.Node | None
    total: fx.Node | None
    rectified: bool

    @property
    def output(self) -> fx.Node:
        return self.norm or self.call

    @property
    def target(self) -> fx.Node:
        return self.total or self.output


def _module(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return attribute(net, str(node.target)) if node.op == "call_module" else None


def _is_linear(module: nn.Module | None) -> bool:
    if isinstance(module, _CONVS):
        return module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum(node: fx.Node | None) -> bool:
    if node is None or len(node.all_input_nodes) != 2 or node.kwargs:
        return False
    return (node.op == "call_function" and node.target in _ADDS) or (node.op == "call_method" and node.target in ("add", "add_"))


def _is_relu(net: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return isinstance(_module(net, node), nn.ReLU) or (node.op == "call_function" and node.target in _RELUS)


def find_units(net: ZippedModule, part: str) -> dict[fx.Node, _Unit]:
    """Linear calls of one part of the zipped network, by the node at which they are fitted.

    A residual sum belongs to the unit that is computed last in front of it; the other path is taken as it is.
    """
    order = {node: place for place, node in enumerate(net.graph.nodes)}
    used: dict[str, int] = {}
    for node in net.graph.nodes:
        if node.op == "call_module":
            used[str(node.target)] = used.get(str(node.target), 0) + 1
    result: dict[fx.Node, _Unit] = {}
    for node in net.graph.nodes:
        module = _module(net, node)
        if not _is_linear(module) or used[str(node.target)] > 1 or node.meta.get("fxzip", {}).get("part") != part:
            continue
        behind = _only_user(node)
        norm = None
        if behind is not None and behind.op == "call_module" and used[str(behind.target)] == 1:
            found = _module(net, behind)
            norm = behind if isinstance(found, _NORMS) and found.running_mean is not None and found.affine else None
        output = norm or node
        behind = _only_user(output)
        total = behind if _is_sum(behind) and behind is not None else None
        if total is not None:
            other = next(n for n in total.all_input_nodes if n is not output)
            inside = total.meta.get("fxzip", {}).get("part") == part
            total = total if inside and order[other] < order[output] else None
        users = list((total or output).users)
        rectified = bool(users) and all(_is_relu(net, user) for user in users)
        result[output] = _Unit(node, norm, total, rectified)
    return result


# sampling ---------------------------------------------------------------------------------------------------------


def _coordinates(shape: Sequence[int], axis: int, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """`count` random places (at most all) over all axes but `axis`: one index tensor per axis."""
    sizes = [n for a, n in enumerate(shape) if a != axis]
    total = math.prod(sizes)
    flat = torch.arange(total) if count >= total else torch.randint(total, (count,), generator=generator)
    result: list[Tensor] = []
    for size in reversed(sizes):
        result.append(flat % size)
        flat = flat // size
    return tuple(reversed(result))


def _take(value: Tensor, axis: int, places: tuple[Tensor, ...]) -> Tensor:
    """Features at the places, [places, n]."""
    return value.movedim(axis, -1)[tuple(p.to(value.device) for p in places)]


def _patches(module: nn.Module, x: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """Inputs of a linear call at output places, [places, groups, inputs per group], in the order of its weight."""
    if isinstance(module, nn.Linear):
        return x[tuple(p.to(x.device) for p in places)][:, None]
    assert isinstance(module, _CONVS)
    sizes, dims = module.kernel_size, len(module.kernel_size)
    padding = module.padding
    if padding == "same":
        pads = [d * (k - 1) for d, k in zip(module.dilation, sizes, strict=True)]
        widths = [w for p in reversed(pads) for w in (p // 2, p - p // 2)]
    else:
        pads = [0] * dims if padding == "valid" else [int(p) for p in padding]
        widths = [w for p in reversed(pads) for w in (p, p)]
    padded = F.pad(x, widths) if any(widths) else x
    index: list[Any] = [places[0].to(x.device).reshape(-1, *[1] * dims), slice(None)]
    for axis in range(dims):
        start = places[1 + axis].to(x.device) * module.stride[axis]
        run = start[:, None] + torch.arange(sizes[axis], device=x.device) * module.dilation[axis]
        index.append(run.reshape(-1, *[sizes[axis] if a == axis else 1 for a in range(dims)]))
    taken = padded[tuple(index)]  # [places, *kernel, channels]
    taken = taken.movedim(-1, 1).reshape(len(places[0]), module.groups, -1)
    return taken


# targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Targets:
    """How outputs of the originals at a node are merged: one matrix [n, n_k] per source and model."""

    axis: int
    matrices: tuple[tuple[Tensor, ...], ...]  # [source][model]

    def at(self, source: int, values: Sequence[Tensor], places: tuple[Tensor, ...]) -> Tensor:
        parts = [_take(v, self.axis, places) @ m.to(v.dtype).T for v, m in zip(values, self.matrices[source], strict=True)]
        return torch.stack(parts).sum(0)


def _targets(plan: ZipPlan, name: str, sources: int, own: bool) -> _Targets | None:
    """Targets at a trunk node (named as in model 0); None where its features do not lie along one axis."""
    trunk = plan.trunk
    twins = trunk.alignment.pairs[name]
    fields = [label.fields.get(twin, ()) for label, twin in zip(trunk.labellings, twins, strict=True)]
    if any(len(f) != 1 or len(varying(f[0])) != 1 for f in fields):
        return None
    layouts = [trunk.spaces[k].layout(f[0]) for k, f in enumerate(fields)]
    if not bool((layouts[0].space >= 0).all()):
        return None
    (axis,) = varying(fields[0][0])
    matrices = [
        tuple(_merge_matrix(plan, layouts, k, source if own and sources > 1 else None) for k in range(len(layouts)))
        for source in range(sources)
    ]
    return _Targets(axis, tuple(matrices))


def _merge_matrix(plan: ZipPlan, layouts: list[Layout], k: int, source: int | None) -> Tensor:
    """M_k over the places of a run; with a source, a cluster's target is the mean of its members in that model."""
    result = torch.zeros(len(layouts[0].space), len(layouts[k].space))
    for space in layouts[0].space.unique().tolist():
        merge = plan.merges[space]
        matrix = merge.M(k)
        if source is not None:
            weight = merge.M(source).sum(1)  # share of the source's members in each cluster
            lone = weight <= 1e-12
            mine = matrix / weight.clamp(min=1e-12)[:, None] if k == source else torch.zeros_like(matrix)
            matrix = torch.where(lone[:, None], matrix, mine)
        rows, columns = slots(layouts[0], space), slots(layouts[k], plan.trunk.partners[k][space])
        for row, column in zip(rows, columns, strict=True):
            result[row[:, None], column[None, :]] = matrix.to(result)
    return result


# solving ----------------------------------------------------------------------------------------------------------


@dataclass
class Fit:
    """Notes for the report: calls fitted, and calls left as zipped, with the reason."""

    fitted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def ridge_solution(
    x: Tensor, t: Tensor, prior: Tensor, ridge: float, *, rounds: int = 0, offset: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """argmin_W Σ w ‖x W - t‖² + λ ‖W - prior‖², the last row of W being the bias. Float64.

    x [positions, d], t [positions, n], prior [d + 1, n]; result [d + 1, n]. With `rounds`, a ReLU follows
    (after `offset` is added): values ≤ 0 are as good as any other where the target is ≤ 0. A Gram matrix without full
    rank is made regular by the ridge, which is raised tenfold until Cholesky succeeds.

    >>> x = torch.randn(50, 2)
    >>> w = ridge_solution(x, x @ torch.ones(2, 1) + 3, torch.zeros(3, 1), 1e-9)
    >>> [round(float(v), 3) for v in w]
    [1.0, 1.0, 3.0]
    """
    x1 = torch.cat([x, x.new_ones(len(x), 1)], 1)
    xw = x1 if weight is None else x1 * weight[:, None].to(x1)
    gram = (xw.T @ x1).double()
    scale = float(gram.diagonal().mean()) or 1.0
    factor = None
    while factor is None:
        lam = ridge * scale
        factor, info = torch.linalg.cholesky_ex(gram + lam * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        if int(info) != 0:
            factor, ridge = None, max(ridge, 1e-12) * 10
    prior = prior.double()

    def solve(target: Tensor) -> Tensor:
        return torch.cholesky_solve((xw.T @ target).double() + lam * prior, factor)

    solution = solve(t)
    for _ in range(rounds):
        base = 0.0 if offset is None else offset
        guess = x1 @ solution.to(x1) + base
        wanted = torch.where(t + base > 0, t + base, guess.clamp(max=0))
        solution = solve(wanted - base)
    return solution


def _effective(module: nn.Module, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Weight [outputs, ...] and bias of the call with the BatchNorm behind it folded in, float64."""
    weight = module.weight.detach().double()  # type: ignore[operator, union-attr]
    bias = module.bias.detach().double() if module.bias is not None else weight.new_zeros(len(weight))  # type: ignore[operator, union-attr]
    if norm is not None:
        assert isinstance(norm, _NORMS)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        bias = (bias - norm.running_mean.double()) * scale + norm.bias.detach().double()
    return weight, bias


def _install(module: nn.Module, norm: nn.Module | None, weight: Tensor, bias: Tensor) -> None:
    """Write the solution: weights into the call, the bias into the BatchNorm (made the identity) or the call."""
    with torch.no_grad():
        module.weight.copy_(weight.to(module.weight))  # type: ignore[operator, union-attr, arg-type]
        if norm is not None:
            assert isinstance(norm, _NORMS)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0)
            norm.weight.fill_(math.sqrt(1 + norm.eps))
            norm.bias.copy_(bias.to(norm.bias))
            if module.bias is not None:
                module.bias.zero_()  # type: ignore[operator]
        elif module.bias is not None:
            module.bias.copy_(bias.to(module.weight))  # type: ignore[operator, arg-type]
        else:
            module.bias = nn.Parameter(bias.to(module.weight), requires_grad=module.weight.requires_grad)  # type: ignore[arg-type, union-attr]


class _Walk:
    """The walk over the zipped network and the originals in lockstep."""

    def __init__(self, zipped: ZippedModule, plan: ZipPlan, batches: Sequence[tuple[int, Call]], settings: LeastSquares) -> None:
        self.plan, self.settings = plan, settings
        self.sources = [source for source, _ in batches]
        calls = [call for _, call in batches]
        self.zipped = _Net(zipped, calls)
        self.originals = [_Net(p.module, calls) for p in plan.trunk.alignment.programs]
        self.generator = torch.Generator().manual_seed(0)
        self.fit = Fit()
        self.net = zipped

    def trunk(self) -> None:
        names = [self.plan.trunk.names(k) for k in range(len(self.originals))]
        units = find_units(self.net, "trunk")
        for node in list(self.net.graph.nodes):
            if node.meta.get("fxzip", {}).get("part", "trunk") != "trunk" or node.op == "output":
                continue
            name = node.meta["fxzip"]["from"][0]
            if name in names[0]:
                for net, own in zip(self.originals, names, strict=True):
                    net.run(net.nodes[own[name]])
            self.zipped.run(node)
            if node in units:
                self._fit_trunk(units[node])
            if name in names[0]:
                for net, own in zip(self.originals, names, strict=True):
                    net.release(net.nodes[own[name]])
            self._release(node, units)

    def _release(self, node: fx.Node, units: Mapping[fx.Node, _Unit]) -> None:
        """Free what is not needed any more; inputs of a call wait until the BatchNorm behind it has been fitted."""
        behind = _only_user(node)
        if behind in units and behind is not None and units[behind].call is node:
            return
        if node in units and units[node].norm is not None:
            self.zipped.release(units[node].call)
        self.zipped.release(node)

    def _ahead(self, net: _Net, node: fx.Node) -> list[Any]:
        """Values of a residual sum of an original before its turn; the other path is there already."""
        values = []
        for env in net.envs:
            if node in env:
                values.append(env[node])
            else:
                net.interpreter.env = env
                values.append(net.interpreter.run_node(node))
        return values

    def _fit_trunk(self, unit: _Unit) -> None:
        name = unit.target.meta["fxzip"]["from"][0]
        found = _targets(self.plan, name, max(self.sources) + 1, self.settings.own)
        if found is None:
            self.fit.left[unit.call.name] = "its features do not lie along one axis"
            return
        twins = self.plan.trunk.alignment.pairs[name]
        wanted = [self._ahead(net, net.nodes[twin]) for net, twin in zip(self.originals, twins, strict=True)]
        other = self._other(unit)

        def target(batch: int, places: tuple[Tensor, ...]) -> Tensor:
            return found.at(self.sources[batch], [values[batch] for values in wanted], places)

        self._solve(unit, found.axis, target, other, None)

    def _other(self, unit: _Unit) -> list[Tensor] | None:
        if unit.total is None:
            return None
        node = next(n for n in unit.total.all_input_nodes if n is not unit.output)
        return self.zipped.values(node)

    def _solve(
        self, unit: _Unit, axis: int, target: Callable[[int, tuple[Tensor, ...]], Tensor],
        other: list[Tensor] | None, weights: list[float] | None,
    ) -> None:  # fmt: skip
        module = _module(self.net, unit.call)
        norm = _module(self.net, unit.norm) if unit.norm is not None else None
        assert module is not None
        source = unit.call.all_input_nodes[0]
        weight, bias = _effective(module, norm)
        inputs = weight[0].numel()
        per_batch = math.ceil(max(self.settings.least, self.settings.positions * inputs) / len(self.zipped.envs))
        xs, ts, offsets, factors = [], [], [], []
        for batch, env in enumerate(self.zipped.envs):
            output = env[unit.output]
            places = _coordinates(output.shape, axis, per_batch, self.generator)
            xs.append(_patches(module, env[source], places))
            t = target(batch, places)
            if other is not None:
                skip = _take(other[batch].expand_as(output), axis, places)
                offsets.append(skip)
                t = t - skip
            ts.append(t)
            if weights is not None:
                factors.append(torch.full((len(t),), weights[batch]))
        x, t = torch.cat(xs), torch.cat(ts)
        offset = torch.cat(offsets) if offsets else None
        factor = torch.cat(factors) if factors else None
        groups = x.shape[1]
        rows = len(weight) // groups
        rounds = self.settings.rounds if unit.rectified else 0
        flat = weight.reshape(groups, rows, inputs)
        for g in range(groups):
            mine = slice(g * rows, (g + 1) * rows)
            prior = torch.cat([flat[g].T, bias[None, mine]])
            part = None if offset is None else offset[:, mine]
            solution = ridge_solution(x[:, g], t[:, mine], prior, self.settings.ridge, rounds=rounds, offset=part, weight=factor)
            flat[g], bias[mine] = solution[:-1].T, solution[-1]
        _install(module, norm, flat.reshape(weight.shape), bias)
        self.fit.fitted.append(unit.call.name)
        for node in (unit.call, unit.norm):
            if node is not None and all(n in self.zipped.envs[0] for n in node.all_input_nodes):
                self.zipped.run(node)

    def head(self, k: int) -> None:
        """Fit the first linear calls of head k against the original's own values there."""
        part = f"head {k}"
        original = self.originals[k]
        units = find_units(self.net, part)
        seen: set[fx.Node] = set()
        fitted: set[fx.Node] = set()
        own = {node.name for node in original.module.graph.nodes} - set(self.plan.trunk.names(k).values())
        nodes = [n for n in self.net.graph.nodes if n.meta.get("fxzip", {}).get("part") == part]
        for node in nodes:
            if any(source in seen for source in node.all_input_nodes):
                seen.add(node)
            name = node.meta["fxzip"]["from"][0]
            self.zipped.run(node)
            if name in own and name in original.nodes:
                original.run(original.nodes[name])
            if node in units:
                first = units[node].call not in seen
                if first or self.settings.heads == "all":
                    self._fit_head(units[node], original, k)
                    fitted.add(node)
                seen.add(node)
            self._release(node, units)

    def _fit_head(self, unit: _Unit, original: _Net, k: int) -> None:
        output = original.nodes[unit.output.meta["fxzip"]["from"][0]]
        wanted = original.values(output)
        module = _module(self.net, unit.call)
        axis = 1 if isinstance(module, _CONVS) else wanted[0].ndim - 1
        weights = None
        if max(self.sources) > 0:
            weights = [1.0 if source == k else self.settings.other for source in self.sources]
        lone = _Unit(unit.call, unit.norm, None, unit.rectified and unit.total is None)
        self._solve(lone, axis, lambda batch, places: _take(wanted[batch], axis, places), None, weights)


def least_squares(
    zipped: ZippedModule, plan: ZipPlan, data: Iterable[Call], settings: LeastSquares = LeastSquares()
) -> ZippedModule:
    """Refit all linear calls of the trunk, then the first of each head. A new module; no labels, no gradients."""
    result = copy.deepcopy(zipped)
    batches = list(getattr(data, "labelled", lambda: ((0, call) for call in data))())
    with quiet_execution():
        walk = _Walk(result, plan, batches, settings)
        walk.trunk()
        for k in range(len(walk.originals)):
            walk.head(k)
    result.meta["fxzip_fit"] = walk.fit
    return result



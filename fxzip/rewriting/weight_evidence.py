"""The evidence of weights: every parameter of the trunk, in all models, with the feature spaces along its axes.

BatchNorms are folded into the linear call in front of them; where there is none, their four tensors are given as the
two that matter, scale and shift (see `folding`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..analysis.relabelling import dense_kernel
from ..analysis.spaces import slots
from ..errors import DataError
from ..matching import Run, Weight
from ..partition.alignment import attribute
from ..partition.region import Trunk
from .batchnorm_folding import FoldedNorm, find_norms, folded_linear, scale_and_shift

Values = dict[str, tuple[Tensor, ...]]  # by parameter of model 0


def weights_of(trunk: Trunk) -> tuple[Weight, ...]:
    """The parameters of a trunk as evidence for matching. In: a trunk; out: one `Weight` per parameter with features.

    >>> import fxzip, torch
    >>> from torch import nn
    >>> from fxzip.compiler.survey import survey
    >>> from fxzip.tracing.calls import as_call
    >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3)]
    >>> [weight.name for weight in weights_of(survey(nets, as_call(torch.ones(1, 4))).trunk())]
    ['0.bias', '0.weight']
    """
    result = []
    for name, values in sorted(parameters(trunk).items()):
        weight = _weight(trunk, name, values)
        if weight.spaces:
            result.append(weight)
    return tuple(result)


def parameters(trunk: Trunk) -> Values:
    """Values of the trunk's labelled parameters and buffers in all models, BatchNorms folded; by name in model 0."""
    programs = trunk.alignment.programs
    touched = {param for node in trunk.nodes for param in trunk.labellings[0].touches[node]}
    labelled = sorted(touched & set(trunk.labellings[0].params))
    tensors = [{**dict(p.module.named_parameters()), **dict(p.module.named_buffers())} for p in programs]
    values: Values = {}
    for name in labelled:
        found = [own[twin].detach() for own, twin in zip(tensors, trunk.alignment.params[name], strict=True)]
        if all(value.is_floating_point() for value in found):
            values[name] = tuple(value.to(torch.promote_types(value.dtype, torch.float32)) for value in found)
            _check_finite(name, values[name])
    _fold(trunk, values)
    return values


def _check_finite(name: str, values: Sequence[Tensor]) -> None:
    """Raise a `DataError` unless a parameter, by its name in model 0, is finite in all models."""
    for k, value in enumerate(values):
        if odd := int((~value.isfinite()).sum()):
            raise DataError(
                f"Weights must be finite; in model {k} `{name}` holds {odd} values that are not. Look for what "
                "diverged in its training, or for a file that was cut off."
            )


def _fold(trunk: Trunk, values: Values) -> None:
    """Replace the tensors of every BatchNorm, in place: by a bias, or by scale and shift."""
    modules = [program.module for program in trunk.alignment.programs]
    calls = [{n.name: str(n.target) for n in m.graph.nodes if n.op == "call_module"} for m in modules]
    found = [
        {norm.norm: norm for norm in find_norms(module, set(trunk.names(k).values()))}
        for k, module in enumerate(modules)
    ]
    for node in trunk.nodes:
        paths = [own.get(twin, "") for own, twin in zip(calls, trunk.alignment.pairs[node], strict=True)]
        if all(path in own for path, own in zip(paths, found, strict=True)):
            _fold_one(modules, [own[path] for path, own in zip(paths, found, strict=True)], values)


def _fold_one(modules: Sequence[fx.GraphModule], norms: Sequence[FoldedNorm], values: Values) -> None:
    """Fold one BatchNorm of all models, `norms[k]` of model k."""
    first = norms[0]
    names = [f"{first.norm}.{part}" for part in ("bias", "running_mean", "weight", "running_var")]
    held = [next((name for name in pair if name in values), None) for pair in (names[:2], names[2:])]
    if held[0] is None or held[1] is None:
        return
    for name in names:
        values.pop(name, None)
    if all(norm.linear for norm in norms):
        pairs = [folded_linear(module, norm) for module, norm in zip(modules, norms, strict=True)]
        values[f"{first.linear}.weight"], values[held[0]] = _columns(pairs)
        values.pop(f"{first.linear}.bias", None)
    else:
        pairs = [scale_and_shift(attribute(module, norm.norm)) for module, norm in zip(modules, norms, strict=True)]
        values[held[1]], values[held[0]] = _columns(pairs)


def _columns(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The first tensors of all models, and the second; at least float32."""
    wide = [tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in pair) for pair in pairs]
    return tuple(pair[0] for pair in wide), tuple(pair[1] for pair in wide)


def _weight(trunk: Trunk, name: str, values: Sequence[Tensor]) -> Weight:
    """One parameter with its runs."""
    twins = trunk.alignment.params[name]
    labels = [own.labelling.params[twin] for own, twin in zip(trunk.spaces, twins, strict=True)]
    values = [own.kernel(value) for own, value in zip(labels, values, strict=True)]
    groups = labels[0].groups
    runs: list[Run] = []
    for place, found in enumerate(zip(*(own.runs() for own in labels), strict=True)):
        fields = [run for _, run in found]
        summed = (name, place) in trunk.spaces[0].consumed
        runs.append(_layouts(trunk, fields, found[0][0], summed).to(values[0].device))
    if groups > 1 and not _in_blocks(trunk, runs, groups):
        return Weight(name, tuple(dense_kernel(value, groups) for value in values), tuple(runs))
    return Weight(name, tuple(values), tuple(runs), groups)


def _layouts(trunk: Trunk, fields: Sequence[Tensor], axis: int, summed: bool) -> Run:
    layouts = [own.layout(run) for own, run in zip(trunk.spaces, fields, strict=True)]
    places = {int(s): tuple(slots(layout, int(s)) for layout in layouts) for s in layouts[0].space.unique() if s >= 0}
    rest = tuple((layout.space < 0).nonzero().flatten() for layout in layouts)
    return Run(axis, places, rest, summed)


def _in_blocks(trunk: Trunk, runs: Sequence[Run], groups: int) -> bool:
    """Whether the groups of a kernel are the blocks of one tie group, in all models."""
    first = trunk.spaces[0].spaces
    if any(len(run.slots) != 1 or run.rest[0].numel() for run in runs):
        return False
    (row,), (column,) = (run.slots for run in runs)
    if first[row].tie is None or first[row].tie != first[column].tie:
        return False
    for k, own in enumerate(trunk.spaces):
        owners = []
        for run, number in zip(runs, (row, column), strict=True):
            places, blocks = run.slots[number][k].cpu(), own.spaces[number].blocks
            if blocks is None or len(blocks) != groups or len(places) > 1:
                return False
            group = places[0][blocks] // (places.numel() // groups)
            if bool((group != group[:, :1]).any()):
                return False
            owners.append(group[:, 0])
        if not torch.equal(*owners):
            return False
    return True

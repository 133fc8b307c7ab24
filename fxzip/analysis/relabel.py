"""Relabel a network at random within the legality, and the self-check that is made of it.

A relabelling moves the element with labels (l, l', ...) to the place of (π l, π l', ...). If the analysis is right the
network computes the same function afterwards. The check runs on random parameters of sane scale, not on the model's
own: a branch that a checkpoint scales by 1e-6 would hide a wrong rule otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import PinnedSpaceWarning, SelfCheckError
from ..tracing import Program, quiet_execution
from .labelling import Labelling, ParamLabels, placeholders, relative_difference
from .spaces import FeatureSpaces, Layout, solve

TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}


def random_relabelling(spaces: FeatureSpaces, generator: torch.Generator, only: set[int] | None = None) -> list[Tensor]:
    """One legal permutation per space: feature f goes to the place of feature `perms[s][f]`.

    Blocks of a tie group move together, features inside a block on their own. Spaces (and tie groups) not in `only`
    stay as they are.
    """
    shuffled: dict[int, Tensor] = {}
    perms = []
    for number, space in enumerate(spaces.spaces):
        identity = torch.arange(space.size)
        if space.blocks is None:
            moves = only is None or number in only
            perms.append(torch.randperm(space.size, generator=generator) if moves else identity)
            continue
        assert space.tie is not None
        mates = {i for i, other in enumerate(spaces.spaces) if other.tie == space.tie}
        if only is not None and not mates & only:
            perms.append(identity)
            continue
        count, width = space.blocks.shape
        if space.tie not in shuffled:
            shuffled[space.tie] = torch.randperm(count, generator=generator)
        perm = identity.clone()
        for block, target in enumerate(shuffled[space.tie].tolist()):
            perm[space.blocks[block]] = space.blocks[target][torch.randperm(width, generator=generator)]
        perms.append(perm)
    return perms


def _keys(layout: Layout, feature: Tensor) -> Tensor:
    """One number per place from space, feature and occurrence; places without a feature keep their own."""
    places = torch.arange(len(feature))
    key = ((layout.space + 1) << 48) + (feature.clamp(min=0) << 24) + layout.occurrence
    return torch.where(layout.space >= 0, key, places)


def targets(layout: Layout, perms: list[Tensor]) -> Tensor:
    """Where each place of a labelled run goes, shape [places]."""
    moved = layout.feature.clone()
    for number, perm in enumerate(perms):
        here = layout.space == number
        moved[here] = perm[layout.feature[here]]
    keys, order = _keys(layout, layout.feature).sort()
    return order[torch.searchsorted(keys, _keys(layout, moved))]


def group_run(labels: ParamLabels) -> Tensor:
    """The second field of a grouped kernel as one run over (group, axis 1)."""
    rows = labels.fields[1].shape[0] // labels.groups
    return labels.fields[1].reshape(labels.fields[1].shape[:2])[::rows].reshape(-1)


def relabel_tensor(value: Tensor, labels: ParamLabels, spaces: FeatureSpaces, perms: list[Tensor]) -> Tensor:
    """A parameter after the relabelling."""
    if labels.groups > 1:
        rows, columns = value.shape[0] // labels.groups, value.shape[1]
        first = targets(spaces.layout(labels.fields[0]), perms)
        second = targets(spaces.layout(group_run(labels)), perms).reshape(labels.groups, columns) % columns
        result = torch.empty_like(value)
        own = second.repeat_interleave(rows, 0)
        result[first[:, None], own] = value
        return result
    for run in labels.fields:
        axis = next(a for a, n in enumerate(run.shape) if n > 1)
        place = targets(spaces.layout(run), perms).to(value.device)
        result = torch.empty_like(value)
        value = result.index_copy_(axis, place, value)
    return value


def relabelled(values: Mapping[str, Tensor], spaces: FeatureSpaces, perms: list[Tensor]) -> dict[str, Tensor]:
    """All parameters and buffers in `values` (by name) after the relabelling."""
    params = spaces.labelling.params
    return {k: relabel_tensor(v, params[k], spaces, perms) if k in params else v for k, v in values.items()}


def sane_values(program: Program, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random parameters under which signals neither die nor explode: scales in [0.5, 1.5], weights of unit gain."""
    values: dict[str, Tensor] = {}
    tensors = {**dict(program.module.named_parameters()), **dict(program.module.named_buffers())}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or (name not in dict(program.module.named_parameters()) and name not in program.persistent):
            values[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        elif tensor.ndim < 2:
            values[name] = (0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)).to(tensor.device, dtype)
        else:
            fan = max(tensor[0].numel(), 1)
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            values[name] = (noise * 1.3 / fan**0.5).to(tensor.device, dtype)
    return values


def run_with(program: Program, values: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """The program's output on its sample with other parameters."""
    call = [v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in placeholders(program)]
    with quiet_execution():
        return torch.func.functional_call(program.module, dict(values), tuple(call))


def self_check(
    labelling: Labelling, *, seed: int = 0, dtype: torch.dtype | None = None
) -> tuple[FeatureSpaces, float, dict[int, str]]:
    """Relabel everything that may move; the output must stay. Returns spaces, relative error, and pins it had to add.

    A space that fails alone is pinned with a `PinnedSpaceWarning`; if that does not cure it, `SelfCheckError`.
    """
    program = labelling.program
    own = next((p.dtype for p in program.module.parameters() if p.is_floating_point()), torch.float32)
    dtype = dtype or (own if own in TOLERANCE else torch.float32)
    generator = torch.Generator().manual_seed(seed)
    values = sane_values(program, generator, dtype)
    expected = run_with(program, values, dtype)
    if relative_difference(expected, expected) == float("inf"):
        tensors = {**dict(program.module.named_parameters()), **dict(program.module.named_buffers())}
        values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        expected = run_with(program, values, dtype)

    def error(spaces: FeatureSpaces, only: set[int] | None = None) -> float:
        perms = random_relabelling(spaces, generator, only)
        return relative_difference(expected, run_with(program, relabelled(values, spaces, perms), dtype))

    pinned: dict[int, str] = {}
    for _ in range(3):
        spaces = solve(labelling, pinned=pinned)
        worst = error(spaces)
        if worst <= TOLERANCE[dtype]:
            return spaces, worst, pinned
        for number, space in enumerate(spaces.spaces):
            alone = error(spaces, {number})
            if alone > TOLERANCE[dtype]:
                why = f"relabelling it moved the output by {alone:.1e}"
                warnings.warn(
                    f"The space of `{space.name}` ({space.size} features) failed the self-check: {why}. "
                    "It is pinned: its features are not merged.", PinnedSpaceWarning, stacklevel=2,
                )  # fmt: skip
                members = torch.isin(spaces.klass, space.classes).nonzero().flatten()
                pinned.update(dict.fromkeys(members.tolist(), why))
    raise SelfCheckError(
        f"Relabelling free feature spaces must leave the output as it is; it moved by {worst:.1e} (relative), and "
        "pinning the spaces that fail alone did not cure it. Please report the model; `verify=False` skips the check."
    )

"""The self-check: relabel everything that may move, on random parameters, and see whether the output moves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import PinnedSpaceWarning, SelfCheckError
from .labelling import Labelling
from .relabel import random_relabelling
from .spaces import FeatureSpaces, solve
from .trial import Trial, relative_difference, run_with

__all__ = ["Trial", "relative_difference", "run_with", "self_check"]

_ROUNDS, _CULPRITS = 3, 32


def self_check(
    labelling: Labelling, *, seed: int = 0, dtype: torch.dtype | None = None
) -> tuple[FeatureSpaces, float, dict[int, str]]:
    """Relabel everything that may move; the output must stay. Returns spaces, relative error, and pins it had to add.

    Two forward passes if all is well. Else the culprits are found by bisection and pinned, each with a
    `PinnedSpaceWarning`; if that does not cure it, `SelfCheckError`.
    """
    trial = Trial(labelling.program, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    pinned: dict[int, str] = {}
    worst, spaces = 0.0, solve(labelling)
    for attempt in range(_ROUNDS):
        perms = random_relabelling(spaces, generator)
        worst = trial.error(spaces, perms)
        if worst > trial.tolerance and not attempt:
            trial.calm(seed)
            worst = trial.error(spaces, perms)
        if worst <= trial.tolerance:
            return spaces, worst, pinned
        found = _culprits(trial, spaces, perms)
        if not found:
            break
        pinned |= found
        spaces = solve(labelling, pinned=pinned)
    raise SelfCheckError(
        f"Relabelling free feature spaces must leave the output as it is; it moved by {worst:.1e} (relative), and "
        "pinning the spaces at fault did not cure it. Please report the model; `verify=False` skips the check."
    )


def _culprits(trial: Trial, spaces: FeatureSpaces, perms: list[Tensor]) -> dict[int, str]:
    """Labels to pin, with the reason: one by one, the space (or tie group) that ends the shortest failing prefix."""
    movers: dict[tuple[bool, int], list[int]] = {}
    for number, space in enumerate(spaces.spaces):
        movers.setdefault((space.tie is None, number if space.tie is None else space.tie), []).append(number)
    rest = list(movers.values())

    def error(chosen: Sequence[list[int]]) -> float:
        moving = {number for mover in chosen for number in mover}
        return trial.error(spaces, [p if i in moving else torch.arange(len(p)) for i, p in enumerate(perms)])

    pinned: dict[int, str] = {}
    for _ in range(_CULPRITS):
        moved = error(rest)
        if moved <= trial.tolerance:
            return pinned
        low, high = 0, len(rest)  # moving the first `low` passes, moving the first `high` fails
        while high - low > 1:
            middle = (low + high) // 2
            found = error(rest[:middle])
            low, high, moved = (middle, high, moved) if found <= trial.tolerance else (low, middle, found)
        if not rest:
            return {}
        culprit = rest.pop(high - 1)
        why = f"relabelling it moved the output by {moved:.1e}"
        _warn([f"`{spaces.spaces[n].name}` ({spaces.spaces[n].size} features)" for n in culprit], why)
        members = torch.isin(spaces.klass, torch.cat([spaces.spaces[n].classes for n in culprit]))
        pinned |= dict.fromkeys(members.nonzero().flatten().tolist(), why)
    return {}


def _warn(names: list[str], why: str) -> None:
    what = f"The space of {names[0]}" if len(names) == 1 else f"The spaces of {', '.join(names)}, tied blockwise,"
    warnings.warn(
        f"{what} failed the self-check: {why}. Its features are pinned: they are not merged.",
        PinnedSpaceWarning,
        stacklevel=4,
    )

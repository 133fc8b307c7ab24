"""The self-check: relabel everything that may move, on random parameters, and see whether it moves what it must not.

What the program returns must stay, and the value of every node go where its fields say. A control makes sure that this
can fail: where the features of a space are all alike at some node, moving them where they are written but not where
they are read must show. If it does not, on any of several parameters, the space is named as unseen.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PinnedSpaceWarning, SelfCheckError
from ..tracing import Program
from .labelling import Labelling, label
from .random_trial import Trial, run_with
from .relabelling import random_relabelling
from .rules import Rule
from .sightings import relative_difference
from .spaces import FeatureSpaces, solve

__all__ = ["Check", "Trial", "analyse", "check", "relative_difference", "run_with", "self_check"]

_ROUNDS, _CULPRITS, _CONTROLS = 3, 32, 32
_GAINS, _TIMES = (1.0, 0.03, 300.0), 3  # of further random parameters, where the first ones hide something


@dataclass(frozen=True, eq=False)
class Check:
    """What the self-check of one model found.

    Attributes:
        spaces: the feature spaces with what failed pinned.
        error: how far a relabelling moved anything, relative to its magnitude.
        pinned: label -> why it had to be pinned.
        unseen: names of spaces of which nothing shows whether they may move.
        trial: the model on the first random parameters, if those served for all.
    """

    spaces: FeatureSpaces
    error: float
    pinned: dict[int, str]
    unseen: tuple[str, ...] = ()
    trial: Trial | None = None

    @property
    def notes(self) -> list[str]:
        """What the report says of it."""
        return [
            f"not checked: the space of `{name}`; nothing in the model shows, on random parameters, where its features "
            "are"
            for name in self.unseen
        ]


def self_check(
    labelling: Labelling, *, seed: int = 0, dtype: torch.dtype | None = None
) -> tuple[FeatureSpaces, float, dict[int, str]]:
    """Relabel everything that may move; the output must stay. Returns spaces, relative error, and pins it had to add.

    Two forward passes if all is well. Else the culprits are found by bisection and pinned, each with a
    `PinnedSpaceWarning`; if that does not cure it, `SelfCheckError`.
    """
    found = check(labelling, seed=seed, dtype=dtype)
    return found.spaces, found.error, found.pinned


def analyse(program: Program, rules: Mapping[str, Rule] | None = None) -> Check:
    """Which features of a program may change places, checked: `label`, `solve` and the self-check.

    >>> from torch import nn
    >>> from fxzip.tracing import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [space.size for space in analyse(trace(net, torch.ones(2, 4))).spaces.spaces]
    [8]

    Raises:
        SelfCheckError: relabelling at random moves the output, and pinning what fails does not cure it.
    """
    return check(label(program, rules))


def check(labelling: Labelling, *, seed: int = 0, dtype: torch.dtype | None = None) -> Check:
    """As `self_check`, with the spaces that it cannot see."""
    trial = Trial(labelling.program, seed, dtype, labelling)
    generator = torch.Generator().manual_seed(seed)
    found = _checked(trial, Check(solve(labelling), 0.0, {}), generator, seed)
    unseen = _unseen(trial, found.spaces, generator, None)
    first = None if unseen else trial

    for number, gain in enumerate(_GAINS, 1):
        if not unseen:
            break
        if trial.vary(seed + number, gain):
            for _ in range(_TIMES):  # with few features alive one relabelling may happen to be legal
                found = _checked(trial, found, generator, seed)
            unseen = _unseen(trial, found.spaces, generator, unseen)

    hidden = [movers for movers in _movers(found.spaces) if _first_label(found.spaces, movers[0]) in unseen]
    names = dict.fromkeys(found.spaces.spaces[number].name for movers in hidden for number in movers)
    trial.rest()

    return Check(found.spaces, found.error, found.pinned, tuple(names), first)


def _checked(trial: Trial, found: Check, generator: torch.Generator, seed: int) -> Check:
    """Relabel at random, and pin what fails."""
    pinned, spaces = found.pinned, found.spaces
    labelling = spaces.labelling

    for attempt in range(_ROUNDS):
        perms = random_relabelling(spaces, generator)
        worst, what = trial.departure(spaces, perms)
        if worst > trial.tolerance and not attempt:
            trial.calm(seed)
            worst, what = trial.departure(spaces, perms)
        if worst <= trial.tolerance:
            return Check(spaces, max(found.error, worst), pinned)
        culprits = _culprits(trial, spaces, perms)
        if not culprits:
            break
        pinned = pinned | culprits
        spaces = solve(labelling, pinned=pinned)

    raise SelfCheckError(
        f"Relabelling free feature spaces must leave {what} as it is; it moved by {worst:.1e} (relative), and "
        "pinning the spaces at fault did not cure it. Please report the model; `verify=False` skips the check."
    )


def _unseen(
    trial: Trial, spaces: FeatureSpaces, generator: torch.Generator, doubted: Collection[int] | None
) -> set[int]:
    """Of the spaces doubted (None: of those that do not move visibly at every node that carries them) those of which
    not even an illegal relabelling shows; by a label of theirs."""
    perms = random_relabelling(spaces, generator)
    still = trial.unmoved(spaces, perms) if doubted is None else set()
    unseen: set[int] = set()
    left = _CONTROLS

    for movers in _movers(spaces):
        key = _first_label(spaces, movers[0])
        if not (still.intersection(movers) if doubted is None else key in doubted):
            continue
        reads = _reads(spaces, movers)
        left -= 1
        if reads and (left < 0 or trial.departure(spaces, _only(perms, movers), reads)[0] <= trial.tolerance):
            unseen.add(key)

    return unseen


def _movers(spaces: FeatureSpaces) -> list[list[int]]:
    """Numbers of the spaces that move on their own, each, and of those that are tied, together."""
    movers: dict[tuple[bool, int], list[int]] = {}
    for number, space in enumerate(spaces.spaces):
        movers.setdefault((space.tie is None, number if space.tie is None else space.tie), []).append(number)
    return list(movers.values())


def _only(perms: Sequence[Tensor], moving: Collection[int]) -> list[Tensor]:
    """The relabelling of some spaces alone."""
    return [perm if number in moving else torch.arange(len(perm), device="cpu") for number, perm in enumerate(perms)]


def _first_label(spaces: FeatureSpaces, number: int) -> int:
    return int((spaces.klass == spaces.spaces[number].classes[0]).nonzero()[0])


def _reads(spaces: FeatureSpaces, movers: Collection[int]) -> set[tuple[str, int]]:
    """The places where parameters read the features; where none does, all on which they occur but the first. A
    relabelling that leaves these out is not legal."""
    places = [
        (name, place)
        for name, labels in spaces.labelling.params.items()
        for place, run in enumerate(labels.fields)
        if bool(torch.isin(spaces.layout(run).space, torch.tensor(sorted(movers), device="cpu")).any())
    ]
    return set(spaces.consumed.intersection(places)) or set(places[1:])


def _culprits(trial: Trial, spaces: FeatureSpaces, perms: list[Tensor]) -> dict[int, str]:
    """Labels to pin, with the reason: one by one, the space (or tie group) that ends the shortest failing prefix."""
    rest = _movers(spaces)

    def departure(chosen: Sequence[list[int]]) -> tuple[float, str]:
        return trial.departure(spaces, _only(perms, {number for movers in chosen for number in movers}))

    pinned: dict[int, str] = {}
    for _ in range(_CULPRITS):
        moved, what = departure(rest)
        if moved <= trial.tolerance:
            return pinned
        low, high = 0, len(rest)  # moving the first `low` passes, moving the first `high` fails
        while high - low > 1:
            middle = (low + high) // 2
            found = departure(rest[:middle])
            low, high = (middle, high) if found[0] <= trial.tolerance else (low, middle)
            moved, what = (moved, what) if found[0] <= trial.tolerance else found
        if not rest:
            return {}
        culprit = rest.pop(high - 1)
        why = f"relabelling it moved {what} by {moved:.1e}"
        _warn([f"`{spaces.spaces[n].name}` ({spaces.spaces[n].size} features)" for n in culprit], why)
        members = torch.isin(spaces.klass, torch.cat([spaces.spaces[n].classes for n in culprit]))
        pinned |= dict.fromkeys(members.nonzero().flatten().tolist(), why)
    return {}


def _warn(names: list[str], why: str) -> None:
    what = f"The space of {names[0]}" if len(names) == 1 else f"The spaces of {', '.join(names)}, tied blockwise,"
    warnings.warn(
        f"{what} failed the self-check: {why}. Its features are pinned: they are not merged.",
        PinnedSpaceWarning,
        stacklevel=5,
    )

"""A trunk of which zips with relabelled copies come out right: what fails is left out of it.

Each model is zipped with a relabelled copy (see `selfzip`). If a zip is wrong, halving finds the spaces of which it is
wrong once they are relabelled, and the trunk ends in front of the parameters that hold them; if it is wrong whatever
is relabelled, in front of the node at which it shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ..analysis.random_trial import Trial
from ..errors import AlignError, PinnedSpaceWarning, SelfCheckError
from ..partition.region import Trunk
from ..partition.trunk import shortened
from .known_merges import trunk_params
from .selfzip import Couple, Flaw

_ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Sound:
    """A trunk that passed, and what the report is to say of what was left out."""

    trunk: Trunk
    notes: tuple[str, ...] = ()


def sound(
    trunk: Trunk, pinned: Sequence[dict[int, str]], trial: Trial | None = None, *, by_position: bool = False,
    seed: int = 0,
) -> Sound:  # fmt: skip
    """The trunk, or as much of it as can be shared.

    Args:
        trunk: as it was found.
        pinned: per model, labels that must stay.
        trial: model 0 on random parameters, watched; None: it is made.
        by_position: as in `find_trunk`.
        seed: of the random parameters.

    Raises:
        SelfCheckError: what is wrong cannot be left out.
    """
    notes: list[str] = []
    for _ in range(_ROUNDS):
        found = _first_flaw(trunk, trial, seed)
        if found is None:
            return Sound(trunk, tuple(notes))
        couple, models, flaw = found
        barred, note = _left_out(trunk, couple, models, flaw)
        shorter = None
        # in front of what holds the culprits; if that leaves nothing, in front of the node that shows it
        for less in (barred, {name: why for name, why in barred.items() if name == flaw.node}):
            with suppress(AlignError):
                shorter = shorter or (shortened(trunk, less, pinned, by_position=by_position) if less else None)
        if shorter is None:
            break
        trunk = shorter
        notes.append(note)
        warnings.warn(note, PinnedSpaceWarning, stacklevel=4)
    raise SelfCheckError(
        f"A zip of model {models[0]} with a relabelled copy must compute what the model does; {flaw.what}, and an "
        "earlier end of the trunk did not cure it. Please report the model; `verify=False` skips the check."
    )


def _first_flaw(trunk: Trunk, trial: Trial | None, seed: int) -> tuple[Couple, tuple[int, int], Flaw] | None:
    trials = {0: trial}
    for i, j in couples(trunk):
        if trials.get(i) is None:
            trials[i] = Trial(trunk.alignment.programs[i], seed, None, trunk.labellings[i])
        own = trials[i]
        assert own is not None
        couple = Couple(coupled(trunk, i, j), own, seed)
        flaw = couple.flaw()
        if flaw is not None:
            return couple, (i, j), flaw
    return None


def _left_out(trunk: Trunk, couple: Couple, models: tuple[int, int], flaw: Flaw) -> tuple[dict[str, str], str]:
    """Nodes of model 0 that the trunk must do without, with the reason, and what to say of it."""
    own = couple.trunk
    back = {names[models[0]]: name for name, names in trunk.alignment.pairs.items()}
    spaces = own.spaces[0]
    culprits = _culprits(couple)
    if culprits:
        names = ", ".join(f"`{spaces.spaces[s].name}`" for s in culprits)
        held = {
            name
            for name in trunk_params(own)
            if name in spaces.labelling.params
            for run in spaces.labelling.params[name].fields
            if not set(culprits).isdisjoint(spaces.layout(run).space.tolist())
        }
        entering = set(own.alignment.entering(0))
        nodes = [back[node] for node in own.nodes if own.labellings[0].touches[node] & held or node in entering]
        why = f"a zip with a relabelled copy fails once the features of {names} are relabelled: {flaw.what}"
    else:
        nodes = [back[flaw.node]] if flaw.node in back else []
        why = f"a zip with a relabelled copy fails: {flaw.what}"
    note = f"The trunk ends earlier, since {why}."
    return dict.fromkeys(nodes, f"the self-check found that {why}"), note


def _culprits(couple: Couple) -> list[int]:
    """The spaces (or tied ones) that end the shortest failing run of them; none if it fails without."""
    movers: dict[tuple[bool, int], list[int]] = {}
    for number, space in enumerate(couple.trunk.spaces[0].spaces):
        movers.setdefault((space.tie is None, number if space.tie is None else space.tie), []).append(number)
    order = list(movers.values())
    if not order or couple.flaw(()) is not None:
        return []
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        failing = couple.flaw([number for mover in order[:middle] for number in mover]) is not None
        low, high = (low, middle) if failing else (middle, high)
    return order[high - 1]


def couples(trunk: Trunk) -> list[tuple[int, int]]:
    """Which models are zipped with which: each with the first one where their tensors in the trunk have the same sizes,
    else with itself. Where the trunk begins behind stems, each with itself."""
    alike = [k for k in range(1, len(trunk.spaces)) if not trunk.alignment.stems and _alike(trunk, k)]
    own = [(k, k) for k in range(1, len(trunk.spaces)) if k not in alike]
    return [*([(0, k) for k in alike] or [(0, 0)]), *own]


def _alike(trunk: Trunk, k: int) -> bool:
    """Whether the trunk's tensors have the sizes that model 0's have."""
    modules = [trunk.alignment.programs[i].module for i in (0, k)]
    first, own = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in modules)
    return all(first[name].shape == own[trunk.alignment.params[name][k]].shape for name in trunk_params(trunk))


def coupled(trunk: Trunk, i: int, j: int) -> Trunk:
    """The trunk of models i and j alone."""
    own = trunk.alignment
    alignment = replace(
        own,
        programs=(own.programs[i], own.programs[j]),
        pairs={twins[i]: (twins[i], twins[j]) for twins in own.pairs.values()},
        params={twins[i]: (twins[i], twins[j]) for twins in own.params.values()},
        parting=("",),
        stems=tuple(own.stems[k] for k in (i, j)) if own.stems else (),
    )
    return replace(
        trunk,
        alignment=alignment,
        labellings=(trunk.labellings[i], trunk.labellings[j]),
        nodes=tuple(trunk.names(i).values()),
        spaces=(trunk.spaces[i], trunk.spaces[j]),
        ends={},
    )

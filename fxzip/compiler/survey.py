"""What is known of the models before anything is cut or merged, and where they may be cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ..analysis import Labelling, check, label
from ..analysis.flops import flops_of
from ..analysis.random_trial import Trial
from ..errors import AlignError, BarrierError, CutError
from ..partition.alignment import Alignment, align
from ..partition.cut_points import Cut, SharedLayers, find_cuts, shared_layers
from ..partition.lifting import lifted
from ..partition.own import differing
from ..partition.region import Trunk
from ..partition.stems import find_stems
from ..partition.trunk import trunk_of, whole_trunk
from ..tracing import Program, names_of, plain_context
from ..tracing.calls import Call
from ..tracing.joint_inputs import trace_all
from ..widths.narrow_heads import whole_trunks
from ..widths.prices import Prices
from .options import Options
from .progress import Display
from .soundness import Sound, sound


@dataclass(frozen=True, eq=False)
class Survey:
    """What is known of the models before anything is cut or merged.

    Attributes:
        alignment: which nodes of the models are the same; holds the programs.
        labellings: labels of each model.
        pinned: per model, labels that failed the self-check, with the reason.
        errors: relative error of each model's self-check; None: not run.
        notes: what the self-check could not see.
        trial: model 0 on random parameters, as the self-check ran it; None: that was not run, or is to be run anew.
        strict: a place where features cannot be matched is an error.
        by_position: features that cannot be matched are averaged place by place.
    """

    alignment: Alignment
    labellings: tuple[Labelling, ...]
    pinned: tuple[dict[int, str], ...]
    errors: tuple[float | None, ...]
    notes: tuple[str, ...] = ()
    trial: Trial | None = None
    strict: bool = False
    by_position: bool = False

    @cached_property
    def flops(self) -> tuple[Mapping[str, int], ...]:
        """FLOPs of every node of every model on its sample."""
        return tuple(flops_of(program).by_node for program in self.alignment.programs)

    @cached_property
    def shared_layers(self) -> SharedLayers | None:
        """First layers that all models have in common to the bit."""
        return shared_layers(self.alignment, self.labellings[0])

    @property
    def shared_flops(self) -> int:
        """FLOPs of these layers in model 0."""
        nodes = self.shared_layers.nodes if self.shared_layers is not None else ()
        return sum(self.flops[0].get(name, 0) for name in nodes)

    @cached_property
    def whole_trunks(self) -> dict[int, Trunk]:
        """Each model as a trunk by itself, by its number; those without parameters are left out."""
        return whole_trunks(self.alignment, self.labellings, self.pinned)

    @cached_property
    def _tried(self) -> dict[int, tuple[Trunk, Sound]]:
        """Trunks of which a zip was tried, by identity, and what came of it."""
        return {}

    def sound(self, trunk: Trunk) -> Sound:
        """As much of a trunk as can be shared: zips of it with relabelled copies are tried (see `soundness`)."""
        if None in self.errors:
            return Sound(trunk)
        if id(trunk) not in self._tried:
            result = sound(trunk, self.pinned, self.trial, by_position=self.by_position)
            self._tried.update({id(trunk): (trunk, result), id(result.trunk): (result.trunk, result)})
        return self._tried[id(trunk)][1]

    def trunk(self, until: str | float | None = None, *, whole: bool = False) -> Trunk:
        """The trunk that ends at `until`, or (`whole`) at the outputs."""
        flops = self.flops[0] if isinstance(until, float) else None
        if whole:
            return whole_trunk(self.alignment, self.labellings, self.pinned)
        result = trunk_of(
            self.alignment, self.labellings, until=until, flops=flops, pinned=self.pinned, by_position=self.by_position
        )
        if self.strict and result.unmatched:
            raise BarrierError(
                f"`strict=True` allows no place where features cannot be matched; {len(result.unmatched)} found:\n  "
                + "\n  ".join(f"node `{name}`: {reason}" for name, reason in result.unmatched.items())
                + "\nChoose an earlier cut with `until`, or `strict=False` to stop sharing there."
            )
        return result


@plain_context()
def survey(
    networks: Sequence[nn.Module], call: Call, options: Options | None = None, *, others: Sequence[Call] = (),
    display: Display | None = None,
) -> Survey:  # fmt: skip
    """The stages that depend on neither cut nor method: trace -> label, self-check -> align.

    Args:
        networks: the models.
        call: the sample input.
        options: of the request; None: the defaults.
        others: inputs of other shapes, on which the traces have to be right, too.
        display: shows how far it is.
    """
    options, display = options or Options(), display or Display(show=False)
    rules, start = options.rules, options.start
    with display.stage("tracing"):
        programs: Sequence[Program] = trace_all(networks, call, others)
        labellings = tuple(label(program, rules) for program in programs)
    if options.strict:
        _no_barriers(labellings)
    alignment = align(programs, () if start is None else find_stems(labellings, start))
    before = labellings[0]
    as_trained = options.by_position or options.base is not None  # merges what was trained, place by place
    found = _with_lifted(alignment, labellings, weights=not as_trained)
    if found is not None:
        programs, labellings = found, tuple(label(program, rules) for program in found)
        alignment = align(programs, () if start is None else find_stems(labellings, start))
    with display.stage("checking"):
        checks = [check(labelling) if options.verify else None for labelling in labellings]
    return Survey(
        alignment,
        labellings,
        pinned=tuple({} if own is None else own.pinned for own in checks),
        errors=tuple(None if own is None else own.error for own in checks),
        notes=tuple(
            f"model {k}: {note}"
            for k, (program, own) in enumerate(zip(programs, checks, strict=True))
            for note in (*program.strays.notes, *(own.notes if own else ()))
        )
        + _about_weights(before, programs[0]),
        trial=None if checks[0] is None else checks[0].trial,
        strict=options.strict,
        by_position=options.by_position,
    )


def _about_weights(before: Labelling, after: Program) -> tuple[str, ...]:
    """What the report says of weights that have become parameters: the nodes that computed them are gone."""
    kept = {node.name for node in after.module.graph.nodes}
    nodes = [node for node in before.program.module.graph.nodes if node.name not in before.dynamic | kept]
    gone = [node.name for node in nodes if node.op != "get_attr"]
    if not gone:
        return ()
    where = names_of(gone)
    return (f"what the models compute from parameters alone in {where} is a parameter of the zip, which can be merged",)


def _with_lifted(alignment: Alignment, labellings: Sequence[Labelling], *, weights: bool) -> list[Program] | None:
    """The programs with scalars in which they differ lifted to features, and with `weights` that are computed from
    parameters; None where there are none, or not in all."""
    differ = differing(alignment)
    if not differ and not weights:
        return None
    result = [
        lifted(own, {alignment.params[name][k] for name in differ}, weights=weights) for k, own in enumerate(labellings)
    ]
    return None if any(program is None for program in result) else [p for p in result if p is not None]


def cuts_and_trunks(found: Survey, limit: int = 32, prices: Prices | None = None) -> tuple[list[Cut], list[Trunk]]:
    """Where the trunk may end, in a row, and the trunks; cuts that cannot be solved for all models alike are left out.

    Args:
        found: what is known of the models.
        limit: cuts at most.
        prices: of every node of every model, for the cuts' costs; None: FLOPs.

    Raises:
        AlignError: nothing can be shared.
    """
    full = found.trunk()
    pairs = []
    spent = None if prices is None else [{name: price.at(1.0) for name, price in own.items()} for own in prices]
    for cut in find_cuts(full, found.flops, limit=limit, spent=spent):
        with suppress(AlignError, CutError):
            trunk = full if cut.until is None else found.trunk(cut.until)
            if not trunk.alike:  # else the heads would read a value that is nobody's own
                pairs.append((cut, trunk))
    return [cut for cut, _ in pairs], [trunk for _, trunk in pairs]


def _no_barriers(labellings: Sequence[Labelling]) -> None:
    reasons = dict.fromkeys(f"model {k}: {b.reason}" for k, one in enumerate(labellings) for b in one.barriers)
    if reasons:
        raise BarrierError(
            f"`strict=True` allows no barrier; {len(reasons)} found:\n  " + "\n  ".join(reasons)
            + "\nPass `rules=fxzip.RULES | {...}` with a rule for each, or `strict=False` to stop sharing there."
        )  # fmt: skip

"""Where the trunk ends: the largest part of the common graph, from the inputs on, that may and shall be shared.

Four things end it: the programs part; the user says so (`until`); what a model returns is its own; or sharing would not
be sound, because features cannot be matched or told apart again (see `own`). The latter is decided by what the nodes of
the trunk say of labels, and by nothing that the heads do: a cut before a call without a rule, or before one that fixes
the order of features, makes the features in front of it free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import fx

from ..analysis.checking import Check, check
from ..analysis.flops import flops_of
from ..analysis.labelling import Labelling
from ..errors import AlignError, CutError
from .alignment import Alignment
from .own import weights_behind
from .region import Trunk
from .trunk_search import TrunkSearch, different_shapes, shareable
from .unmatched import Common


def find_trunk(
    alignment: Alignment, analyses: Sequence[Check | Labelling], *, until: str | float | None = None,
    whole: bool = False, by_position: bool = False,
) -> Trunk:  # fmt: skip
    """Choose the trunk.

    Args:
        alignment: of the programs, from `align`.
        analyses: what `analyse` found of each program. One that was only labelled is checked here.
        until: where it ends: a node name or a module path of model 0, a fraction in [0, 1] of the FLOPs of model 0
            (0: nothing is shared), or None, as late as it can.
        whole: as `whole_trunk` gives it.
        by_position: what cannot be matched may be averaged place by place, as `method="average"` asks for.

    Raises:
        AlignError: nothing can be shared.
        CutError: `until` names nothing, or something that the models do not share.
    """
    checks = [one if isinstance(one, Check) else check(one) for one in analyses]
    labellings, pinned = [one.spaces.labelling for one in checks], [one.pinned for one in checks]
    if whole:
        return whole_trunk(alignment, labellings, pinned)
    return trunk_of(alignment, labellings, until=until, pinned=pinned, by_position=by_position)


def trunk_of(
    alignment: Alignment, labellings: Sequence[Labelling], *, until: str | float | None = None,
    flops: Mapping[str, int] | None = None, pinned: Sequence[dict[int, str]] | None = None, by_position: bool = False,
) -> Trunk:  # fmt: skip
    """The trunk, of labels whose check is the caller's matter: `pinned` holds per model the labels that failed it.

    `flops`: of each node of model 0, if they have been counted. `by_position`: as in `find_trunk`.

    Raises:
        AlignError: nothing can be shared.
        CutError: `until` names nothing, or something that the models do not share.
    """
    search = _search(alignment, labellings, pinned, by_position)
    if isinstance(until, str):
        return search.up_to(until)
    if until == 0 and not isinstance(until, bool):
        return search.apart()
    ends = search.unsound()
    names = search.closed(alignment.pairs.keys() - ends.keys())
    if until is not None:
        program = alignment.programs[0]
        counted = flops_of(program).by_node if flops is None else flops
        return _share(search, names, ends, float(until), counted)
    return search.deepest(names, ends)


def whole_trunk(
    alignment: Alignment, labellings: Sequence[Labelling], pinned: Sequence[dict[int, str]] | None = None
) -> Trunk:
    """The trunk that goes on to the outputs, past calls without a rule too.

    That is the basis in which networks are relabelled and interpolated; for sharing it would not do.

    Raises:
        AlignError: nothing can be shared.
    """
    return _search(alignment, labellings, pinned).whole()


def _search(
    alignment: Alignment, labellings: Sequence[Labelling], pinned: Sequence[dict[int, str]] | None = None,
    by_position: bool = False,
) -> TrunkSearch:  # fmt: skip
    graph, order = shareable(alignment)
    _check_entries(alignment, labellings)
    pinned = pinned or [{} for _ in labellings]
    common = Common(alignment, tuple(labellings), tuple(pinned), tuple(order), by_position)
    return TrunkSearch(alignment, tuple(labellings), graph, order, common)


def shortened(
    trunk: Trunk, barred: Mapping[str, str], pinned: Sequence[dict[int, str]], *, by_position: bool = False
) -> Trunk:
    """The trunk without some of its nodes (name in model 0 -> reason), and without all that needs them.

    Raises:
        AlignError: nothing is left that could be shared.
    """
    graph, order = shareable(trunk.alignment)
    common = Common(trunk.alignment, trunk.labellings, tuple(pinned), tuple(order), by_position)
    search = TrunkSearch(trunk.alignment, trunk.labellings, graph, order, common)
    return search.deepest(search.closed(set(trunk.nodes) - barred.keys()), {**trunk.ends, **barred})


def _check_entries(alignment: Alignment, labellings: Sequence[Labelling]) -> None:
    """What enters the trunk from the stems must look alike, but for the number of features."""
    for twins in alignment.entries:
        reason = different_shapes(labellings, twins)
        if reason:
            raise CutError(
                f"Values that are merged at `start` must look alike in all models, but for their features; of "
                f"`{twins[0]}` {reason}. Choose another place, or another size of the sample input."
            )


def _share(search: TrunkSearch, names: set[str], ends: dict[str, str], until: float, flops: Mapping[str, int]) -> Trunk:
    """The trunk within a share of all FLOPs.

    Raises:
        AlignError: nothing with weights takes so little.
    """
    try:
        return search.deepest(search.closed(_fraction(search.order, names, until, flops)), ends)
    except AlignError as error:
        deepest = search.deepest(names, ends)  # where not even that has anything, its error says so
        least = _least(search, deepest, names, flops)
        raise AlignError(
            f"`until={until:g}` must leave something to share; no node with parameters lies before the cut. The first "
            f"one takes, with what is in front of it, {least:.2g} of the FLOPs: ask for that at least."
        ) from error


def _least(search: TrunkSearch, trunk: Trunk, names: set[str], flops: Mapping[str, int]) -> float:
    """The share of all FLOPs up to the first node of a trunk that has weights, rounded up to two digits."""
    label = trunk.labellings[0]
    behind, spent = weights_behind(label), 0
    for node in search.order:
        spent += flops.get(node.name, 0) if node.name in names else 0
        if node.name in trunk.nodes and node.name in label.dynamic and behind[node.name]:
            break
    share = spent / max(sum(flops.values()), 1)
    digits = 1 - math.floor(math.log10(share)) if share else 0
    return float(math.ceil(share * 10**digits) / 10**digits)


def _fraction(order: Sequence[fx.Node], names: set[str], share: float, flops: Mapping[str, int]) -> set[str]:
    """The sharable nodes in order, up to the first whose FLOPs would make it more than a share of all FLOPs."""
    if not 0 < share <= 1:  # of nothing there is no search
        raise CutError(f"`until` as a fraction of the FLOPs must lie in [0, 1]; found {share}.")
    budget = share * sum(flops.values())
    kept: set[str] = set()
    for node in order:
        cost = flops.get(node.name, 0) if node.name in names else 0
        if cost > budget:
            break
        budget -= cost
        kept.add(node.name)
    return kept & names

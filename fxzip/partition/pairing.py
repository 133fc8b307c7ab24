"""Which feature spaces of several models stand for one another: those on the same parameters, in the same order along
each of their axes. In which order a model's spaces were found says nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..analysis.rules import varying
from ..analysis.spaces import FeatureSpaces
from ..errors import AlignError
from .alignment import Alignment


def pair_spaces(alignment: Alignment, spaces: Sequence[FeatureSpaces]) -> tuple[FeatureSpaces, ...]:
    """The spaces of all models, numbered as those of model 0 that occur on the same parameters.

    Raises:
        AlignError: the models do not have the same spaces.
    """
    signatures = [
        _signatures(own, {twins[k]: name for name, twins in alignment.params.items()}, alignment.entering(k))
        for k, own in enumerate(spaces)
    ]
    paired = []
    for k, own in enumerate(signatures):
        places = {signature: number for number, signature in enumerate(own)}
        if set(places) != set(signatures[0]) or len(places) != len(own):
            raise AlignError(
                f"Models that are zipped must have the same feature spaces in the trunk; model 0 has "
                f"{len(signatures[0])}, model {k} has {len(own)}. Choose an earlier cut with `until`."
            )
        paired.append(spaces[k].renumbered([places[signature] for signature in signatures[0]], spaces[0]))
    return tuple(paired)


def _signatures(spaces: FeatureSpaces, names: Mapping[str, str], entering: Mapping[str, int]) -> list[tuple]:
    """Per space: on which parameters, in which field, behind how many others there, how often each feature occurs, and
    in how many blocks.

    Values that enter from the stem (`entering`: their nodes and numbers) count as parameters.
    """
    found: list[dict[tuple[str, int], tuple[int, int]]] = [{} for _ in spaces.spaces]

    def count(labels: Tensor, name: str, place: int) -> None:
        layout = spaces.layout(labels)
        order = list(dict.fromkeys(layout.space[layout.space >= 0].tolist()))
        for rank, number in enumerate(order):
            here = layout.space == number
            found[number][name, place] = rank, int(layout.occurrence[here].max()) + 1

    for param, twin in names.items():
        if param not in spaces.labelling.params:
            continue
        for place, labels in enumerate(spaces.labelling.params[param].fields):
            count(labels, twin, place)
    for node, entry in entering.items():
        for labels in spaces.labelling.fields.get(node, ()):
            count(labels, f"entry {entry}", min(varying(labels)))
    return [
        (
            space.legality,
            None if space.blocks is None else len(space.blocks),
            tuple(sorted(places.items())),
            0 if places else sum(not earlier for earlier in found[:number]),  # no parameter holds it
        )
        for number, (space, places) in enumerate(zip(spaces.spaces, found, strict=True))
    ]

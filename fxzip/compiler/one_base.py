"""Fine-tunes of one base: what is given of it, how its fine-tunes are recognised, and what that decides.

Networks trained from different initialisations have features in different orders, and their kernels, place by place, a
cosine of about 0. Fine-tuning moves weights little: features stay where they were. So networks count as fine-tunes of
one base where nine of ten weights of the graph that they have in common (parameters with two axes or more) have a
cosine of at least a half with the first network's. Then nothing has to be matched. Least squares is the exception: it
finds its coefficients itself, and features merged by what they tell, across places too, serve it better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis import Labelling
from ..errors import InputError, OptionError
from ..matching import Method, TaskVectorMethod, resolve
from ..matching.weights_of_models import weighted
from ..partition.alignment import Alignment
from ..partition.own import heads_begin, weights_behind
from ..tracing.preparation import check_model, copied, folded
from ..widths.requests import UNCHANGED
from .options import Recipe
from .pairs import method_for_fine_tunes
from .survey import Survey

NEAR, MOST = 0.5, 0.9
"""The cosine of a weight with the first network's, and the share of the weights that must have it."""


def base_tensors(base: Any) -> dict[str, Tensor] | None:
    """Parameters and buffers of what is given as `base`, by name; parametrisations folded, as tracing does it.

    >>> sorted(base_tensors(nn.Linear(2, 1)))
    ['bias', 'weight']

    Raises:
        InputError: it is neither a network nor a state dict.
    """
    if base is None:
        return None
    if isinstance(base, nn.Module):
        own = folded(copied(check_model(base, "base"), "base"))
        both = (*own.named_parameters(remove_duplicate=False), *own.named_buffers(remove_duplicate=False))
        return {name: value.detach() for name, value in both}
    if isinstance(base, Mapping):
        found = {name: value.detach() for name, value in base.items() if isinstance(value, Tensor)}
        if found:
            return found
    raise InputError(
        "`base` must be a network, or its state dict: tensors by the names of its parameters; found "
        f"`{type(base).__name__}`{' without a tensor' if isinstance(base, Mapping) else ''}. Pass the network that the "
        "models were fine-tuned from."
    )


def takes_base(method: Method) -> bool:
    """Whether a method looks at the base."""
    return isinstance(method, TaskVectorMethod)


def check_base(base: Any, recipe: Recipe, *, named: bool = True) -> None:
    """A base and a method must go together; `named`: the user has named the method.

    Raises:
        OptionError: the method needs a base and there is none, or it takes none.
    """
    needed = takes_base(recipe.method)
    if needed and base is None:
        raise OptionError(
            f'`method="{recipe.method.name}"` needs `base`, the network that the models were fine-tuned from, or its '
            'state dict; found None. Without it use `method="average"`.'
        )
    if base is not None and not needed and named:
        raise OptionError(
            f"`base` must go with a method that merges what fine-tuning has changed; found `{recipe.method!r}`, which "
            'does not look at it. Use `method="task-arithmetic"`, "ties", "tsv" or "iso-c", or leave `base` out.'
        )


def about_base(recipe: Recipe, base: Mapping[str, Tensor] | None) -> list[str]:
    """What the report says of networks that were recognised, and of a base that nothing looks at."""
    if base is not None and not takes_base(recipe.method):
        name = recipe.method.name
        return [f'`base` was not looked at: `method="auto"` is `{name}` in front of this refit, which does without']
    if recipe.nearness is None:
        return []
    known = (
        f"the models are fine-tunes of one base: nine of ten of their weights have a cosine of at least "
        f"{recipe.nearness:.2f} with those of the first, place by place"
    )
    if recipe.by_position:
        return [f"{known}. So features are taken as they stand, and nothing is matched"]
    return [f"{known}. They are matched all the same, for least squares does better by that"]


@dataclass(frozen=True)
class Closeness:
    """How near networks are to the first, weight by weight.

    Attributes:
        shares: of each network behind the first, the share of its weights that are near.
        least: the cosine that `MOST` of the weights of every network have at least.
    """

    shares: tuple[float, ...]
    least: float

    @property
    def fine_tunes(self) -> bool:
        """Whether they count as fine-tunes of one base."""
        return min(self.shares, default=0.0) >= MOST


def closeness(alignment: Alignment, first: Labelling) -> Closeness:
    """How near the weights of the networks' common graph are to the first network's; those of their heads do not count.

    `first`: the labels of the first network.
    """
    heads = heads_begin(first, None)
    own = {param for node, params in weights_behind(first).items() if node in heads for param in params}
    tensors = [dict(program.module.named_parameters()) for program in alignment.programs]
    cosines: list[list[float]] = [[] for _ in tensors[1:]]
    for name in [name for name in alignment.params if name not in own]:
        weight = tensors[0].get(name)
        if weight is None or not weight.is_floating_point() or sum(n > 1 for n in weight.shape) < 2:
            continue
        for k, found in enumerate(cosines, 1):
            found.append(_cosine(weight, tensors[k].get(alignment.params[name][k])))
    if not cosines or not cosines[0]:
        return Closeness((), 0.0)
    shares = tuple(sum(one >= NEAR for one in found) / len(found) for found in cosines)
    ranked = [sorted(found, reverse=True) for found in cosines]
    return Closeness(shares, min(found[max(round(MOST * len(found)) - 1, 0)] for found in ranked))


def _cosine(a: Tensor, b: Tensor | None) -> float:
    """The cosine of two weights; 0 where they have no common shape, 1 where both are 0."""
    if b is None or a.shape != b.shape:
        return 0.0
    one, other = a.detach().flatten().double(), b.detach().flatten().double()
    sizes = float(one.norm() * other.norm())
    return float(one @ other) / sizes if sizes else float(torch.equal(one, other))


def for_fine_tunes(recipe: Recipe, survey: Survey) -> Recipe:
    """Where the method was left open and the networks are fine-tunes of one base, the recipe with the method for those.

    Another number of features than the first network's (`width`) needs features that are matched.

    Raises:
        OptionError: there are weights of the models, and the method takes none.
    """
    if recipe.automatic and recipe.width == UNCHANGED:
        found = closeness(survey.alignment, survey.labellings[0])
        if found.fine_tunes:
            method = resolve("average" if recipe.weights else method_for_fine_tunes(recipe.refit))
            recipe = replace(recipe, method=method, nearness=found.least)
    if recipe.weights is not None:
        recipe = replace(recipe, method=weighted(recipe.method, recipe.weights))
    return recipe


def weights_by_model(weights: Any, tasks: tuple[str, ...], models: int) -> tuple[float, ...] | None:
    """The weights of the models in their order.

    >>> weights_by_model({"birds": 1, "pets": 3}, ("pets", "birds"), 2)
    (3.0, 1.0)

    Raises:
        OptionError: they are no numbers, or not one for each model.
    """
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        if set(weights) != set(tasks):
            there = ", ".join(map(repr, tasks)) or "models without names"
            raise OptionError(
                f"`weights` by name must have the names of the models, {there}; found {', '.join(map(repr, weights))}."
            )
        weights = [weights[task] for task in tasks]
    try:
        found = tuple(float(weight) for weight in weights)
    except (TypeError, ValueError):
        raise OptionError(
            f"`weights` must hold a number for each model, or be a dict of them by name; found {weights!r}."
        ) from None
    if len(found) != models:
        raise OptionError(
            f"`weights` must hold one number for each of the {models} models; found {len(found)}. Models given by name "
            "take weights by name."
        )
    return found

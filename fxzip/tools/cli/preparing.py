"""What a recipe names, made: networks with their weights, sources of data, an input to trace with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxzip.matching import resolve

from ...errors import RecipeError
from .models import Network, networks
from .packages import called, function_of
from .preprocessing import Preprocessing, chosen
from .recipe import Data, ZipRecipe, by_task
from .sources import Moved, Source, source

_TRACED = 4  # inputs of a batch that networks are traced and checked with


@dataclass(frozen=True, eq=False)
class Prepared:
    """A recipe made. Nothing has been computed yet.

    Attributes:
        networks: by the names of the tasks.
        data: sources to match and fit on, by task, or of all under None; empty without data.
        test: sources to judge by, in the same form.
        sample: what the networks are traced with.
        device: where the networks are.
        notes: what was converted, left out, or is worth knowing before anything runs.
    """

    networks: dict[str, Network]
    data: dict[str | None, Source]
    test: dict[str | None, Source]
    sample: Any
    device: torch.device
    notes: list[str] = field(default_factory=list)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks by the names of their tasks."""
        return {task: own.module for task, own in self.networks.items()}

    @property
    def batches(self) -> Any:
        """The data in the form that `compile_zip` takes, where models are given by name."""
        return self.moved(self.data)

    def moved(self, sources: Mapping[str | None, Source]) -> Any:
        """The batches of sources on the device of the networks; None where there are no sources."""
        found = {task: Moved(own.batches, self.device) for task, own in sources.items()}
        return found.get(None, found) if found else None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images of each task become inputs, as plain data; empty where inputs are no images."""
        found = {}
        for task, own in self.networks.items():
            read = self.data.get(task, self.data.get(None))
            how = own.preprocessing if read is None else read.preprocessing
            if how is not None:
                found[task] = how.values()
        return found


def prepare(recipe: ZipRecipe, method: Any = "auto", refit: Any = "auto") -> Prepared:
    """Make what a recipe names. `method`, `refit`: to see whether data are needed.

    Raises:
        RecipeError: something in it is missing, unknown or does not fit; all that is wrong with its networks is listed.
    """
    if len(recipe.models) < 2:
        raise RecipeError(f"`models` must be at least two networks by name; found {len(recipe.models)}.")
    made = networks(recipe.models, recipe.device)
    data = sources(recipe.data, made, "data", labels=False)
    if not data:
        _needs_no_data(method, refit)
    device = torch.device(recipe.device)
    sample = Moved([traced_with(recipe, made, data)], device)
    notes = [note for own in made.values() for note in own.notes]
    result = Prepared(made, data, sources(recipe.test, made, "test", labels=True), next(iter(sample)), device, notes)
    notes.extend(_differing(result))
    return result


def sources(
    data: Data | Mapping[str, Data] | None, made: Mapping[str, Network], where: str, *, labels: bool
) -> dict[str | None, Source]:
    """The sources that `data` or `test` of a recipe names.

    Raises:
        RecipeError: names are not those of the tasks, or inputs of all tasks would have to be preprocessed differently.
    """
    if data is None:
        return {}
    named = by_task(data)
    if None in named:
        return {None: source(named[None], _common(named[None], made, where), where, labels=labels)}
    if set(named) != set(made):
        raise RecipeError(
            f"`{where}` by task must have the names of `models`, {', '.join(made)}; found {', '.join(map(str, named))}."
        )
    # In the order of the models, whatever the recipe's.
    return {task: source(named[task], made[task].preprocessing, f"{where}.{task}", labels=labels) for task in made}


def _common(data: Data, made: Mapping[str, Network], where: str) -> Preprocessing | None:
    """The preprocessing that all models have, as `data` changes it."""
    owns = {task: own.preprocessing for task, own in made.items()}
    if not any(owns.values()):
        return None
    found = {}
    for task, own in owns.items():
        try:
            found[task] = chosen(data, own, where)
        except RecipeError:  # a model without preprocessing of its own is content with that of the others
            continue
    if len(set(found.values())) > 1:
        lines = "".join(f"\n  {task}: {own.values()}" for task, own in found.items())
        raise RecipeError(
            f"The models preprocess images differently, and `{where}` is of all of them:{lines}\nSay under `{where}` "
            "what holds for all (`size`, `resize`, `interpolation`, `mean`, `std`), or give each task data of its own."
        )
    return next(own for own in owns.values() if own is not None)


def _differing(made: Prepared) -> list[str]:
    """A note where tasks with data of their own preprocess it differently."""
    found = made.preprocessing
    if len({str(own) for own in found.values()}) < 2:
        return []
    lines = "; ".join(f"{task}: {own}" for task, own in found.items())
    return [f"inputs of the tasks are preprocessed differently, while an input of the zip goes to all heads: {lines}"]


def traced_with(recipe: ZipRecipe, made: Mapping[str, Network], data: Mapping[str | None, Source]) -> Any:
    """What the networks are traced with."""
    given = recipe.sample_input
    if isinstance(given, list):
        if len(given) < 1 or any(size < 1 for size in given):
            raise RecipeError(f"`sample_input` must be a shape of positive sizes, the batch first; found {given}.")
        return _random(given)
    if given is not None:
        return called(function_of(given.relative, "sample_input"), {}, given.relative, "sample_input")
    for own in data.values():
        return _some(next(iter(own.batches), None))
    shape = next((own.shape for own in made.values() if own.shape is not None), None)
    if shape is None:
        raise RecipeError(
            "`sample_input` must say what the networks take, since there is no `data`: a shape with the batch first, "
            "such as `[4, 3, 224, 224]`, or `package.module:function`."
        )
    return _random([_TRACED, *shape])


def _random(shape: list[int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _some(batch: Any) -> Any:
    """The first inputs of a batch, without labels."""
    if isinstance(batch, Tensor):
        return batch[:_TRACED]
    if isinstance(batch, Mapping):
        return {name: value[:_TRACED] for name, value in batch.items()}
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (Tensor, Mapping)):
        return _some(batch[0])
    raise RecipeError(
        f"`sample_input` must say what the networks take: a batch of `data` is a `{type(batch).__name__}`. Name a "
        "function that returns one batch of inputs, `package.module:function`."
    )


def _needs_no_data(method: Any, refit: Any) -> None:
    """Without data the sample would serve, and here it is random numbers.

    Raises:
        RecipeError: something would be matched or fitted by it.
    """
    matched = method == "auto" or "moments" in resolve(method).needs
    if matched or refit not in ("auto", "stored", None):
        raise RecipeError(
            f"`data` is missing: `method: {method}` with `refit: {refit}` matches and fits features by what inputs "
            "show. Name unlabelled inputs under `data`, or match by weights alone with `method: weights`."
        )


def note(text: str, *, quiet: bool) -> None:
    """A line for whoever watches the command."""
    if not quiet:
        print(f"fxzip: note: {text}", file=sys.stderr)

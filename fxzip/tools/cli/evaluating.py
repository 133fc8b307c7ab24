"""`fxzip evaluate folder --data …`: accuracy on labelled inputs, agreement with the originals on any."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fxzip
from fxzip.rewriting.module import ZippedModule

from ...errors import RecipeError
from .judging import labelled_batches, onnx_network
from .models import Network, networks
from .output import Result
from .packages import called, function_of
from .parsing import Flags, Settings, keys_of, parse, recipe_in
from .preparing import note, sources
from .preprocessing import Preprocessing, chosen
from .recipe import Data, Location, ZipRecipe, by_task
from .sources import Inputs, Source

SUMMARY = "judge a zipped network: a folder of `fxzip zip`, or a file .onnx of `fxzip export`"
_ALL = 2**62  # batches: all there are


@dataclass
class Keys:
    """The inputs. Keys of it as in a recipe: --data.TASK.path, --data.TASK.size and so on.

    Args:
        data: inputs of all tasks together, or of each by its name.
    """

    data: Data | dict[str, Data] | None = None


def settings(arguments: Sequence[str]) -> Settings:
    """What the command is asked for."""
    keys = keys_of(Keys)
    more = (
        "Labelled data (--data.TASK=FOLDER, a folder of images for each class) give the accuracy of each head. With "
        "--recipe each head is compared with its original, and labels are not needed."
    )
    flags = Flags("evaluate", SUMMARY, keys, more)
    flags.add_argument("target", type=Path, help="the folder or file")
    flags.add_argument(
        "--recipe", type=Path, metavar="RECIPE", help="whose networks are the originals, and whose `test` is the data"
    )
    flags.trust()
    flags.json()
    return parse(flags, keys, arguments)


def run(asked: Settings) -> Result:
    """Accuracy, agreement, or both."""
    flags = asked.flags
    network = opened(flags.target, flags.trust)
    recipe = None if flags.recipe is None else recipe_in(flags.recipe)
    data = asked.keys.data if asked.keys.data is not None or recipe is None else recipe.test
    if data is None:
        raise RecipeError("`fxzip evaluate` needs inputs: `--data`, or a `--recipe` with `test`.")
    tasks = network.tasks or tuple(f"head_{k}" for k in range(len(network.heads)))
    originals = {} if recipe is None else networks(recipe.models)
    if originals and set(originals) != set(tasks):
        raise RecipeError(f"The recipe is of {', '.join(originals)}; `{flags.target}` is of {', '.join(tasks)}.")
    _check_inputs(recipe)
    found = sources(data, _known(network, tasks, recipe, originals), "data", labels=True)
    for own in originals.values():
        for text in own.notes:
            note(text, quiet=flags.quiet)
    labelled = None not in found and all(own.labelled for own in found.values())
    if not labelled and not originals:
        raise RecipeError(
            "`--data` must be labelled, by task (`--data.TASK=FOLDER` with a folder of images for each class), or "
            f"`--recipe` name the originals. The tasks are {', '.join(tasks)}."
        )
    return _judged(network, tasks, found, originals, labelled)


def _check_inputs(recipe: ZipRecipe | None) -> None:
    """Raises if the networks of a recipe take inputs of their own, which `fxzip.agreement` does not compare."""
    if recipe is None or not isinstance(recipe.sample_input, Location):
        return
    name = recipe.sample_input.relative
    if isinstance(called(function_of(name, "sample_input"), {}, name, "sample_input"), fxzip.PerModel):
        raise RecipeError(
            "`fxzip evaluate --recipe` compares networks that take the same inputs; those of the recipe take inputs of "
            "their own. Leave `--recipe` out, and give labelled data of each task with all inputs."
        )


def _judged(
    network: ZippedModule, tasks: tuple[str, ...], found: Mapping[str | None, Source], originals: Mapping[str, Network],
    labelled: bool,
) -> Result:  # fmt: skip
    lines: list[str] = []
    values: dict[str, Any] = {"tasks": list(tasks)}
    if labelled:
        own = {str(task): source for task, source in found.items()}
        scores = {"zipped": _accuracy(network, own)}
        if originals:
            whole = fxzip.side_by_side([originals[task].module for task in tasks], _first(found))
            scores["originals"] = _accuracy(whole, own)
        values["accuracy"] = {name: dict(zip(tasks, score.per_task, strict=True)) for name, score in scores.items()}
        values["inputs"] = dict(zip(tasks, scores["zipped"].inputs, strict=True))
        lines += _accuracy_lines(tasks, scores)
    if originals:
        batches: Any = {task: Inputs(source.batches, source.labelled) for task, source in found.items()}
        given = batches[None] if None in batches else fxzip.PerModel(*batches.values())
        same = replace(
            fxzip.agreement(network, [originals[task].module for task in tasks], given, max_batches=_ALL), tasks=tasks
        )
        values["agreement"] = {task: asdict(head) for task, head in zip(tasks, same.heads, strict=True)}
        lines += ["agreement with the originals", str(same)]
    return Result("\n".join(lines), values)


def _accuracy(network: ZippedModule, found: Mapping[str, Source]) -> fxzip.Evaluation:
    batches = labelled_batches(network, found, torch.device("cpu"))
    return fxzip.evaluate(network, fxzip.PerModel(*batches.values()), max_batches=_ALL)


def _accuracy_lines(tasks: tuple[str, ...], scores: Mapping[str, fxzip.Evaluation]) -> list[str]:
    lines = ["accuracy"]
    for place, task in enumerate(tasks):
        shown = ", ".join(f"{name} {100 * score.per_task[place]:.2f} %" for name, score in scores.items())
        lines.append(f"{task}: {shown} of {scores['zipped'].inputs[place]} inputs")
    return lines


def opened(path: Path, trust: Sequence[str] = ()) -> ZippedModule:
    """The network of a folder or of a file .onnx.

    Raises:
        RecipeError: there is neither.
    """
    if path.suffix == ".onnx" and path.is_file():
        return onnx_network(path)
    if not path.is_dir():
        raise RecipeError(f"This needs a folder of `fxzip zip`, or a file .onnx of `fxzip export`; found `{path}`.")
    found = fxzip.load(path, trust=[function_of(name, "--trust") for name in trust])
    if not isinstance(found, ZippedModule):
        raise RecipeError(f"`{path}` holds one task of a zipped network; this needs all of them.")
    return found


def opened_folder(path: Path, trust: Sequence[str]) -> ZippedModule:
    """The network of a folder.

    Raises:
        RecipeError: there is none.
    """
    if not path.is_dir():
        raise RecipeError(f"There is no folder `{path}` of `fxzip zip`.")
    return opened(path, trust)


def _known(
    network: ZippedModule, tasks: tuple[str, ...], recipe: ZipRecipe | None, originals: Mapping[str, Network]
) -> dict[str, Network]:
    """The preprocessing of each task: as the report has it, else as the recipe does."""
    stored = network.meta.get("fxzip_report", {}).get("preprocessing", {})
    fitted = {} if recipe is None or recipe.data is None else by_task(recipe.data)
    found = {}
    for task in tasks:
        own = originals[task].preprocessing if originals else None
        if task in stored:
            own = Preprocessing.of_values(stored[task])
        elif (data := fitted.get(task, fitted.get(None))) is not None:
            with contextlib.suppress(RecipeError):  # no images, or what is missing is said of the data that are read
                own = chosen(data, own, "data")
        found[task] = Network(network, own, None)
    return found


def _first(found: Mapping[str | None, Source]) -> Any:
    """Some inputs to trace with."""
    for source in found.values():
        for inputs in Inputs(source.batches, source.labelled):
            return {name: value[:4] for name, value in inputs.items()} if isinstance(inputs, Mapping) else inputs[:4]
    raise RecipeError("`data` must hold at least one input.")

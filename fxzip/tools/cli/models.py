"""Networks that recipes name, with their weights."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import RecipeError
from . import checkpoints
from .packages import called, function_of, needed
from .preprocessing import Preprocessing, of_timm, of_torchvision, of_transformers
from .recipe import Model, path_of


@dataclass(frozen=True, eq=False)
class Network:
    """A network as a recipe names it, in eval mode.

    Attributes:
        module: with its weights.
        preprocessing: its own, of images; None where it has none.
        shape: of one input, where its package says.
        notes: what was converted or left out.
    """

    module: nn.Module
    preprocessing: Preprocessing | None
    shape: tuple[int, ...] | None
    notes: list[str] = field(default_factory=list)


def networks(models: Mapping[str, Model], device: str = "cpu") -> dict[str, Network]:
    """All networks of a recipe.

    Raises:
        RecipeError: what is wrong with all of them, one line each.
    """
    found: dict[str, Network] = {}
    problems: list[str] = []
    for task, model in models.items():
        try:
            found[task] = network(model, f"models.{task}")
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    try:
        for own in found.values():
            own.module.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"`device` must be one that is there; found `{device}`: {error}") from error
    return found


def network(model: Model, where: str, *, weights: bool = True) -> Network:
    """One network of a recipe; `where` is its place there. `weights`: whether random ones must be asked for.

    Raises:
        RecipeError: it is unknown, cannot be built, or its checkpoint does not fit. All differences are listed.
    """
    kind, colon, name = model.architecture.relative.partition(":")
    if not colon or not name:
        raise RecipeError(
            f"`{where}.architecture` must be `timm:NAME`, `torchvision:NAME`, `transformers:FOLDER` or "
            f"`package.module:function`; found `{model.architecture.relative}`."
        )
    if weights and kind in _DOWNLOADS:
        _needs_weights(model, where, _DOWNLOADS[kind])
    own = _BUILDERS.get(kind, _of_function)(model, name, where)
    if not isinstance(own.module, nn.Module):
        raise RecipeError(
            f"`{where}.architecture` must give a `torch.nn.Module`; `{model.architecture.relative}` gives a "
            f"`{type(own.module).__name__}`."
        )
    if kind != "transformers" and model.checkpoint is not None and model.checkpoint.relative != "random":
        own.notes.extend(_loaded(own.module, model, where))
    own.module.eval()
    return own


def _loaded(module: nn.Module, model: Model, where: str) -> list[str]:
    """Load the checkpoint of a model. In place; returns what is worth a note."""
    assert model.checkpoint is not None
    path = path_of(model.checkpoint)
    try:
        result = checkpoints.load(module, checkpoints.read(path, model.entry), model.ignore or ())
    except RecipeError as error:
        raise RecipeError(f"`{where}.checkpoint`: {error}") from error
    if result.problems:
        lines = "".join(f"\n  {problem}" for problem in result.problems)
        raise RecipeError(
            f"`{where}.checkpoint`: `{path}` does not fit `{model.architecture.relative}`, in "
            f"{len(result.problems)} places:{lines}"
        )
    return [f"{where}: {note}" for note in result.notes]


def _needs_weights(model: Model, where: str, argument: str) -> None:
    """Raises unless a model that its package makes with random weights is to have others, or is meant to have those."""
    if model.checkpoint is None and not (model.arguments or {}).get(argument.partition(":")[0]):
        raise RecipeError(
            f"`{where}` needs a `checkpoint`: `{model.architecture.relative}` is made with random weights. Name a "
            f"file, or `arguments: {{{argument}}}` to download those of its package, or `checkpoint: random`."
        )


def _of_timm(model: Model, name: str, where: str) -> Network:
    timm: Any = needed("timm", "zoo")
    if ":" not in name and not timm.is_model(name.partition(".")[0]):
        raise RecipeError(_unknown(where, name, timm.list_models(), "timm"))
    module = called(timm.create_model, {"model_name": name, **(model.arguments or {})}, "timm.create_model", where)
    own = of_timm(module, model.arguments or {})
    shape = timm.data.resolve_data_config({}, model=module)["input_size"]
    channels: Any = (model.arguments or {}).get("in_chans", 3)
    return Network(module, own, (channels, *shape[1:]))


def _of_torchvision(model: Model, name: str, where: str) -> Network:
    models: Any = needed("torchvision.models", "images")
    if name not in (known := models.list_models()):
        raise RecipeError(_unknown(where, name, known, "torchvision"))
    module = called(models.get_model, {"name": name, **(model.arguments or {})}, "torchvision.models.get_model", where)
    own = of_torchvision(name)
    return Network(module, own, None if own is None else (len(own.mean), *own.size))


def _of_transformers(model: Model, name: str, where: str) -> Network:
    transformers: Any = needed("transformers", "zoo")
    transformers.utils.logging.disable_progress_bar()
    folder = path_of(model.architecture, name)
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"`{where}.architecture` must name a folder of transformers, with a `config.json`; there is none in "
            f"`{folder}`."
        )
    arguments: dict[str, Any] = {
        "pretrained_model_name_or_path": folder,
        "local_files_only": True,
        **(model.arguments or {}),
    }
    config = called(transformers.AutoConfig.from_pretrained, arguments, "AutoConfig.from_pretrained", where)
    kinds = [getattr(transformers, kind, None) for kind in config.architectures or ()]
    kind: Any = kinds[0] if kinds and kinds[0] is not None else transformers.AutoModel
    if model.checkpoint is not None and model.checkpoint.relative == "random":
        build = kind.from_config if kind is transformers.AutoModel else kind
        module = called(lambda: build(config), {}, kind.__name__, where)
    else:
        module = called(lambda: _pretrained(kind, folder, config, model, where), {}, kind.__name__, where)
    own = of_transformers(folder)
    return Network(module, own, None if own is None else (len(own.mean), *own.size))


def _pretrained(kind: Any, folder: Path, config: Any, model: Model, where: str) -> Any:
    """The network of a folder of transformers with its weights, or those of a checkpoint. transformers loads them, for
    the names in its files need not be those of the network.

    Raises:
        RecipeError: the weights are not all that the network has. What differs is listed.
    """
    state, source = None, folder
    if model.checkpoint is not None:
        source = path_of(model.checkpoint)
        state = checkpoints.read(source, model.entry)
        state = {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state.items()}
    module, found = kind.from_pretrained(
        folder if state is None else None,
        state_dict=state,
        config=config,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    unexpected = [
        name
        for name in found.get("unexpected_keys", ())
        if not any(fnmatch.fnmatch(name, pattern) for pattern in model.ignore or ())
    ]
    problems = [f"missing in the checkpoint: `{name}`" for name in sorted(found.get("missing_keys", ()))]
    problems += [f"not in the network: `{name}`" for name in sorted(unexpected)]
    problems += [
        f"another shape: `{name}` is {list(given)} in the checkpoint, {list(own)} in the network"
        for name, given, own in sorted(found.get("mismatched_keys", ()))
    ]
    problems += [str(text) for text in found.get("error_msgs", ())]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise RecipeError(
            f"`{where}`: the weights in `{source}` do not fit `{folder}/config.json` and `arguments`:{lines}"
        )
    return module


def _of_function(model: Model, name: str, where: str) -> Network:
    text = model.architecture.relative
    try:
        function = function_of(text, f"{where}.architecture")
    except RecipeError as error:
        near = difflib.get_close_matches(text.partition(":")[0], _BUILDERS, n=1)
        if not near:
            raise
        raise RecipeError(f"{error} Did you mean `{near[0]}:{name}`?") from error
    return Network(called(function, model.arguments or {}, text, where), None, None)


def _unknown(where: str, name: str, known: list[str], package: str) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(f'`{own}`' for own in near)}?" if near else ""
    return f"`{where}.architecture` names no model of {package}: `{name}`.{hint}"


_BUILDERS: dict[str, Callable[[Model, str, str], Network]] = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "transformers": _of_transformers,
}
_DOWNLOADS = {"timm": "pretrained: true", "torchvision": "weights: DEFAULT"}
"""Packages that make networks with random weights, and the argument by which they download others."""

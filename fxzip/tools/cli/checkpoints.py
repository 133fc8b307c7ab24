"""Weights from files into networks: read without running anything, and loaded only where every tensor has its place."""

from __future__ import annotations

import fnmatch
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...errors import RecipeError
from .packages import first_line

WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model", "module", "net", "weights")
"""Entries of training checkpoints that hold the weights."""

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")


def read(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the wrappers of training loops. No code of the file is run.

    Raises:
        RecipeError: the file is missing, is no checkpoint, or holds weights in several entries and `entry` names none.
    """
    if not path.is_file():
        raise RecipeError(f"There is no checkpoint `{path}`.")
    if path.suffix not in SUFFIXES:
        raise RecipeError(f"A checkpoint must be a file {', '.join(SUFFIXES)}; found `{path}`.")
    try:
        if path.suffix == ".safetensors":
            held: Any = load_file(path)
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RecipeError(
            f"A checkpoint must hold weights alone, since code in files is not run; `{path.name}` holds more: "
            f"{first_line(error)} Save it again with `torch.save(model.state_dict(), ...)`."
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise RecipeError(f"`{path}` cannot be read as a checkpoint: {first_line(error)}") from error
    return _unwrapped(held, path.name, entry)


def _unwrapped(held: Any, name: str, entry: str | None) -> dict[str, Tensor]:
    """The state dict inside of what a checkpoint holds."""
    if not isinstance(held, Mapping):
        raise RecipeError(f"A checkpoint must hold tensors by name; `{name}` holds a `{type(held).__name__}`.")
    if entry is not None:
        if entry not in held:
            known = ", ".join(f"`{key}`" for key in list(held)[:8])
            raise RecipeError(f"`{name}` has no entry `{entry}`; it has {known}.")
        return _unwrapped(held[entry], f"{name}: {entry}", None)

    inner = [key for key in WRAPPERS if isinstance(held.get(key), Mapping)]
    if len(inner) > 1:
        raise RecipeError(
            f"`{name}` holds weights in several entries, {', '.join(f'`{key}`' for key in inner)}; say which with "
            f"`entry: {inner[0]}`."
        )
    if inner:
        return _unwrapped(held[inner[0]], f"{name}: {inner[0]}", None)

    tensors = {str(key): value for key, value in held.items() if isinstance(value, Tensor)}
    others = [str(key) for key, value in held.items() if not isinstance(value, Tensor)]
    if not tensors:
        shown = ", ".join(f"`{key}`" for key in others[:8]) or "nothing"
        raise RecipeError(f"A checkpoint must hold tensors by name; `{name}` holds {shown}. Say where with `entry`.")
    return tensors


@dataclass
class Match:
    """How the tensors of a checkpoint fit a network.

    Attributes:
        state: what is loaded, by the names of the network.
        problems: one sentence each; nothing may be loaded if there is one.
        notes: what was left out or converted without loss.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def match(module: nn.Module, tensors: Mapping[str, Tensor], ignore: Sequence[str] = ()) -> Match:
    """Lay the tensors of a checkpoint beside those of a network. Nothing is loaded.

    Names may begin with what wrappers put there (`module.`, `_orig_mod.`). Another dtype is converted where no value
    changes, as from half precision to single; every other difference is a problem.

    >>> match(nn.Linear(2, 3), {"module.weight": torch.ones(3, 2), "module.scale": torch.ones(1)}).problems
    ['missing in the checkpoint: `bias` [3]', 'not in the network: `scale` [1]']
    """
    expected = module.state_dict()
    found = _renamed(tensors, set(expected))
    result = Match()
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    ignored = [name for name in unexpected if any(fnmatch.fnmatch(name, pattern) for pattern in ignore)]
    unexpected = [name for name in unexpected if name not in ignored]

    result.problems += [f"missing in the checkpoint: `{name}` {list(expected[name].shape)}" for name in missing]
    result.problems += [f"not in the network: `{name}` {list(found[name].shape)}" for name in unexpected]
    converted = 0
    for name, own in expected.items():
        if name not in found:
            continue
        value = found[name]
        if value.shape != own.shape:
            result.problems.append(
                f"another shape: `{name}` is {list(value.shape)} in the checkpoint, {list(own.shape)} in the network"
            )
        elif value.is_floating_point() and not bool(value.isfinite().all()):
            result.problems.append(f"not finite: `{name}` holds NaN or infinite values")
        elif not _keeps(value, own.dtype):
            result.problems.append(
                f"another dtype: `{name}` is {_short(value.dtype)} in the checkpoint, {_short(own.dtype)} in the "
                "network"
            )
        else:
            converted += value.dtype != own.dtype
            result.state[name] = value
    if ignored:
        result.notes.append(f"left out of the checkpoint, as `ignore` says: {', '.join(ignored)}")
    if converted:
        result.notes.append(
            f"{converted} tensors of the checkpoint were converted to the network's dtype, without loss"
        )
    return result


def load(module: nn.Module, tensors: Mapping[str, Tensor], ignore: Sequence[str] = ()) -> Match:
    """Load a checkpoint into a network, if it fits; else nothing, and the problems say why. In place.

    >>> module = nn.Linear(2, 1, bias=False)
    >>> load(module, {"weight": torch.tensor([[1.0, 2.0]])}).problems, module.weight.tolist()
    ([], [[1.0, 2.0]])
    """
    result = match(module, tensors, ignore)
    if not result.problems:
        module.load_state_dict(result.state, strict=False)
    return result


def _renamed(tensors: Mapping[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Tensors by names without the prefixes of wrappers: of those that all names share as many as fit best."""
    found = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
    if "n_averaged" not in expected:
        found.pop("n_averaged", None)  # the counter of `torch.optim.swa_utils.AveragedModel`
    best = found
    while found:
        first = next(iter(found)).partition(".")[0] + "."
        if not all(name.startswith(first) for name in found):
            break
        found = {name.removeprefix(first): value for name, value in found.items()}
        if len(expected & set(found)) > len(expected & set(best)):
            best = found
    return best


def _keeps(value: Tensor, wanted: torch.dtype) -> bool:
    """Whether a tensor has the same values in another dtype: half precision in single, whole numbers as floats."""
    if value.dtype == wanted:
        return True
    if value.is_complex() or wanted.is_complex or wanted == torch.bool:
        return False
    return torch.equal(value.to(wanted).to(torch.float64), value.to(torch.float64))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

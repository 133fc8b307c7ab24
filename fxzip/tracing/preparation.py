"""From the user's model to an own copy that can be traced: eval mode, no hooks, weights as plain parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import InputError, TraceError
from .calls import Call, leaves
from .copying import deep_copy
from .execution import quiet_execution

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""What renames or makes entries of a state dict: of parametrisations that are folded, or for names of the model."""

_QUANTISED = (
    "torch.ao.nn.quantized",
    "torch.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.nn.intrinsic.quantized",
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DataParallel`, `DistributedDataParallel` or a `torch.compile` wrapper.

    >>> unwrapped(nn.DataParallel(nn.ReLU()))
    ReLU()
    """
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def check_model(model: object, name: str = "model") -> nn.Module:
    """The unwrapped model, or an `InputError` for what cannot be traced at all.

    >>> check_model(nn.ReLU())
    ReLU()
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"`{name}` must be a `torch.nn.Module`; found `{type(model).__name__}`.")
    model = unwrapped(model)
    for path, module in model.named_modules():
        where = f"`{name}.{path}`" if path else f"`{name}`"
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"`{name}` must be an eager module; {where} is a `{type(module).__name__}`, compiled by `torch.jit`. "
                "Pass the module that it was made from."
            )
        own = [value for value in (*vars(module).values(), *module._buffers.values()) if isinstance(value, Tensor)]
        kind = type(module).__module__.startswith(_QUANTISED)
        if kind or "_packed_params" in vars(module) or any(value.is_quantized for value in own):
            raise InputError(
                f"`{name}` must have floating point weights; {where} is a quantised `{type(module).__name__}`. "
                "Zip the models before they are quantised."
            )
        for key, value in module.named_parameters(recurse=False):
            if isinstance(value, nn.UninitializedParameter):
                raise InputError(
                    f"`{name}` must have initialised parameters; `{key}` of {where} is uninitialised. "
                    "Run the model once on `sample_input` first."
                )
    return model


def check_dense(call: Call) -> None:
    """Sparse tensors have no places along which features could be followed.

    >>> check_dense(Call((torch.ones(1),), {}))

    Raises:
        InputError: there is one.
    """
    for value in leaves(call):
        if value.layout != torch.strided:
            raise InputError(
                f"Inputs must be dense tensors; `sample_input` holds one of shape {tuple(value.shape)} with layout "
                f"`{value.layout}`. Pass its indices and values, an edge list say, or `to_dense()`."
            )


def check_placement(models: Sequence[nn.Module]) -> None:
    """All parameters of all models must be on one device and, the floating ones, of one dtype.

    >>> check_placement([nn.Linear(2, 2), nn.Linear(2, 3)])
    """
    first: dict[str, tuple[str, object]] = {}
    for index, model in enumerate(models):
        for key, value in model.named_parameters():
            where = f"`{key}` of model {index}"
            found = {"device": value.device} | ({"dtype": value.dtype} if value.is_floating_point() else {})
            for what, here in found.items():
                place, there = first.setdefault(what, (where, here))
                if here != there:
                    raise InputError(
                        f"All models must be on one device and of one dtype; {place} is on {there}, {where} on {here}. "
                        "Move them with `.to(device)`."
                        if what == "device"
                        else f"All models must be on one device and of one dtype; {place} is of {there}, {where} of "
                        f"{here}. Convert them with `.to(dtype)`."
                    )


def copied(model: nn.Module, name: str = "model") -> nn.Module:
    """A deep copy in eval mode, hooks and all.

    >>> copied(nn.Dropout()).training
    False
    """
    try:
        with quiet_execution():
            return deep_copy(model).eval()
    except Exception as error:
        raise TraceError(
            f"`{name}` must be copyable, so that the original is left alone; `copy.deepcopy` raised "
            f"{type(error).__name__}: {first_line(error)} Remove what cannot be copied from the module, or give it a "
            "`__deepcopy__`."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of the message, as a sentence.

    >>> first_line(ValueError("no luck"))
    'no luck.'
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    line = line if len(line) <= 300 else line[:300] + " ..."
    return line if line.endswith((".", "!", "?")) else line + "."


def folded(model: nn.Module) -> nn.Module:
    """The model itself, with parametrisations, weight norms and prunings turned into plain parameters.

    >>> m = folded(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)).eval())
    >>> [name for name, _ in m.named_parameters()]
    ['bias', 'weight']
    """
    with quiet_execution(), torch.enable_grad():  # a folded weight needs a gradient if its parts do
        for module in list(model.modules()):
            if parametrize.is_parametrized(module):
                _unparametrise(module)
            for hook in list(module._forward_pre_hooks.values()):
                if isinstance(hook, WeightNorm):
                    remove_weight_norm(module, hook.name)
                elif isinstance(hook, SpectralNorm):
                    remove_spectral_norm(module, hook.name)
                elif isinstance(hook, prune.BasePruningMethod):
                    prune.remove(module, hook._tensor_name)
    return model


def _unparametrise(module: nn.Module) -> None:
    """Not by `remove_parametrizations`: it takes the properties off the class, and the original has the same class."""
    values = {key: getattr(module, key) for key in module.parametrizations}  # type: ignore[union-attr]
    trained = {
        key: [value.requires_grad for value in parts.parameters()]
        for key, parts in module.parametrizations.items()  # type: ignore[operator, union-attr]
    }
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for key, value in values.items():
        if trained[key]:
            # By `setattr`: recurrent layers hold their weights in a list too, which follows what is set.
            setattr(module, key, nn.Parameter(value.detach().clone(), any(trained[key])))
        else:
            module.register_buffer(key, value.detach().clone())


def without_hooks(model: nn.Module) -> tuple[str, ...]:
    """Drop all hooks of the model itself; the paths of the modules that had forward hooks.

    >>> m = nn.Sequential(nn.ReLU())
    >>> _ = m[0].register_forward_hook(lambda *_: None)
    >>> without_hooks(m)
    ('0',)
    """
    paths = []
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            paths.append(path)
        for kind in (*_HOOKS, *_STATE_HOOKS):
            if getattr(module, kind, None):
                getattr(module, kind).clear()
    return tuple(paths)


Hooks = list[tuple[dict[int, Any], dict[int, Any]]]


def hooks_of(model: nn.Module) -> Hooks:
    """The hooks of the model, to be put back by `hooked`.

    >>> m = nn.Sequential(nn.ReLU())
    >>> _ = m[0].register_forward_hook(lambda module, given, result: result + 1)
    >>> hooks, _ = hooks_of(m), without_hooks(m)
    >>> with hooked(hooks):
    ...     y = m(torch.zeros(1))
    >>> y, m(torch.zeros(1))
    (tensor([1.]), tensor([0.]))
    """
    found = (getattr(module, kind, None) for module in model.modules() for kind in _HOOKS)
    return [(live, dict(live)) for live in found if live]


@contextmanager
def hooked(hooks: Hooks) -> Iterator[None]:
    """Inside, the modules have their hooks again: what those of composite modules do becomes part of a trace."""
    for live, kept in hooks:
        live.update(kept)
    try:
        yield
    finally:
        for live, _ in hooks:
            live.clear()

"""Layers of K heads as one: tensors one after another for a grouped call, or on top of each other for a batched one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def convolution(modules: Sequence[Any], shared: bool) -> Any:
    """K times the groups; where all heads read one value, K times the outputs."""
    made = _with_joined_tensors(modules)
    made.out_channels *= len(modules)
    if not shared:
        made.in_channels *= len(modules)
        made.groups *= len(modules)
    return made


def normalisation(modules: Sequence[Any], shared: bool) -> Any:
    made = _with_joined_tensors(modules)
    for name in ("num_features", "num_channels", "num_groups"):
        if hasattr(made, name):
            setattr(made, name, getattr(made, name) * len(modules))
    return made


def _with_joined_tensors(modules: Sequence[Any]) -> Any:
    """A copy of the first module whose tensors are those of all, one after another along their first axis."""
    return with_tensors(modules[0], lambda *own: torch.cat(own) if own[0].ndim else own[0].clone(), modules)


def with_tensors(module: nn.Module, function: Callable[..., Tensor], modules: Sequence[nn.Module]) -> Any:
    """A copy of a module that holds a function of what several modules hold under each name."""
    made = copy.copy(module)
    vars(made).update({key: copy.copy(vars(module)[key]) for key in ("_parameters", "_buffers")})
    for name, own in module._parameters.items():
        if own is not None:
            value = function(*(getattr(other, name).detach() for other in modules))
            made._parameters[name] = nn.Parameter(value, requires_grad=own.requires_grad)
    for name, held in module._buffers.items():
        if held is not None:
            made._buffers[name] = function(*(getattr(other, name) for other in modules))
    return made


def stacked(modules: Sequence[Any], shared: bool) -> Any:
    """A module that only holds the parameters of all, [heads, ...]."""
    made = nn.Module()
    for name in ("weight", "bias"):
        own = [getattr(module, name) for module in modules]
        value = None if own[0] is None else nn.Parameter(torch.stack([p.detach() for p in own]), own[0].requires_grad)
        made.register_parameter(name, value)
    return made.train(modules[0].training)

"""Where a compile is made: where the models are, unless that device holds no float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from ..rewriting.module import ZippedModule
from ..tracing.calls import Call, JointCall, leaves, map_tensors
from ..tracing.precision import has_float64
from .arguments import Given


def device_of(given: Given) -> torch.device:
    """Where the sample input is, and so the models."""
    return next((value.device for value in leaves(given.call)), torch.device("cpu"))


def at_work(given: Given) -> Given:
    """Models and sample input as they are, or copies on the CPU where their device holds no float64, in which sums are
    kept, traces are compared and regressions solved."""
    if has_float64(device_of(given)):
        return given
    networks = copy.deepcopy(given.networks)  # all at once: what they share they share again
    return replace(given, networks=tuple(network.cpu() for network in networks), call=_moved(given.call))


def brought_back(zipped: ZippedModule, device: torch.device) -> ZippedModule:
    """The zip where the models are."""
    moved: nn.Module = zipped if has_float64(device) else zipped.to(device)
    assert isinstance(moved, ZippedModule)
    return moved


def _moved(call: Call) -> Call:
    if isinstance(call, JointCall):
        return JointCall.of(map(_moved, call.parts))
    return map_tensors(torch.Tensor.cpu, call)

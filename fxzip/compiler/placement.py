"""Where a compile is made: where the models are, unless that device holds no float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from ..calibration.sources import PerModel
from ..tracing.calls import Call, JointCall, leaves, map_tensors
from ..tracing.containers import map_leaves
from ..tracing.precision import has_float64
from .arguments import Given

Network = TypeVar("Network", bound=nn.Module)


def device_of(given: Given) -> torch.device:
    """Where the sample input is, and so the models."""
    return next((value.device for value in leaves(given.call)), torch.device("cpu"))


def at_work(given: Given) -> Given:
    """Models and sample input as they are, or copies on the CPU where their device holds no float64, in which sums are
    kept, traces are compared and regressions solved."""
    if has_float64(device_of(given)):
        return given
    networks = copy.deepcopy(given.networks)  # all at once: what they share they share again
    moved = tuple(network.cpu() for network in networks)
    return replace(given, networks=moved, call=_moved(given.call), sample=_moved_sample(given.sample))


def brought_back(network: Network, device: torch.device) -> Network:
    """A network of a session where the models are that were given to it."""
    return network if has_float64(device) else network.to(device)


def _moved(call: Call) -> Call:
    if isinstance(call, JointCall):
        return JointCall.of(map(_moved, call.parts))
    return map_tensors(torch.Tensor.cpu, call)


def _moved_sample(sample: Any) -> Any:
    if isinstance(sample, PerModel):
        return PerModel(*map(_moved_sample, sample))
    return map_leaves(torch.Tensor.cpu, sample)

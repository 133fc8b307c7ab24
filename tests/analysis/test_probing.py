"""Calls without a rule are probed; the probe is also an oracle for the rules that are there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.analysis import label, self_check, solve
from fxzip.analysis.rules import RULES
from fxzip.tracing import trace


@torch.library.custom_op("fxziptests::swish_scale", mutates_args=())
def swish_scale(x: Tensor, scale: Tensor) -> Tensor:
    """Elementwise with a scale per feature: equivariant in the features of both."""
    return x * torch.sigmoid(x) * scale


@torch.library.custom_op("fxziptests::energy", mutates_args=())
def energy(x: Tensor) -> Tensor:
    """A symmetric function of the features, spread over one new axis."""
    return torch.stack([x.square().sum(-1), x.abs().amax(-1)], -1)


@torch.library.custom_op("fxziptests::ramp", mutates_args=())
def ramp(x: Tensor) -> Tensor:
    """Depends on the order of the features: a barrier."""
    return x * torch.arange(x.shape[-1], dtype=x.dtype)


for _op in (swish_scale, energy, ramp):
    _op.register_fake(lambda x, *rest: torch.empty_like(x))


class Custom(nn.Module):
    def __init__(self, call: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(2 if call == "energy" else 8, 3)
        self.scale = nn.Parameter(torch.rand(8))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.call == "swish_scale":
            x = torch.ops.fxziptests.swish_scale(x, self.scale)
        elif self.call == "energy":
            x = torch.ops.fxziptests.energy(x)
        else:
            x = torch.ops.fxziptests.ramp(x)
        return self.second(x)


@pytest.mark.parametrize("call", ["swish_scale", "energy"])
def test_an_equivariant_custom_call_is_probed_and_exact(call: str) -> None:
    labelling = label(trace(Custom(call).double(), torch.randn(4, 5, dtype=torch.float64)), RULES)
    spaces, error, pinned = self_check(labelling)
    assert labelling.barriers == ()
    assert [probed.call for probed in labelling.probed] == [call]
    assert (error < 1e-12, pinned) == (True, {})
    assert [(s.size, s.legality) for s in spaces.spaces] == [(8, "free")]


def test_a_call_that_depends_on_the_order_is_a_barrier() -> None:
    labelling = label(trace(Custom("ramp"), torch.randn(4, 5)), RULES)
    assert [barrier.call for barrier in labelling.barriers] == ["ramp"]
    assert labelling.probed == ()
    assert solve(labelling).spaces == ()


def test_the_report_names_what_was_probed() -> None:
    a, b = Custom("swish_scale").eval(), Custom("swish_scale").eval()
    zipped = fxzip.compile_zip(a, b, torch.randn(16, 5))
    assert any("`swish_scale`" in text and "was probed on random data" in text for text in zipped.report["probed"])
    assert "probed: `swish_scale`" in str(zipped.report)


class Between(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function: object, inputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(inputs, 4, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))  # type: ignore[operator]


FUNCTIONS = {
    "relu": (torch.relu, 8, "relu"),
    "softmax": (lambda x: F.softmax(x, 1), 8, "_softmax"),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), 8, "max_pool2d_with_indices"),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), 8, "avg_pool2d"),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2), 8, "upsample_nearest2d"),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), 8, "mean"),
    "amax": (lambda x: x.amax(3, keepdim=True), 8, "amax"),
    "sum over features": (lambda x: x.sum(1, keepdim=True), 1, "sum"),
    "cumsum over places": (lambda x: x.cumsum(2), 8, "cumsum"),
    "permute": (lambda x: x.permute(0, 1, 3, 2), 8, "permute"),
    "gelu": (F.gelu, 8, "gelu"),
    "hardswish": (F.hardswish, 8, "hardswish"),
    "reflection_pad2d": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 8, "reflection_pad2d"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_probe_and_rule_agree(name: str) -> None:
    """With the rule taken out of the table the probe finds the same spaces."""
    function, inputs, call = FUNCTIONS[name]
    program = trace(Between(function, inputs).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    without = {key: rule for key, rule in RULES.items() if key != call}
    by_rule, by_probe = label(program, RULES), label(program, without)
    if call not in ("relu", "gelu", "hardswish"):  # tagged as pointwise: they need no row
        assert [p.call for p in by_probe.probed] == [call]
    assert [(s.size, s.legality) for s in solve(by_rule).spaces] == [
        (s.size, s.legality) for s in solve(by_probe).spaces
    ]
    assert self_check(by_probe)[1] < 1e-10

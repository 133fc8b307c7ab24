"""The coverage sweep: its page, and a part of it that fits into the CI script."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxzip

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from coverage import behind_barriers, measure, moved_off, shares
from coverage_growth import FAMILIES
from coverage_growth import measure as measure_growth
from coverage_models import TRANSFORMERS, torchvision_kinds, torchvision_models
from coverage_page import below, fit, growing, page, summary, tied_tables, timing

TORCHVISION = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16",
    "wide_resnet50_2", "deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large", "mc3_18",
    "r2plus1d_18", "swin3d_t", "raft_small", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn",
    "ssd300_vgg16", "ssdlite320_mobilenet_v3_large",
]  # fmt: skip
TIMM = [
    "convmixer",
    "efficientformer",
    "ghostnet",
    "hrnet",
    "levit",
    "mobilevit",
    "res2net",
    "resnet",
    "rexnet",
    "xcit",
]


def row(name, **more):
    times = dict.fromkeys(["trace_s", "label_s", "solve_s"], 1.0) | {"check_s": 2.0}
    share = {"zippable": 0.9, "relabel": 0.06, "pinned": 0.04}
    found = {
        "zoo": "torchvision",
        "name": name,
        "rung": "symbolic",
        "nodes": 60,
        "labels": 900,
        "exact": True,
        "gap": 1e-15,
    }
    found |= {"parameters": 1000, "flops": share, "params": share, "forward_s": 0.25, "passes_s": 0.75, "barriers": []}
    return found | times | {"behind": 0.0} | more


def test_the_page_says_what_was_asked_and_found():
    error = "InputError: `model` must have floating point weights; `model.conv` is a quantised `Conv2d`."
    quantised = next(name for name, kind in torchvision_kinds().items() if kind == "quantization")
    rows = [
        row("resnet18"),
        row("resnet34", gap=None, exact=False, error="no way"),
        row("raft_small", label_s=4.25, barriers=["`swirl` has no rule"], behind=0.5),
        {"zoo": "torchvision", "name": quantised, "exact": False, "error": error},
    ]
    found = {what: answer for what, _, answer in summary(rows)}
    assert found["torchvision classification, segmentation, video: exact"] == "1 of 2"
    assert found["the same: median share of FLOPs zippable"] == "90.0 %"
    assert found["torchvision detection, optical flow: exact"] == "1 of 1"
    assert found["torchvision quantised: refused with a clear error"] == "1 of 1"
    name = "torchvision below 100 M parameters: analysis beyond forward passes"
    assert found[name] == "5.00 s (`raft_small`), median 1.75 s"
    assert found["torchvision below 100 M parameters: analysis and self-check beyond forward passes"] == (
        "5.25 s (`raft_small`), median 2.00 s"
    )
    text = page(rows)
    assert "| resnet18 | symbolic | 60 | 1e-15 | 90 / 6 / 4 | 90 / 6 / 4 | 1.00 | 1.75 | 0.25 | 0.25 |  |" in text
    assert "`raft_small` 50 %" in text
    assert "it is\n16.67 %" in text or "that is 16.67 %" in text
    assert f"| {quantised} |  |  | refused |" in text


def test_the_fit_finds_a_line():
    assert fit([1.0, 2.0, 4.0], to=[5.0, 7.0, 11.0]) == ([3.0, 2.0], 1.0)
    rows = [row(str(n), nodes=n, labels=7 * n * n, label_s=0.001 * n, solve_s=0.25) for n in (60, 100, 300, 900)]
    lines = timing(rows)
    assert "- seconds = -0.000 + 1.000·nodes/1000, R² = 1.00;" in [
        line.replace("= 0.000", "= -0.000") for line in lines
    ]
    assert any("nodes^1.00" in line for line in lines)


def test_growth_and_what_is_below_the_line():
    growth = [{"family": "attention", "nodes": n, "seconds": 0.25 + 0.5 * n / 1000} for n in (10, 40, 90)]
    assert growing(growth)[-1] == "- attention, 10 to 90 nodes: seconds = 0.250 + 0.500·nodes/1000, R² = 1.0000."
    assert growing([]) == []
    low = {"zippable": 0.55, "relabel": 0.35, "pinned": 0.1}
    text = "\n".join(below([row("resnet18"), row("mvit_v2_s", flops=low)]))
    assert "`mvit_v2_s`: 55.0 % / 35.0 % / 10.0 % of its FLOPs. No call is a barrier." in text
    assert below([row("resnet18")]) == []
    assert "Not looked into." in below([row("resnet18", flops=low)])[2]


def test_tied_tables_are_named_with_their_share():
    rows = [{"name": "GPT-2", "flops": {"zippable": 0.404}}, {"name": "BERT", "flops": {"zippable": 0.74}}]
    assert tied_tables(rows)[2].startswith("`GPT-2` (40 %) of the FLOPs may be zipped")
    assert tied_tables(rows[1:]) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_one_architecture_grows(family):
    """A deeper network of a family has more nodes, as many more per block, and an analysis without barriers."""
    shallow, middle, deep = (measure_growth(family, depth) for depth in (1, 2, 3))
    assert deep["nodes"] - middle["nodes"] == middle["nodes"] - shallow["nodes"] > 0
    assert deep["labels"] - middle["labels"] == middle["labels"] - shallow["labels"] > 0
    assert is_exact_model(FAMILIES[family][0](2), FAMILIES[family][1]())


class Stopped(nn.Module):
    """A quarter of the FLOPs in front of a call without a rule, three quarters behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.ops.fxziptests.swirled(self.first(x)))))


@torch.library.custom_op("fxziptests::swirled", mutates_args=())
def swirled(x: torch.Tensor) -> torch.Tensor:
    return x * torch.arange(x.shape[-1], dtype=x.dtype)


def test_shares_of_a_model_with_a_barrier():
    swirled.register_fake(torch.empty_like)
    program = fxzip.tracing.trace(Stopped(), torch.randn(2, 8))
    labelling = fxzip.analysis.label(program, fxzip.RULES)
    assert [barrier.call for barrier in labelling.barriers] == ["swirled"]
    assert behind_barriers(program, labelling) == pytest.approx(192 / 256)
    found = shares(program, labelling, fxzip.analysis.solve(labelling))
    assert found["flops"]["zippable"] == pytest.approx(128 / 256)
    assert found["flops"]["pinned"] == pytest.approx(128 / 256)


def test_parameters_and_statistics_are_moved_off():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    moved_off(model)
    assert all(float(t.std()) > 0.05 for t in (*model.parameters(), model[1].running_mean, model[1].running_var))
    assert not model.training


def is_exact_model(model, sample):
    labelling = fxzip.analysis.label(fxzip.tracing.trace(model, sample), fxzip.RULES)
    return not labelling.barriers and not fxzip.analysis.self_check(labelling)[2]


def is_exact(zoo, name):
    found = measure(zoo, name)
    assert found["exact"], found.get("error")
    assert not found["warnings"]
    assert not found["barriers"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    assert is_exact("torchvision", name)["flops"]["zippable"] >= 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    pytest.importorskip("transformers")
    is_exact("transformers", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    pytest.importorskip("timm")
    is_exact("timm", name)


QUANTISED = [name for name, kind in torchvision_kinds().items() if kind == "quantization"]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_models_are_refused(name):
    model, sample = torchvision_models()[name]()
    with pytest.raises(fxzip.InputError, match=r"must have floating point weights; .* Zip the models before"):
        fxzip.tracing.trace(model, sample)

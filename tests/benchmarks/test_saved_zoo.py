"""Networks of torchvision, timm and transformers come back from a folder to the bit: those that are zipped with their
relabelled copies in `tests/compiler/test_twins.py`, and one of each family of the coverage."""

import copy
import sys
from pathlib import Path

import pytest
import torch

import fxzip
from fxzip.tracing.containers import leaves

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from coverage import moved_off
from coverage_models import TRANSFORMERS, ZOOS

try:
    import timm

    FAMILIES = timm.list_modules()
except ImportError:
    FAMILIES = []
TORCHVISION = [
    "resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "squeezenet1_0", "resnet50", "vgg16_bn", "alexnet",
    "densenet121", "resnext50_32x4d", "efficientnet_b0", "googlenet", "convnext_tiny", "vit_b_16", "swin_t",
    "maxvit_t", "swin3d_t", "mvit_v1_b", "deeplabv3_resnet50",
]  # fmt: skip


def comes_back(model, sample, folder):
    moved_off(model)
    network = fxzip.side_by_side([model, copy.deepcopy(model)], sample)  # what each calls, and no features to observe
    fxzip.save(network, folder)
    found = fxzip.load(folder)
    given = sample if isinstance(sample, dict) else {}
    with torch.no_grad():
        ours, theirs = (net(**given) if given else net(*_positional(sample)) for net in (found, network))
    mine, others = leaves(ours), leaves(theirs)
    assert len(mine) == len(others) > 0
    assert all(torch.equal(own, other) for own, other in zip(mine, others, strict=True))


def _positional(sample):
    return sample if isinstance(sample, tuple) else (sample,)


@pytest.mark.slow
@pytest.mark.hours
@pytest.mark.parametrize("name", TORCHVISION)
def test_those_of_torchvision(name, tmp_path):
    comes_back(*ZOOS["torchvision"]()[name](), tmp_path / "zip")


@pytest.mark.slow
@pytest.mark.hours
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_of_timm(family, tmp_path):
    comes_back(*ZOOS["timm"]()[family](), tmp_path / "zip")


@pytest.mark.slow
@pytest.mark.hours
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_each_family_of_transformers(name, tmp_path):
    pytest.importorskip("transformers")
    comes_back(*ZOOS["transformers"]()[name](), tmp_path / "zip")

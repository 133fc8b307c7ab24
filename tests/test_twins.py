"""A model zipped with a relabelled copy of itself is that model, at both heads."""

import pytest
import torch
from networks import Mixed, PaddedResNet, Residual, randomise, torchvision_model
from torchvision.models import VisionTransformer

import fxzip
from fxzip.analysis import relative_difference

BOUND = {torch.float32: 1e-4, torch.float64: 1e-9}
QUICK = ["squeezenet1_0", "mobilenet_v3_small", "shufflenet_v2_x1_0", "resnet18"]
HEAVY = [
    "resnet50", "vgg16_bn", "alexnet", "densenet121", "resnext50_32x4d", "efficientnet_b0", "googlenet",
    "convnext_tiny",
]  # fmt: skip


def images(count, size, dtype, seed):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(model, draw, method, dtype, cut=None, verify=False):
    """`draw(count, seed)` gives one batch. The sample is another batch, of another size."""
    model = model.to(dtype)
    sample, data = draw(3, 0), [draw(6, seed) for seed in (1, 2, 3)]
    twin = fxzip.relabel(model, sample, seed=1, verify=verify)
    zipped = fxzip.compile_zip(model, twin, sample, data=data, method=method, until=cut, verify=verify, progress=False)
    for batch in (data[0], draw(5, 4)):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        with torch.no_grad():
            expected, found = model(*inputs), zipped(*inputs)
        for output in found:
            assert relative_difference(expected, output) <= BOUND[dtype]
    return zipped


def test_relabel_moves_features_and_keeps_the_function():
    model = randomise(Residual())
    sample = images(2, 8, torch.float32, 0)
    twin = fxzip.relabel(model, sample)
    assert relative_difference(model(sample), twin(sample)) < 1e-5
    for (name, ours), (other, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other
        assert not torch.equal(ours, theirs) or name == "linear.bias"


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("method", ["permute", "zip"])
def test_user_defined(method, dtype):
    def draw(count, seed):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(count, 3, 8, 8, generator=generator).to(dtype)
        return image, torch.randint(0, 20, (count, 5), generator=generator)

    check(randomise(Mixed()), draw, method, dtype, verify=True)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("method", ["permute", "zip"])
def test_shortcuts_without_parameters(method, dtype):
    zipped = check(randomise(PaddedResNet()), lambda n, s: images(n, 16, dtype, s), method, dtype, verify=True)
    assert not zipped.report["barriers"]
    assert zipped.report["flops"]["total"] <= 1.01 * zipped.report["flops"]["originals"][0]


@pytest.mark.parametrize("method", ["permute", "zip"])
@pytest.mark.parametrize("name", QUICK)
def test_torchvision(name, method):
    check(torchvision_model(name), lambda n, s: images(n, 64, torch.float32, s), method, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("method", ["permute", "zip"])
@pytest.mark.parametrize("name", HEAVY)
def test_torchvision_heavy(name, method, dtype):
    check(torchvision_model(name), lambda n, s: images(n, 64, dtype, s), method, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["permute", "zip"])
@pytest.mark.parametrize("name", QUICK)
def test_torchvision_double(name, method):
    check(torchvision_model(name), lambda n, s: images(n, 64, torch.float64, s), method, torch.float64)


def small_vit():
    return randomise(VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4))


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("method", ["permute", "zip"])
def test_attention(method, dtype):
    check(small_vit(), lambda n, s: images(n, 32, dtype, s), method, dtype, verify=True)


@pytest.mark.slow
@pytest.mark.hours
def test_vision_transformer():
    check(torchvision_model("vit_b_16"), lambda n, s: images(n, 224, torch.float32, s), "permute", torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["permute", "zip"])
def test_nothing_to_unmerge_in_a_full_zip(method):
    zipped = check(torchvision_model("resnet50"), lambda n, s: images(n, 64, torch.float32, s), method, torch.float32)
    assert zipped.report["unmerges"] == []


CUTS = [
    n for n in fxzip.inspect(Residual(), torch.randn(2, 3, 8, 8), verify=False).cuts if "." not in n and n != "linear"
]


@pytest.mark.parametrize("cut", CUTS)
def test_every_node_may_be_the_cut(cut):
    check(randomise(Residual()), lambda n, s: images(n, 8, torch.float64, s), "zip", torch.float64, cut)

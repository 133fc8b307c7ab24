"""A model zipped with a relabelled copy of itself is that model, at both heads."""

import pytest
import torch
from models import randomise
from models.networks import Mixed, PaddedResNet, Residual, torchvision_model
from torchvision.models import MaxVit, VisionTransformer, swin_transformer
from torchvision.models.video import mvit

import fxzip
from fxzip.analysis import relative_difference

BOUND = {torch.float32: 1e-4, torch.float64: 1e-9}
SLOWER = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0")
QUICK = ["squeezenet1_0", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWER)]
HEAVY = [
    "resnet50", "vgg16_bn", "alexnet", "densenet121", "resnext50_32x4d", "efficientnet_b0", "googlenet",
    "convnext_tiny",
]  # fmt: skip

LIGHTER = ["densenet121", "resnext50_32x4d", "efficientnet_b0", "googlenet"]


def noise(count, shape, seed):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def images(count, size, dtype, seed):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(model, draw, method, dtype, cut=None, verify=False, refit="auto"):
    """`draw(count, seed)` gives one batch: a tensor, a tuple or a dict. The sample is another one, of another size."""
    model = model.to(dtype)
    sample, data = draw(3, 0), [draw(6, seed) for seed in (1, 2, 3)]
    twin = fxzip.relabel(model, sample, seed=1, verify=verify)
    zipped = fxzip.compile_zip(
        model, twin, sample, data=data, method=method, until=cut, refit=refit, verify=verify, progress=False
    )
    for batch in (data[0], draw(5, 4)):
        inputs = batch if isinstance(batch, tuple) else (batch,)
        with torch.no_grad():
            if isinstance(batch, dict):
                expected, found = model(**batch), zipped(**batch)
            else:
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("method", ["permute", "zip"])
def test_shortcuts_without_parameters(method, dtype):
    zipped = check(randomise(PaddedResNet()), lambda n, s: images(n, 16, dtype, s), method, dtype, verify=True)
    assert not zipped.report["barriers"]
    assert zipped.report["flops"]["total"] <= 1.01 * zipped.report["flops"]["originals"][0]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("method", ["permute", "zip"])
@pytest.mark.parametrize("name", QUICK)
def test_torchvision(name, method):
    check(torchvision_model(name), lambda n, s: images(n, 64, torch.float32, s), method, torch.float32)


@pytest.mark.hours
@pytest.mark.slow
@pytest.mark.parametrize("name", LIGHTER)
def test_torchvision_slow(name):
    check(torchvision_model(name), lambda n, s: images(n, 64, torch.float32, s), "zip", torch.float32)


@pytest.mark.slow
@pytest.mark.hours
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("method", ["permute", "zip"])
@pytest.mark.parametrize("name", HEAVY)
def test_torchvision_heavy(name, method, dtype):
    check(torchvision_model(name), lambda n, s: images(n, 64, dtype, s), method, dtype)


@pytest.mark.hours
@pytest.mark.slow
@pytest.mark.parametrize("method", ["permute", "zip"])
@pytest.mark.parametrize("name", QUICK)
def test_torchvision_double(name, method):
    check(torchvision_model(name), lambda n, s: images(n, 64, torch.float64, s), method, torch.float64)


def small_vit():
    return randomise(VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("method", ["permute", "zip"])
def test_attention(method, dtype):
    check(small_vit(), lambda n, s: images(n, 32, dtype, s), method, dtype, verify=True)


def swin_v2():
    block, merging = swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2
    return swin_transformer.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], block=block, downsample_layer=merging, num_classes=5
    )


def mvit_v2():
    settings = [
        mvit.MSBlockConfig(1, 16, 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        mvit.MSBlockConfig(2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
        mvit.MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 1, 1]),
    ]
    return mvit.MViT(
        (32, 32), 4, settings, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True,
        proj_after_attn=True, num_classes=5,
    )  # fmt: skip


def max_vit():
    return MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=5)


SMALL = {"swin_v2": (swin_v2, (3, 32, 32)), "maxvit": (max_vit, (3, 32, 32)), "mvit_v2": (mvit_v2, (3, 4, 32, 32))}
LARGE = {
    "swin_v2_t": (3, 256, 256), "maxvit_t": (3, 224, 224), "vit_b_16": (3, 224, 224), "mvit_v2_s": (3, 16, 224, 224),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_transformers_for_images(name):
    make, shape = SMALL[name]
    check(randomise(make()), lambda n, s: noise(n, shape, s), "permute", torch.float32, verify=True)


@pytest.mark.slow
@pytest.mark.hours
@pytest.mark.parametrize("name", LARGE)
def test_large_transformers_for_images(name):
    def draw(count, seed):
        return noise(2 + seed % 2, LARGE[name], seed)

    check(torchvision_model(name), draw, "permute", torch.float32, refit=None)


TEXT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("config", "kind", "more"),
    [("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2, "use_cache": False}),
     ("BertConfig", "BertForSequenceClassification", {})],
)  # fmt: skip
@pytest.mark.slow
def test_transformers_for_text(config, kind, more):
    transformers = pytest.importorskip("transformers")
    model = randomise(getattr(transformers, kind)(getattr(transformers, config)(**TEXT, **more)))

    def draw(count, seed):
        return {"input_ids": torch.randint(1, 99, (count, 12), generator=torch.Generator().manual_seed(seed))}

    zipped = check(model, draw, "permute", torch.float32, verify=True)
    assert zipped.report["flops"]["heads"][0] < zipped.report["flops"]["trunk"]


@pytest.mark.slow
@pytest.mark.hours
@pytest.mark.parametrize("method", ["permute", "zip"])
def test_nothing_to_unmerge_in_a_full_zip(method):
    zipped = check(torchvision_model("resnet50"), lambda n, s: images(n, 64, torch.float32, s), method, torch.float32)
    assert zipped.report["unmerges"] == []


CUTS = [
    n for n in fxzip.inspect(Residual(), torch.randn(2, 3, 8, 8), verify=False).cuts if "." not in n and n != "linear"
]


@pytest.mark.slow
@pytest.mark.thinned(3)
@pytest.mark.parametrize("cut", CUTS)
def test_every_node_may_be_the_cut(cut):
    check(randomise(Residual()), lambda n, s: images(n, 8, torch.float64, s), "zip", torch.float64, cut)

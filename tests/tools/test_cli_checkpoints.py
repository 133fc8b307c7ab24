"""Checkpoints: what training loops write is read, what does not fit is listed whole, no code is run."""

import copy
import os
import pickle

import pytest
import torch
from models import cli as cli_models
from safetensors.torch import save_file
from torch import nn

from fxzip.errors import RecipeError
from fxzip.tools.cli.checkpoints import load, read
from fxzip.tools.cli.models import network, networks
from fxzip.tools.cli.recipe import Location, Model


@pytest.fixture
def model():
    return cli_models.small()


def assert_loads(path, model, **options):
    other = cli_models.small()
    assert not load(other, read(path, **options)).problems
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)


WRAPPED = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "best": 0.5},
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "ema": lambda state: {"ema": state},
    "two levels": lambda state: {"model_ema": {"module": state}, "epoch": 3},
    "data parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "compiled and parallel": lambda state: {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    "parts compiled": lambda state: {name.replace("0.", "0._orig_mod.", 1): value for name, value in state.items()},
    "lightning": lambda state: {"state_dict": {f"model.net.{name}": value for name, value in state.items()}},
    "averaged": lambda state: {"n_averaged": torch.tensor(4), **{f"module.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_what_training_loops_write(how, suffix, model, tmp_path):
    held = WRAPPED[how](model.state_dict())
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        if not all(isinstance(value, torch.Tensor) for value in held.values()):
            pytest.skip("safetensors hold tensors only")
        save_file({name: value.contiguous().clone() for name, value in held.items()}, path)
    else:
        torch.save(held, path)
    assert_loads(path, model)


def test_a_network_whose_own_names_begin_like_a_wrapper(tmp_path):
    own = nn.Module()
    own.module = nn.Linear(2, 3)
    torch.save(own.state_dict(), tmp_path / "own.pt")
    other = copy.deepcopy(own)
    nn.init.zeros_(other.module.weight)
    assert not load(other, read(tmp_path / "own.pt")).problems
    torch.testing.assert_close(other.module.weight, own.module.weight)


def test_weights_in_several_entries_must_be_chosen(model, tmp_path):
    path = tmp_path / "both.pt"
    other = cli_models.small()
    torch.save({"model": model.state_dict(), "model_ema": other.state_dict()}, path)
    with pytest.raises(
        RecipeError, match=r"in several entries, `model_ema`, `model`; say which with `entry: model_ema`"
    ):
        read(path)
    assert_loads(path, model, entry="model")
    assert_loads(path, other, entry="model_ema")
    with pytest.raises(RecipeError, match=r"`both.pt` has no entry `best`; it has `model`, `model_ema`"):
        read(path, "best")


def test_half_precision_is_converted_and_nothing_narrowed(model, tmp_path):
    half = {name: value.half() for name, value in model.state_dict().items()}  # the counter of batches, too
    result = load(cli_models.small(), half)
    assert result.notes == ["11 tensors of the checkpoint were converted to the network's dtype, without loss"]
    double = {name: value.double() * (1 + 1e-12) for name, value in model.state_dict().items()}
    problems = load(cli_models.small(), double).problems
    assert len(problems) == 8  # of the other three the values are zeros
    assert problems[0] == "another dtype: `0.weight` is float64 in the checkpoint, float32 in the network"


def test_all_differences_are_listed_and_nothing_is_loaded(model):
    state = dict(model.state_dict())
    del state["0.bias"]
    state["7.weight"] = torch.zeros(4, 8)
    state["loss.scale"] = torch.ones(1)
    state["3.bias"] = torch.full((8,), float("nan"))
    state["1.weight"] = state["1.weight"].double() + 1e-12
    other = cli_models.small()
    before = copy.deepcopy(other.state_dict())
    assert load(other, state).problems == [
        "missing in the checkpoint: `0.bias` [8]",
        "not in the network: `loss.scale` [1]",
        "another dtype: `1.weight` is float64 in the checkpoint, float32 in the network",
        "not finite: `3.bias` holds NaN or infinite values",
        "another shape: `7.weight` is [4, 8] in the checkpoint, [3, 8] in the network",
    ]
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_what_is_to_be_ignored_is_named(model):
    state = {**model.state_dict(), "loss.scale": torch.ones(1), "head.bias": torch.ones(1)}
    result = load(cli_models.small(), state, ["loss.*"])
    assert result.problems == ["not in the network: `head.bias` [1]"]
    assert load(cli_models.small(), state, ["loss.*", "head.*"]).notes == [
        "left out of the checkpoint, as `ignore` says: loss.scale, head.bias"
    ]
    del state["0.bias"]
    assert "missing in the checkpoint: `0.bias` [8]" in load(cli_models.small(), state, ["*"]).problems


def test_checkpoints_of_before_batches_were_counted(model):
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    assert not load(cli_models.small(), state).problems


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_code_in_checkpoints_is_not_run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": model.state_dict(), "args": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": Evil()}))
    torch.save(model, tmp_path / "whole.pt")
    for name in ("evil.pt", "plain.pth", "whole.pt"):
        with pytest.raises(RecipeError, match=f"`{name}` holds more") as caught:
            read(tmp_path / name)
        assert "torch.save(model.state_dict(), ...)" in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_files_that_are_no_checkpoints(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "cut.pt")
    save_file(model.state_dict(), tmp_path / "cut.safetensors")
    for name in ("cut.pt", "cut.safetensors"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(RecipeError, match=r"cannot be read as a checkpoint|holds more"):
            read(path)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "weights.h5").touch()
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    expected = {
        "empty.pt": "cannot be read",
        "empty.safetensors": "cannot be read",
        "weights.h5": "must be a file .safetensors",
        "list.pt": "`list.pt` holds a `list`",
        "none.pt": "`none.pt` holds `epoch`. Say where with `entry`",
        "absent.pt": "There is no checkpoint",
    }
    for name, message in expected.items():
        with pytest.raises(RecipeError, match=message):
            read(tmp_path / name)


def test_every_network_of_a_recipe_is_looked_at(model, tmp_path):
    pytest.importorskip("timm")
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "other.pt")
    models = {
        "a": Model(Location("models.cli:small"), checkpoint=Location(str(tmp_path / "other.pt"))),
        "b": Model(Location("timm:resnet_18"), checkpoint=Location("random")),
        "c": Model(Location("torchvision:resnet18")),
        "d": Model(Location("models.cli:small"), {"clases": 3}),
        "e": Model(Location("tim:resnet18")),
        "f": Model(Location("models.cli:NUMBER")),
        "g": Model(Location("models.cli:batches")),
        "h": Model(Location("resnet18")),
        "i": Model(Location("transformers:nowhere")),
    }
    with pytest.raises(RecipeError) as caught:
        networks(models)
    text = str(caught.value)
    for message in (
        "`models.a.checkpoint`: ", "does not fit `models.cli:small`, in 10 places:\n",
        "missing in the checkpoint: `7.bias` [3]\n",
        "another shape: `0.weight` is [1] in the checkpoint, [8, 3, 3, 3] in the network",
        "`models.b.architecture` names no model of timm: `resnet_18`. Did you mean `resnet18`",
        "`models.c` needs a `checkpoint`: `torchvision:resnet18` is made with random weights",
        "`models.d`: `models.cli:small(clases=3)` raised TypeError",
        "Did you mean `timm:resnet18`?",
        "`models.f.architecture` must name a function; `models.cli:NUMBER` is a `int`",
        "`models.g.architecture` must give a `torch.nn.Module`; `models.cli:batches` gives a `generator`",
        "`models.h.architecture` must be `timm:NAME`", "there is none in",
    ):  # fmt: skip
        assert message in text, message


@pytest.mark.parametrize("architecture", ["timm:test_resnet", "torchvision:shufflenet_v2_x0_5"])
def test_networks_of_packages(architecture, tmp_path):
    pytest.importorskip(architecture.partition(":")[0])
    made = network(Model(Location(architecture), {"num_classes": 4}, Location("random")), "models.a")
    save_file(made.module.state_dict(), tmp_path / "weights.safetensors")
    place = Location("weights.safetensors", cwd=str(tmp_path))
    again = network(Model(Location(architecture), {"num_classes": 4}, place), "models.a")
    x = torch.randn(2, *again.shape)
    torch.testing.assert_close(again.module(x), made.module(x), rtol=0, atol=0)
    assert again.module(x).shape == (2, 4)
    assert not again.module.training


def test_networks_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    own = transformers.ViTForImageClassification(config).eval()
    own.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    made = network(Model(Location("transformers:vit", cwd=str(tmp_path))), "models.a")
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(made.module(x).logits, own(x).logits, rtol=0, atol=0)
    assert made.preprocessing.size == (16, 16)
    assert made.preprocessing.mean == (0.5, 0.5, 0.5)

    with pytest.raises(
        RecipeError, match=r"weights in .* do not fit (?s:.*)`classifier.bias` is \[3\] in the checkpoint"
    ):
        network(Model(Location("transformers:vit", cwd=str(tmp_path)), {"num_labels": 5}), "models.a")
    weights = Location("vit/model.safetensors", cwd=str(tmp_path))
    again = network(Model(Location("transformers:vit", cwd=str(tmp_path)), checkpoint=weights), "models.a")
    torch.testing.assert_close(again.module(x).logits, own(x).logits, rtol=0, atol=0)
    fewer = {name: value for name, value in own.state_dict().items() if name != "classifier.bias"}
    torch.save(fewer, tmp_path / "fewer.pt")
    weights = Location("fewer.pt", cwd=str(tmp_path))
    with pytest.raises(RecipeError, match=r"missing in the checkpoint: `classifier.bias`"):
        network(Model(Location("transformers:vit", cwd=str(tmp_path)), checkpoint=weights), "models.a")


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(RecipeError, match=r"needs the package `timm`.*pip install 'fxzip\[zoo\]'"):
        network(Model(Location("timm:resnet18"), checkpoint=Location("random")), "models.a")

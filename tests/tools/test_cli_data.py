"""Inputs that recipes name: images as their models want them, arrays, tables, functions; and what is refused."""

import sys

import numpy as np
import pytest
import torch
from models import cli as cli_models
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fxzip.errors import DataError, RecipeError
from fxzip.tools.cli import preparing
from fxzip.tools.cli.judging import labelled_batches
from fxzip.tools.cli.models import Network, network
from fxzip.tools.cli.preprocessing import Preprocessing, of_timm, of_torchvision, of_transformers
from fxzip.tools.cli.recipe import Data, Location, Model, ZipRecipe
from fxzip.tools.cli.sources import Moved, source

GREY = Preprocessing((8, 8), 8, "bilinear", (0.5,), (0.5,))


def data(path, **options):
    return Data(Location(str(path)), **options)


def write_image(path, size=(20, 14), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return Image.open(path)


@pytest.mark.parametrize(
    "name", ["resnet18", "test_vit", "efficientnet_b0", "vit_base_patch16_clip_224.openai", "inception_v3"]
)
def test_images_are_preprocessed_as_timm_does(name, tmp_path):
    timm = pytest.importorskip("timm")
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    holder = nn.Module()
    holder.pretrained_cfg = timm.models.get_pretrained_cfg(name).to_dict()
    image = write_image(tmp_path / "a.png", (300, 260))
    expected = timm.data.create_transform(**config, is_training=False)(image.convert("RGB"))
    found = of_timm(holder, {}).transform()(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_squashed_images_are_as_timm_does(tmp_path):
    timm = pytest.importorskip("timm")
    config = {
        "input_size": (3, 64, 64), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9,
        "crop_mode": "squash",
    }  # fmt: skip
    holder = nn.Module()
    holder.pretrained_cfg = config
    image = write_image(tmp_path / "a.png", (100, 260))
    expected = timm.data.create_transform(**config, is_training=False)(image.convert("RGB"))
    torch.testing.assert_close(of_timm(holder, {}).transform()(image), expected, rtol=0, atol=1e-6)
    holder.pretrained_cfg = {**config, "crop_mode": "border"}
    assert of_timm(holder, {}) is None
    holder.pretrained_cfg = config
    assert of_timm(holder, {"in_chans": 1}) is None


@pytest.mark.parametrize("name", ["resnet50", "inception_v3", "swin_t"])
def test_images_are_preprocessed_as_torchvision_does(name, tmp_path):
    models = pytest.importorskip("torchvision.models")
    image = write_image(tmp_path / "a.png", (300, 400))
    expected = models.get_model_weights(name).DEFAULT.transforms()(image)
    torch.testing.assert_close(of_torchvision(name).transform()(image), expected, rtol=0, atol=1e-6)
    assert of_torchvision("fasterrcnn_resnet50_fpn") is None
    assert of_torchvision("raft_small") is None


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 24, "width": 32}},
        {"size": {"height": 24, "width": 24}, "resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]},
    ],
)
def test_images_are_preprocessed_as_transformers_does(options, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ViTImageProcessor(**options).save_pretrained(tmp_path)
    image = write_image(tmp_path / "a.png", (70, 60))
    own = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    expected = own(images=image, return_tensors="pt")["pixel_values"][0]
    found = of_transformers(tmp_path).transform()(image)
    assert found.shape == expected.shape == (3, 24, options["size"]["width"])
    # transformers resizes tensors and rounds to bytes elsewhere: one step of 255 of a mean of 0.5, or of 0.3 and 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 255 / min(options.get("image_std", [0.5])))


def test_folders_of_classes_are_labelled_in_the_order_of_names(tmp_path):
    for number, name in enumerate(["cat", "dog", "ant"]):
        for k in range(number + 1):
            write_image(tmp_path / name / "deep" / f"{k}.png", seed=k)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    found = source(data(tmp_path, batch_size=4), GREY, "test", labels=True)
    assert found.classes == ("ant", "cat", "dog")
    batches = list(found.batches)
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 2, 2]
    assert batches[0][0].shape == (4, 1, 8, 8)

    (tmp_path / "names.txt").write_text("dog\nbird\nant\ncat\n")
    place = Location("names.txt", cwd=str(tmp_path))
    found = source(data(tmp_path, classes=place), GREY, "test", labels=True)
    assert [labels.tolist() for _, labels in found.batches] == [[2, 2, 2, 3, 0, 0]]
    (tmp_path / "names.txt").write_text("dog\nbird\n")
    with pytest.raises(RecipeError, match=r"does not name the folders ant, cat"):
        source(data(tmp_path, classes=place), GREY, "test", labels=True)


def test_images_to_fit_on_come_mixed_and_the_same_each_time(tmp_path):
    for k in range(20):
        image = np.full((8, 8), 12 * k, dtype=np.uint8)
        (tmp_path / f"{k // 10}").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"{k // 10}" / f"{k:02}.png")
    found = source(data(tmp_path, batch_size=5), GREY, "data", labels=False)
    passes = [torch.cat([x[:, 0, 0, 0] for x in found.batches]) for _ in range(2)]
    assert torch.equal(*passes)
    assert not torch.equal(passes[0], passes[0].sort()[0])
    assert torch.equal(passes[0].sort()[0], (torch.arange(20) * 12 / 255 - 0.5) / 0.5)
    few = source(data(tmp_path, limit=7), GREY, "data", labels=False)
    assert torch.equal(next(iter(few.batches))[:, 0, 0, 0], passes[0][:7])


def test_a_broken_image_is_named(tmp_path):
    write_image(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 not an image")
    found = source(data(tmp_path), GREY, "data", labels=False)
    with pytest.raises(DataError, match=r"Every image must be readable; `.*bad.jpg` is not: UnidentifiedImageError"):
        list(found.batches)
    (tmp_path / "bad.jpg").unlink()
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"`.*cut.png` is not: OSError"):
        list(source(data(tmp_path, workers=1), GREY, "data", labels=False).batches)


def test_folders_that_cannot_be_meant(tmp_path):
    with pytest.raises(RecipeError, match=r"`data.path`: there is no `.*none`"):
        source(data(tmp_path / "none"), GREY, "data", labels=False)
    with pytest.raises(RecipeError, match=r"there is no image"):
        source(data(tmp_path), GREY, "data", labels=False)
    write_image(tmp_path / "a.png")
    with pytest.raises(RecipeError, match=r"say `size`, `mean`, `std` there"):
        source(data(tmp_path), None, "data", labels=False)
    with pytest.raises(RecipeError, match=r"one value each for grey images or three for RGB"):
        source(data(tmp_path, mean=[0.5, 0.5]), GREY, "data", labels=False)
    with pytest.raises(RecipeError, match=r"`data.interpolation` must be one of nearest"):
        source(data(tmp_path, interpolation="cubic"), GREY, "data", labels=False)
    with pytest.raises(RecipeError, match=r"`data.size` must be a height and a width"):
        source(data(tmp_path, size=[1, 2, 3]), GREY, "data", labels=False)
    with pytest.raises(RecipeError, match=r"a `batch_size` and a `limit` of at least 1"):
        source(data(tmp_path, batch_size=0), GREY, "data", labels=False)
    write_image(tmp_path / "class" / "b.png")
    with pytest.raises(RecipeError, match=r"it holds both, `a.png` and `class/`"):
        source(data(tmp_path), GREY, "data", labels=False)
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(RecipeError, match=r"must be a folder, or a file .npy or .safetensors"):
        source(data(tmp_path / "table.csv"), GREY, "data", labels=False)


def test_arrays(tmp_path):
    x, y = np.arange(12.0).reshape(4, 3), np.array([0, 1, 1, 2], dtype=np.int32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    (batch,) = source(data(tmp_path / "x.npy"), None, "data", labels=False).batches
    assert batch.dtype == torch.float32
    assert sorted(batch.tolist()) == x.tolist()
    labels = Location("y.npy", cwd=str(tmp_path))
    ((batch, found),) = source(data(tmp_path / "x.npy", labels=labels), None, "test", labels=True).batches
    assert batch.tolist() == x.tolist()
    assert found.tolist() == y.tolist()

    tensors = {"ids": torch.arange(12).reshape(4, 3).int(), "mask": torch.ones(4, 3), "y": torch.tensor([0, 1, 0, 1])}
    save_file(tensors, tmp_path / "x.safetensors")
    ((batch, found),) = source(
        data(tmp_path / "x.safetensors", labels=Location("y")), None, "test", labels=True
    ).batches
    assert {name: value.dtype for name, value in batch.items()} == {"ids": torch.int64, "mask": torch.float32}
    assert found.tolist() == [0, 1, 0, 1]
    (batch,) = source(data(tmp_path / "x.safetensors", inputs=["mask"]), None, "data", labels=False).batches
    assert batch.shape == (4, 3)


def test_arrays_that_cannot_be_meant(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "number.npy", np.array(3.0))
    np.save(tmp_path / "bytes.npy", np.zeros((4, 8, 8, 3), dtype=np.uint8))
    np.save(tmp_path / "x.npy", np.zeros((4, 3)))
    np.save(tmp_path / "y.npy", np.zeros(3))
    np.save(tmp_path / "none.npy", np.zeros((0, 3)))
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"123")
    (tmp_path / "broken.npy").write_bytes(b"123")
    expected = {
        "objects.npy": "is no file of one array",
        "broken.npy": "is no file of one array",
        "number.npy": "it holds one number",
        "bytes.npy": "holds bytes",
        "none.npy": "at least one; found",
        "broken.safetensors": "cannot be read",
    }
    for name, message in expected.items():
        with pytest.raises(RecipeError, match=message):
            source(data(tmp_path / name), None, "data", labels=False)
    with pytest.raises(RecipeError, match=r"equally many and at least one; found {'inputs': 4, 'labels': 3}"):
        source(data(tmp_path / "x.npy", labels=Location(str(tmp_path / "y.npy"))), None, "test", labels=True)
    with pytest.raises(RecipeError, match=r"there is no 'b'; there is `a`"):
        source(data(tmp_path / "x.safetensors", inputs=["b"]), None, "data", labels=False)


def test_tables_of_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(np.full((8, 8), 40 * k, dtype=np.uint8)) for k in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 3}, features=features)
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "images"))
    own = data(tmp_path / "images", split="train", labels=Location("label"))
    found = source(own, GREY, "test", labels=True)
    ((batch, labels),) = found.batches
    assert found.classes == ("cat", "dog")
    assert labels.tolist() == [0, 1] * 3
    torch.testing.assert_close(batch[:, 0, 3, 3], (torch.arange(6) * 40 / 255 - 0.5) / 0.5)
    with pytest.raises(RecipeError, match=r"`test.split` must be one of train; found None"):
        source(data(tmp_path / "images"), GREY, "test", labels=True)

    rows = {"input_ids": [[1, 2, 3]] * 4, "attention_mask": [[1, 1, 0]] * 4, "text": ["a"] * 4}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "text"))
    (batch,) = source(
        data(tmp_path / "text", inputs=["input_ids", "attention_mask"]), None, "data", labels=False
    ).batches
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (4, 3),
        "attention_mask": (4, 3),
    }
    with pytest.raises(RecipeError, match=r"`data.inputs` must say which columns are inputs; there is input_ids"):
        source(data(tmp_path / "text"), None, "data", labels=False)
    with pytest.raises(RecipeError, match=r"there is no 'ids'"):
        source(data(tmp_path / "text", inputs=["ids"]), None, "data", labels=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"pip install 'fxzip\[datasets\]'"):
        source(data(tmp_path / "text"), None, "data", labels=False)


def test_functions_are_called_anew_for_each_pass():
    found = source(data("models.cli:batches", arguments={"count": 3}), None, "data", labels=False)
    assert [len(list(found.batches)) for _ in range(2)] == [3, 3]
    assert not found.labelled
    labelled = {"count": 3, "labelled": True}
    assert source(data("models.cli:batches", arguments=labelled), None, "test", labels=True).labelled
    assert not source(data("models.cli:batches"), None, "test", labels=True).labelled
    with pytest.raises(RecipeError, match=r"`models.cli:failing\(\)` raised RuntimeError: no disk"):
        source(data("models.cli:failing"), None, "data", labels=False)
    with pytest.raises(RecipeError, match=r"`nowhere:batches`, which cannot be imported from here"):
        source(data("nowhere:batches"), None, "data", labels=False)


def prepared(**options):
    models = {
        "a": Model(Location("models.cli:small"), {"classes": 2}),
        "b": Model(Location("models.cli:small"), {"classes": 3}),
    }
    return preparing.prepare(ZipRecipe(models, **options))


def test_networks_with_inputs_of_their_own_keep_them():
    import fxzip

    both = fxzip.PerModel(torch.ones(2, 3), torch.ones(2, 4))
    (found,) = Moved([both], torch.device("cpu"))
    assert type(found) is fxzip.PerModel
    assert [value.shape[1] for value in found] == [3, 4]


def test_data_by_task_is_in_the_order_of_the_models(tmp_path):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.full((12, 3, 8, 8), ord(name)))
    made = prepared(data={"b": data(tmp_path / "b.npy"), "a": data(tmp_path / "a.npy")})
    assert {task: float(next(iter(own))[0, 0, 0, 0]) for task, own in made.batches.items()} == {"a": 97, "b": 98}
    assert list(made.batches) == ["a", "b"]
    assert made.sample.shape == (4, 3, 8, 8)
    with pytest.raises(RecipeError, match=r"must have the names of `models`, a, b; found a, c"):
        prepared(data={"a": data(tmp_path / "a.npy"), "c": data(tmp_path / "b.npy")})


def test_data_of_models_that_preprocess_differently(tmp_path):
    write_image(tmp_path / "a.png")
    other = Preprocessing((8, 8), 9, "bilinear", (0.1,), (0.5,))
    made = {"a": Network(nn.Identity(), GREY, None), "b": Network(nn.Identity(), other, None)}
    with pytest.raises(RecipeError, match=r"The models preprocess images differently(?s:.*)\n  b: .*'resize': 9"):
        preparing.sources(data(tmp_path), made, "data", labels=False)
    same = data(tmp_path, size=8, mean=[0.3], std=[1.0])
    assert preparing.sources(same, made, "data", labels=False)[None].preprocessing.mean == (0.3,)
    own = preparing.sources({"a": data(tmp_path), "b": data(tmp_path)}, made, "data", labels=False)
    whole = preparing.Prepared(made, own, {}, None, torch.device("cpu"))
    (note,) = preparing._differing(whole)
    assert "preprocessed differently, while an input of the zip goes to all heads: a: {" in note


def test_without_data_nothing_is_matched_by_random_numbers():
    with pytest.raises(RecipeError, match=r"`data` is missing: `method: auto` with `refit: auto` matches"):
        prepared(sample_input=[2, 3, 8, 8])
    models = {name: Model(Location("models.cli:small")) for name in "ab"}
    recipe = ZipRecipe(models, sample_input=[2, 3, 8, 8])
    assert preparing.prepare(recipe, "weights").sample.shape == (2, 3, 8, 8)
    with pytest.raises(RecipeError, match="`refit: repair` matches and fits"):
        preparing.prepare(recipe, "weights", "repair")
    with pytest.raises(RecipeError, match="`sample_input` must say what the networks take, since there is no `data`"):
        preparing.prepare(ZipRecipe(models), "weights")
    with pytest.raises(RecipeError, match="a shape of positive sizes"):
        preparing.prepare(ZipRecipe(models, sample_input=[0, 3]), "weights")
    with pytest.raises(RecipeError, match="`device` must be one that is there; found `gpu`"):
        preparing.prepare(ZipRecipe(models, sample_input=[2, 3, 8, 8], device="gpu"), "weights")


def test_classes_must_be_those_of_the_head(tmp_path):
    import fxzip

    both = fxzip.side_by_side([cli_models.small(3), cli_models.small(2)], torch.randn(2, 3, 8, 8))
    rgb = Preprocessing((8, 8), 8, "bilinear", (0.5,) * 3, (0.5,) * 3)
    for name in ("cat", "dog"):
        write_image(tmp_path / name / "a.png")
    own = source(data(tmp_path), rgb, "test", labels=True)
    with pytest.raises(RecipeError, match=r"`pets`: the data has 2 classes, the head 3 outputs"):
        labelled_batches(both, {"pets": own, "birds": own}, torch.device("cpu"))
    np.save(tmp_path / "x.npy", np.zeros((4, 3, 8, 8)))
    np.save(tmp_path / "y.npy", np.array([0, 1, 2, 3]))
    place = Location(str(tmp_path / "y.npy"))
    other = source(data(tmp_path / "x.npy", labels=place), None, "test", labels=True)
    with pytest.raises(RecipeError, match=r"labels must count the 3 classes of the head from 0; found 0 to 3"):
        list(labelled_batches(both, {"pets": other, "birds": other}, torch.device("cpu"))["pets"])


def test_a_network_of_timm_reads_images_as_its_package_does(tmp_path):
    pytest.importorskip("timm")
    write_image(tmp_path / "a.png", (200, 300))
    made = network(Model(Location("timm:test_resnet"), {"num_classes": 2}, Location("random")), "models.a")
    (batch,) = preparing.sources(data(tmp_path), {"a": made}, "data", labels=False)[None].batches
    assert batch.shape == (1, 3, 160, 160)

"""The CIFAR-10 benchmark: its loader, its recipe and its checkpoints, on a few synthetic images."""

import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="checkpoints of the benchmark need safetensors")
Image = pytest.importorskip("PIL.Image", reason="the loader of the benchmark needs Pillow")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import cifar  # noqa: E402
import cifar_data  # noqa: E402
import cifar_networks  # noqa: E402
import training  # noqa: E402

CHECKPOINTS = Path(os.environ.get("FXZIP_CHECKPOINTS", Path(__file__).parents[3] / "shared" / "checkpoints"))
SHARED_PAIR = [CHECKPOINTS / f"cifar10_resnet20x2_{letter}.safetensors" for letter in "ab"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ImageFolder of uniform images whose brightness is 25 × class + 5 × (number within the class)."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(cifar_data.CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (32, 32), (25 * label + 5 * i,) * 3)
                image.save(root / split / name / f"{i:04d}.png")
    return root


@pytest.fixture(scope="module")
def archive(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "cifar10.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for split in ("test", "train"):
            tar.add(folder / split, arcname=f"cifar10/{split}")
    return path


def brightness(images):
    return 25 * images.labels + 5 * (torch.arange(len(images)) % (len(images) // 10))


def test_folder_and_archive_give_the_same_images_in_order_of_name(folder, archive, tmp_path):
    for source in (folder, archive, archive.parent):
        loaded = cifar_data.load_cifar(source, tmp_path)
        for images, count in ((loaded.train, 40), (loaded.test, 20)):
            assert images.pixels.shape == (count, 3, 32, 32)
            assert images.pixels.dtype == torch.uint8
            assert torch.equal(images.labels, torch.arange(10).repeat_interleave(count // 10))
            assert torch.equal(images.pixels.float().mean((1, 2, 3)).long(), brightness(images))


def test_the_second_load_reads_the_cache(folder, tmp_path, monkeypatch):
    first = cifar_data.load_cifar(folder, tmp_path)
    monkeypatch.setattr(cifar_data, "_decode", lambda source: pytest.fail("decoded again"))
    assert torch.equal(cifar_data.load_cifar(folder, tmp_path).train.pixels, first.train.pixels)


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="found none of them at"):
        cifar_data.find_source(tmp_path)


def test_holdout_and_calibration_never_share_an_image():
    labels = torch.arange(10).repeat_interleave(20)
    pixels = torch.arange(200).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).to(torch.uint8)
    calibration, held = cifar_data.holdout_split(cifar_data.Images(pixels, labels))
    assert torch.equal(held.labels.bincount(), torch.full((10,), 10))
    assert not set(calibration.pixels[:, 0, 0, 0].tolist()) & set(held.pixels[:, 0, 0, 0].tolist())
    assert len(calibration) + len(held) == 200


def test_calibration_is_set_by_the_seed_and_shared_out_evenly():
    labels = torch.arange(10).repeat_interleave(5)
    pixels = (labels * 20).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).to(torch.uint8)
    images = cifar_data.Images(pixels, labels)
    even, odd = cifar_data.draw_calibration(images, [(0, 2), (1, 3)], 12, seed=1)
    assert len(even) == len(odd) == 6
    assert set(even[:, 0, 0, 0].tolist()) <= set(cifar_data.normalise(images.of((0, 2)).pixels)[:, 0, 0, 0].tolist())
    again = cifar_data.draw_calibration(images, [(0, 2), (1, 3)], 12, seed=1)
    assert torch.equal(torch.cat(again), torch.cat([even, odd]))
    with pytest.raises(ValueError, match=r"needs 11 images of the classes \[0, 2\]; there are 10"):
        cifar_data.draw_calibration(images, [(0, 2), (1, 3)], 22, seed=1)


def test_augmentation_moves_and_mirrors_whole_images():
    pixels = torch.randint(1, 255, (64, 3, 6, 5), dtype=torch.uint8)
    moved = training.augment(pixels, torch.Generator().manual_seed(0), padding=1)
    padded = torch.nn.functional.pad(pixels, (1,) * 4)
    for image, candidates in zip(moved, padded, strict=True):
        crops = [candidates[:, i : i + 6, j : j + 5] for i in range(3) for j in range(3)]
        assert any(torch.equal(image, crop) or torch.equal(image, crop.flip(-1)) for crop in crops)
    assert not torch.equal(moved, pixels)


@pytest.mark.parametrize("architecture", sorted(cifar_networks.NETWORKS))
def test_every_architecture_trains_saves_and_loads(architecture, tmp_path):
    images = cifar_data.Images(torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8), torch.arange(12) % 3)
    trained = training.train_network(
        architecture, images, (0, 2), width=0.5, epochs=1, batch_size=4, seed=1, progress=False
    )
    path = tmp_path / "network.safetensors"
    training.save_checkpoint(trained, path, architecture, 0.5)
    loaded = training.load_checkpoint(path)
    x = torch.randn(2, 3, 32, 32)
    assert loaded.classes == (0, 2)
    torch.testing.assert_close(loaded.network(x), trained.network(x))


def test_trained_networks_are_found_and_never_overwritten(folder, tmp_path, monkeypatch):
    arguments = f"--data {folder} --cache {tmp_path} --checkpoints {tmp_path} --architecture vit --width 0.2 --quiet"
    training_only = "--train --epochs 1 --train-images 20 --device cpu --tasks 0,1 2,3 4,5"
    settings = cifar.parser().parse_args(f"{arguments} {training_only}".split())
    images = cifar_data.load_cifar(folder, tmp_path)
    paths = cifar.train_models(settings, images.train)
    assert [path.name for path in paths] == [f"cifar10_vitx0.2_{letter}.safetensors" for letter in "abc"]
    models = cifar.find_models(settings)
    assert [model.classes for model in models] == [(0, 1), (2, 3), (4, 5)]
    rows = cifar.evaluate_originals(models, images.test, "cpu")
    assert [row.network for row in rows] == ["model 1 alone", "model 2 alone", "model 3 alone", "side by side"]
    assert rows[-1].flops == pytest.approx(3, abs=1e-6)
    assert len({len(line) for line in cifar.format_table(rows).splitlines()}) == 1
    settings.joint = True
    monkeypatch.setattr("fxzip.refit.joint.logit_shifts.LEAST", 8)  # the folder has no more images of a task
    drawn = cifar_data.draw_calibration(images.train, [model.classes for model in models], 24, seed=0)
    together = cifar.evaluate_joint(models, drawn, images.test, settings)
    assert (together.network, together.refit, together.per_task) == ("side by side", "joint", rows[-1].per_task)
    with pytest.raises(FileExistsError, match="does not overwrite"):
        cifar.train_models(settings, images.train)


def test_missing_checkpoints_are_named(tmp_path):
    settings = cifar.parser().parse_args(["--checkpoints", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"at least cifar10_resnet20x2_a\.safetensors and cifar10_resnet20x2_b"):
        cifar.find_models(settings)


@pytest.mark.skipif(
    not all(path.is_file() for path in SHARED_PAIR),
    reason=f"needs {SHARED_PAIR[0].name} and {SHARED_PAIR[1].name} in $FXZIP_CHECKPOINTS or ../shared/checkpoints",
)
def test_the_shared_pair_loads():
    models = [training.load_checkpoint(path) for path in SHARED_PAIR]
    assert [model.classes for model in models] == [(0, 2, 4, 6, 8), (1, 3, 5, 7, 9)]
    assert all(model.network(torch.zeros(1, 3, 32, 32)).shape == (1, 5) for model in models)


def test_several_draws_make_one_row_of_means_and_spreads():
    from cifar_table import Result, averaged, format_table

    rows = [Result("zip", "none", "1", "repair", (a, a), a, a / 2, 1.0, 1.0, 2 * a) for a in (0.5, 0.6, 0.7)]
    row = averaged(rows)
    assert (row.average, row.joint, row.seconds) == pytest.approx((0.6, 0.3, 1.2))
    assert row.spread == pytest.approx((0.1, 0.05))
    assert "60.00 ± 10.00  30.00 ± 5.00" in format_table([row])
    assert averaged(rows[:1]) is rows[0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("0.5", {"rank": 0.5}), ("auto", {"rank": "auto"}), ("auto:0.7", {"rank": "auto", "max_cost": 0.7})],
)
def test_ranks_are_numbers_or_share_the_budget(text: str, wanted: dict[str, object]) -> None:
    assert cifar.parse_rank(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"), [("1.25", {"width": 1.25}), ("auto:1.4", {"width": "auto", "max_cost": 1.4})]
)
def test_widths_are_numbers_or_a_cost(text, wanted):
    assert cifar.parse_width(text) == wanted


def test_the_figure_has_a_point_for_each_row_that_was_timed(tmp_path):
    pytest.importorskip("matplotlib")
    import cifar_figure

    row = {"network": "energy", "until": "none", "width": "1", "average": 0.9, "latency": 1.0}
    rows = [{**row, "network": "side by side", "latency": 2.0}, row, {**row, "latency": None}]
    for number in (1, 2):
        (tmp_path / f"{number}.json").write_text(json.dumps({"rows": rows}))
    cifar_figure.main([*(str(tmp_path / f"{number}.json") for number in (1, 2)), str(tmp_path / "rows.png")])
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("until", "width", "text"),
    [
        ("none", "1", ""),
        ("", "", ""),
        ("layer2", "auto:0.6", "until layer2, at most 0.6"),
        ("none", "1.25", "width 1.25"),
    ],
)
def test_the_figure_names_cuts_and_budgets(until, width, text):
    import cifar_figure

    assert cifar_figure.remark({"until": until, "width": width}) == text

"""`benchmarks/several.py`, `settings.py`: the rows and their costs, the drawn scenes and their labels."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import several
import several_scenes
from settings import Setting, built, flops, format_table, measure, outputs_of


def network(outputs, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs)
        ).eval()  # fmt: skip


def setting(count):
    models = {f"task {k}": network(2 + k, k) for k in range(count)}
    data = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = [model(data) for model in models.values()]

    def score(outputs):
        return {"off": float(sum((a - b).abs().mean() for a, b in zip(outputs, own, strict=True)))}

    return Setting(models, data[:16], data.split(50), data.split(50), score, costs=(0.5,))


def test_rows_of_two_networks_have_their_costs_and_figures():
    rows = {
        row.name: row
        for row in measure(setting(2), ["side by side", "alone, FLOPs", "average", "default"], say=lambda _: None)
    }
    assert list(rows) == ["side by side", "alone, FLOPs", "average", "default"]
    assert rows["side by side"].figures["off"] == pytest.approx(0, abs=1e-6)
    assert rows["side by side"].flops == pytest.approx(2, abs=0.1)
    assert rows["default"].flops == pytest.approx(1, abs=0.1)
    assert rows["alone, FLOPs"].flops <= 1.03
    assert 0 < rows["default"].figures["off"] < rows["average"].figures["off"]
    assert all(row.latency > 0 for row in rows.values())
    table = format_table(list(rows.values())).splitlines()
    assert table[0] == "| row | FLOPs | latency | off |"
    assert len(table) == 6


def test_one_network_is_narrowed_to_its_costs():
    one = setting(1)
    assert set(built(one)) == {f"narrow to 0.5, {how}" for how in ("latency", "FLOPs", "FLOPs, ranks too")}
    whole, narrowed = measure(one, ["narrow to 0.5, FLOPs"], say=lambda _: None)
    assert whole.name == "one network"
    assert narrowed.flops <= 0.5 < whole.flops


def test_a_row_that_cannot_be_had_is_left_out_with_the_reason():
    few, said = setting(2), []
    few = Setting(few.models, few.sample, [few.data[0][:20]], few.tests, few.score)
    rows = measure(few, ["side by side", "until auto, FLOPs"], said.append)
    assert [row.name for row in rows] == ["side by side"]
    assert any("holds out one of every 5 inputs" in line for line in said)


def test_flops_are_those_of_the_products():
    assert flops(nn.Linear(8, 32), torch.zeros(5, 8)) == 2 * 5 * 8 * 32


def test_scenes_are_labelled_by_what_they_show():
    scenes = several_scenes.draw_scenes(50, seed=3)
    assert torch.equal(scenes.images, several_scenes.draw_scenes(50, seed=3).images)
    ground = scenes.kinds == 0
    assert (scenes.distances[ground] == several_scenes.FAR).all()
    assert (scenes.distances[~ground] <= 3).all()
    assert scenes.kinds.max() <= several_scenes.KINDS
    for kinds, distances, nearest in zip(scenes.kinds, scenes.distances, scenes.nearest, strict=True):
        assert kinds.flatten()[distances.argmin()] == nearest + 1
    assert scenes.nearest.unique().numel() == several_scenes.KINDS


def test_true_labels_get_full_marks_and_three_networks_have_the_shapes_for_it():
    setting = several_scenes.scenes(images=20, tests=40, steps=1)
    truth = several_scenes.draw_scenes(40, seed=2)
    kinds = nn.functional.one_hot(truth.kinds, several_scenes.KINDS + 1).permute(0, 3, 1, 2).float()
    nearest = nn.functional.one_hot(truth.nearest, several_scenes.KINDS).float()
    perfect = (kinds, truth.distances[:, None], nearest)
    assert list(setting.score(perfect).values()) == pytest.approx([100, 0, 100])
    for model, output in zip(setting.models.values(), perfect, strict=True):
        assert outputs_of(model, setting.tests)[0].shape == output.shape
    wrong = setting.score((kinds.roll(1, 1), 1.1 * perfect[1], nearest.roll(1, 1)))
    assert list(wrong.values()) == pytest.approx([0, 10, 0], abs=1e-4)


def test_questions_have_an_answer_for_every_digit():
    assert len(several.QUESTIONS) == 8
    for answers in several.QUESTIONS.values():
        assert len(answers) == 10
        assert set(answers) == set(range(max(answers) + 1))

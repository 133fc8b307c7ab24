"""The demonstration: two networks trained, zipped, compared and exported."""

import os
import subprocess
import sys

import pytest
import torch

import fxzip
from fxzip import __main__ as cli
from fxzip.tools import demo

WIDTH = 8


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small run: its rows, what it wrote, and the path of the program."""
    lines: list[str] = []
    path = tmp_path_factory.mktemp("demo") / "deep" / "zipped.pt2"
    rows = demo.run(epochs=4, width=WIDTH, output=path, quiet=True, write=lines.append)
    return rows, "\n".join(lines), path


def test_the_split_is_disjoint_complete_and_set_by_the_seed():
    digits, again, other = demo.load_digits_split(0), demo.load_digits_split(0), demo.load_digits_split(1)
    assert len(digits.train_images) + len(digits.test_images) == 1797
    torch.testing.assert_close(digits.test_images, again.test_images, rtol=0, atol=0)
    assert not torch.equal(digits.test_images, other.test_images)
    train = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in train for image in digits.test_images)


def test_training_learns_its_task_and_leaves_the_generator_alone():
    digits = demo.load_digits_split(0)
    before = torch.get_rng_state()
    model = demo.train(
        digits.train_images, digits.train_labels, (0, 1, 2), seed=3, epochs=4, width=WIDTH, progress=False
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    accuracy = demo.evaluate_heads(lambda x: (model(x),), digits.test_images, digits.test_labels, [(0, 1, 2)])
    assert accuracy.average > 0.9


def test_training_is_set_by_its_seed():
    digits = demo.load_digits_split(0)
    images, labels = digits.train_images[:100], digits.train_labels[:100]
    first, again, other = (
        demo.train(images, labels, (5, 6), seed=seed, epochs=1, width=WIDTH, progress=False).linear.weight
        for seed in (0, 0, 1)
    )
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, other)


def test_the_table_has_every_network_once(finished):
    rows, written, _ = finished
    names = [row.name for row in rows]
    assert names[:3] == ["a alone (digits 0-4)", "b alone (digits 5-9)", "a and b side by side"]
    assert names[3:] == [
        *(
            f"{method}, {extent}"
            for extent in ("all shared", "until layer2", "until layer1")
            for method in demo.METHODS
        ),
        "a and b side by side, deciding together",
        "zip, all shared, deciding together",
    ]
    for name in names:
        assert sum(line.startswith(f"{name}  ") for line in written.splitlines()) == 1
    lengths = {len(line) for line in written.splitlines()[: len(rows) + 2]}
    assert len(lengths) == 1, "the columns of the table are not aligned"


def test_costs_and_accuracies_of_the_rows(finished):
    rows = {row.name: row for row in finished[0]}
    side_by_side = rows["a and b side by side"]
    assert side_by_side.flops == pytest.approx(2.0, abs=0.02)
    assert side_by_side.parameters == pytest.approx(2.0, abs=0.02)
    for method in demo.METHODS:
        full, late, early = (rows[f"{method}, {extent}"] for extent in ("all shared", "until layer2", "until layer1"))
        assert 0.95 < full.flops < 1.05
        assert full.flops < late.flops < early.flops < side_by_side.flops
        assert full.parameters < late.parameters < early.parameters < side_by_side.parameters
    assert side_by_side.accuracy > 0.9
    assert rows["zip, until layer1"].accuracy > side_by_side.accuracy - 0.02
    assert rows["zip, until layer1"].accuracy > rows["average, all shared"].accuracy
    assert rows["a alone (digits 0-4)"].joint is None


@pytest.mark.parametrize("name", ["a and b side by side", "zip, all shared"])
def test_heads_that_decide_together(finished, name):
    rows = {row.name: row for row in finished[0]}
    before, after = rows[name], rows[f"{name}, deciding together"]
    assert after.accuracy == pytest.approx(before.accuracy, abs=1e-3)
    assert after.joint > before.joint + 0.02
    assert (after.flops, after.parameters) == pytest.approx((before.flops, before.parameters), rel=0.02)


def test_the_program_loads_and_takes_any_batch_size(finished):
    _, written, path = finished
    assert f'torch.export.load("{path}").module()' in written
    model = torch.export.load(path).module()
    digits = demo.load_digits_split(0)
    for size in (1, 3, 16):
        heads = model(digits.test_images[:size])
        assert [tuple(head.shape) for head in heads] == [(size, 5), (size, 5)]
    accuracy = demo.evaluate(model, digits)
    row = next(row for row in finished[0] if row.name == "zip, all shared, deciding together")
    assert accuracy.joint == pytest.approx(row.joint, abs=0.01)


def test_a_program_with_other_outputs_is_refused(tmp_path, monkeypatch):
    model = demo.SmallResNet(classes=5, width=4).eval()

    class Heads(torch.nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.model, self.sign = model, sign

        def forward(self, x):
            return (self.sign * self.model(x),)

    monkeypatch.setattr(torch.export, "save", lambda program, path: None)
    loaded = torch.export.export(Heads(-1.0), (torch.ones(7, 1, 8, 8),))
    monkeypatch.setattr(torch.export, "load", lambda path: loaded)
    with pytest.raises(demo.fxzip.FxzipError, match=r"at any batch size; head 0 differs by .* on a batch of 7"):
        demo.export(Heads(1.0), torch.ones(8, 1, 8, 8), tmp_path / "zipped.pt2")


def test_the_command_passes_its_options_on(monkeypatch):
    seen = {}
    monkeypatch.setattr(demo, "run", lambda **options: seen.update(options))
    assert cli.main(["demo", "--seed", "4", "--epochs", "2", "--output", "x.pt2", "--quiet"]) == 0
    assert seen == {"seed": 4, "epochs": 2, "output": "x.pt2", "quiet": True}


def test_named_errors_end_the_command_with_one_line(monkeypatch, capsys):
    def fail(**options):
        raise demo.fxzip.FxzipError("Something must hold.")

    monkeypatch.setattr(demo, "run", fail)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "fxzip: Something must hold.\n"


@pytest.mark.parametrize("arguments", [[], ["demo", "--epochs", "0"], ["unzip"]])
def test_bad_arguments_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: fxzip" in capsys.readouterr().err


def test_python_dash_m_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "fxzip", "demo", "--help"], capture_output=True, text=True, check=True, env=os.environ
    )
    assert "--output" in result.stdout


def test_importing_the_demo_imports_neither_torchvision_nor_sklearn():
    code = (
        "import sys, fxzip.tools.demo; print([m for m in ('torchvision', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.strip() == "[]"


def test_the_version(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"fxzip {fxzip.__version__}\n"

"""The commands, one after another, on small networks: what they print, write and return."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from models import cli as cli_models
from PIL import Image
from safetensors.torch import save_file

import fxzip
from fxzip.__main__ import main
from fxzip.tools.cli import comparing, recipe, zipping
from fxzip.tools.cli.options import ELSEWHERE, options

TASKS = {"pets": 3, "birds": 2}
IMAGES = {"size": 8, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def run(*arguments):
    """The exit code of a command, also where the parser ends it."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code


def write_images(folder, count, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(folder / f"{number:03}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with checkpoints, images and a recipe, and the network that `fxzip zip` has made of them."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    models = {}
    for task, classes in TASKS.items():
        save_file(cli_models.small(classes).state_dict(), folder / f"{task}.safetensors")
        for number in range(classes):
            write_images(folder / "test" / task / f"class {number}", 4, seed=10 * classes + number)
        models[task] = {
            "architecture": "models.cli:small",
            "arguments": {"classes": classes},
            "checkpoint": f"{task}.safetensors",
        }
    write_images(folder / "images", 80)
    recipe = {
        "models": models,
        "data": {"path": "images", **IMAGES},
        "test": {task: {"path": f"test/{task}", **IMAGES} for task in TASKS},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert run("zip", folder / "recipe.yaml", "--out", folder / "zipped", "--quiet") == 0
    return folder


def test_zip_saves_what_compile_zip_gives(made):
    models = {}
    for task, classes in TASKS.items():
        models[task] = cli_models.small(classes)
        fxzip.tools.cli.checkpoints.load(models[task], fxzip.tools.cli.checkpoints.read(made / f"{task}.safetensors"))
    data = recipe.Data(recipe.Location(str(made / "images")), **IMAGES)
    source = fxzip.tools.cli.sources.source(data, None, "data", labels=False)
    sample = next(iter(source.batches))
    expected = fxzip.compile_zip(models, sample[:4], data=source.batches, progress=False)
    loaded = fxzip.load(made / "zipped")
    assert loaded.tasks == ("pets", "birds")
    for task in TASKS:
        torch.testing.assert_close(loaded(sample)[task], expected(sample)[task], rtol=0, atol=0)
    read = {**IMAGES, "size": [8, 8], "resize": 8, "interpolation": "bilinear"}
    assert loaded.report["preprocessing"] == {"pets": read, "birds": read}


def test_overrides_go_before_the_recipe_wherever_they_stand(made, tmp_path, capsys):
    assert run("zip", "--until=3", made / "recipe.yaml", "--out", tmp_path / "a", "--json", "--quiet") == 2
    assert "3" in capsys.readouterr().err
    assert run("zip", '--until="3"', made / "recipe.yaml", "--out", tmp_path / "b", "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(tmp_path / "b")
    assert found["report"]["cut"]["modules"] == ["3"]
    assert run("zip", made / "recipe.yaml", "--method={zip: {alpha: 0.5}}", "--out", tmp_path / "d", "--quiet") == 0
    assert "Zip(alpha=0.5, beta=1.0)" in capsys.readouterr().out


def test_labelled_data_give_accuracies_and_a_recipe_agreement(made, capsys):
    places = [f"--data.{task}={made / 'test' / task}" for task in TASKS]
    assert run("evaluate", made / "zipped", *places, "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["inputs"] == {"pets": 12, "birds": 8}
    assert run("evaluate", made / "zipped", "--recipe", made / "recipe.yaml", "--json") == 0
    both = json.loads(capsys.readouterr().out)
    assert both["accuracy"]["zipped"] == alone["accuracy"]["zipped"]
    assert set(both["accuracy"]) == {"zipped", "originals"}
    assert 0.5 < both["agreement"]["pets"]["r_squared"] <= 1
    arguments = ["--recipe", made / "recipe.yaml", "--data", made / "images"]
    assert run("evaluate", made / "zipped", *arguments) == 0
    text = capsys.readouterr().out
    assert "pets: same class" in text
    assert "on 80 inputs" in text
    assert "accuracy" not in text


def test_evaluation_counts_as_a_program_would(made, capsys):
    assert run("evaluate", made / "zipped", "--recipe", made / "recipe.yaml", "--json") == 0
    found = json.loads(capsys.readouterr().out)["accuracy"]["zipped"]
    network = fxzip.load(made / "zipped")
    for task, classes in TASKS.items():
        right = 0
        for label in range(classes):
            for path in sorted((made / "test" / task / f"class {label}").iterdir()):
                image = Image.open(path).resize((10, 8), Image.Resampling.BILINEAR).crop((1, 0, 9, 8))
                x = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float().div(255).sub(0.5).div(0.5)
                right += int(network(x)[task].argmax()) == label
        assert found[task] == right / (4 * classes)


def test_export_writes_onnx_that_evaluates_the_same(made, tmp_path, capsys):
    assert run("export", made / "zipped", tmp_path / "zipped.onnx") == 0
    assert "pets, birds" in capsys.readouterr().out
    found = []
    for target in (made / "zipped", tmp_path / "zipped.onnx"):
        assert run("evaluate", target, "--recipe", made / "recipe.yaml", "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["accuracy"] == found[1]["accuracy"]
    here, there = (own["agreement"]["birds"]["r_squared"] for own in found)
    assert there == pytest.approx(here, 1e-4)


def test_export_of_one_task_as_a_program(made, tmp_path):
    assert run("export", made / "zipped", tmp_path / "deep" / "pets.pt2", "--task=pets") == 0
    program = torch.export.load(tmp_path / "deep" / "pets.pt2").module()
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(program(x), fxzip.load(made / "zipped")(x)["pets"])


def test_report_writes_a_page_beside_the_folder(made, tmp_path, capsys):
    page = made / "zipped.html"
    assert run("report", made / "zipped") == 0
    network = fxzip.load(made / "zipped")
    assert f"wrote `{page}`, which a browser shows: {len(network.graph.nodes)} nodes" in capsys.readouterr().out
    network.report.html(tmp_path / "other.html")
    assert page.read_bytes() == (tmp_path / "other.html").read_bytes()
    assert run("report", made / "zipped") == 2
    assert "is there already. `--force` replaces it." in capsys.readouterr().err
    assert run("report", made / "zipped", "--out", tmp_path / "in" / "page.html", "--json") == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "in" / "page.html")
    assert run("report", made / "nothing") == 2
    assert "There is no folder" in capsys.readouterr().err


def test_compare_and_sweep_give_tables(made, tmp_path, capsys):
    out = tmp_path / "table.csv"
    methods = "--methods=[zip, {zip: {alpha: 0.5}}, [average, repair]]"
    assert run("compare", made / "recipe.yaml", methods, "--out", out, "--json") == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["rows"]
    assert [(row["method"], row["refit"]) for row in rows] == [
        ("side by side", None), ("zip", "lstsq"), ("Zip(alpha=0.5, beta=1.0)", "lstsq"), ("average", "repair"),
    ]  # fmt: skip
    assert all(0 <= row[task] <= 1 for row in rows for task in TASKS)
    with out.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["method"] for row in written] == [row["method"] for row in rows]
    assert float(written[1]["agreement"]) == rows[1]["agreement"]

    drawn = tmp_path / "in" / "table.html"
    assert run("sweep", made / "recipe.yaml", "--cuts=['0', '3']", "--until=0.5", "--quiet", "--out", drawn) == 0
    printed = capsys.readouterr()
    text = drawn.read_text(encoding="utf-8")
    assert f"<h1>{' + '.join(TASKS)}</h1>" in text
    assert text.count("<circle") == 3
    assert [line.split()[2] for line in printed.out.splitlines()[3:5]] == ["0", "3"]
    assert not printed.err
    assert run("sweep", made / "recipe.yaml", "--cuts=['3']", "--until=0.5", "--width=0.5") == 0
    assert "`fxzip sweep` does not go by `until`, `width` of the recipe" in capsys.readouterr().err


def test_inspect_shows_spaces_and_cuts(made, capsys):
    assert run("inspect", "models.cli:small", "--arguments.width=6", "--sample_input=[2, 3, 8, 8]", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [space["size"] for space in found["spaces"]] == [6, 6]
    assert "3" in found["cuts"]
    assert run("inspect", made / "zipped") == 0
    assert "zip of 2 models" in capsys.readouterr().out
    assert run("inspect", "models.cli:small") == 2
    assert "`sample_input` must say what the networks take" in capsys.readouterr().err


def test_every_option_of_compile_zip_is_one_of_recipes():
    import inspect

    keywords = {
        name for name, own in inspect.signature(fxzip.compile_zip).parameters.items()
        if own.kind is own.KEYWORD_ONLY or own.kind is own.VAR_POSITIONAL
    }  # fmt: skip
    assert {option.name for option in options()} | set(ELSEWHERE) == keywords
    assert not {option.name for option in options()} & set(ELSEWHERE)
    assert all(option.help for option in options())
    for own in (fxzip.compare, fxzip.sweep):  # what they take is in a recipe, or given by the command
        known = set(ELSEWHERE) | {option.name for option in options()}
        known |= {"score", "held_out", "cuts", "methods", "max_costs"}
        assert set(inspect.signature(own).parameters) <= known


def test_the_printed_recipe_is_a_recipe(made, tmp_path, capsys):
    assert run("zip", made / "recipe.yaml", "--until=0.5", "--out=x", "--print_config") == 0
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert values["until"] == 0.5
    assert values["models"]["pets"]["arguments"] == {"classes": 3}
    (made / "printed.yaml").write_text(text)
    assert run("zip", made / "printed.yaml", "--out", tmp_path / "zipped", "--quiet") == 0


def test_networks_that_take_several_inputs(tmp_path, capsys):
    """Tokens with a mask from one file: zipped, exported and judged."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6) < torch.randint(3, 7, (60, 1), generator=generator)).long()
    ids = torch.randint(0, 20, (60, 6), generator=generator)
    save_file({"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 2}, tmp_path / "tokens.safetensors")
    models = {task: {"architecture": "models.cli:Tokens", "arguments": {"classes": 2}} for task in TASKS}
    labelled = {"path": "tokens.safetensors", "labels": "labels"}
    recipe = {"models": models, "data": labelled, "test": dict.fromkeys(TASKS, labelled)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert run("zip", tmp_path / "recipe.yaml", "--out", tmp_path / "zipped", "--quiet") == 0
    assert run("export", tmp_path / "zipped", tmp_path / "zipped.onnx") == 0
    capsys.readouterr()
    for target in ("zipped", "zipped.onnx"):
        places = [f"--data.{task}={labelled}" for task in TASKS]
        places = [place.replace("tokens.safetensors", str(tmp_path / "tokens.safetensors")) for place in places]
        assert run("evaluate", tmp_path / target, *places, "--recipe", tmp_path / "recipe.yaml", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["inputs"] == {"pets": 60, "birds": 60}
        assert set(found["agreement"]["pets"]) >= {"same_class", "relative_error", "r_squared"}


# What must not happen.


def test_what_is_there_is_kept(made, tmp_path, capsys):
    before = (made / "zipped" / "model.safetensors").stat().st_mtime_ns
    assert run("zip", made / "recipe.yaml", "--out", made / "zipped") == 2
    assert "is there already. `--force` replaces it" in capsys.readouterr().err
    assert (made / "zipped" / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert run("zip", made / "recipe.yaml", "--out", tmp_path / "mine", "--force", "--quiet") != 0
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    for name in ("zipped.onnx", "table.csv"):
        (tmp_path / name).write_text("mine")
    assert run("export", made / "zipped", tmp_path / "zipped.onnx") == 2
    assert run("sweep", made / "recipe.yaml", "--out", tmp_path / "table.csv") == 2
    assert (tmp_path / "zipped.onnx").read_text() == (tmp_path / "table.csv").read_text() == "mine"


@pytest.mark.parametrize("stage", ["compile", "save"])
def test_interrupted_commands_leave_nothing(made, tmp_path, monkeypatch, capsys, stage):
    def stop(*_, **__):
        raise KeyboardInterrupt

    if stage == "compile":
        monkeypatch.setattr(zipping.fxzip, "compile_zip", stop)
    else:
        monkeypatch.setattr("fxzip.rewriting.serialization._put", stop)
    assert run("zip", made / "recipe.yaml", "--out", tmp_path / "zipped", "--quiet") == 130
    assert capsys.readouterr().err.strip().endswith("fxzip: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_what_was_done_when_a_search_or_table_was_interrupted_is_kept(made, tmp_path, monkeypatch, capsys):
    whole, table = fxzip.compile_zip, fxzip.Table(({"method": "zip", "until": None, "cost": 1.0, "agreement": 0.9},))

    def search(*given, **options):
        raise fxzip.errors.Interrupted("stopped", zipped=whole(*given, **options))

    def rows(*_, **__):
        raise fxzip.errors.Interrupted("stopped", table=table)

    monkeypatch.setattr(fxzip, "compile_zip", search)
    monkeypatch.setattr(fxzip, "sweep", rows)
    assert run("zip", made / "recipe.yaml", "--out", tmp_path / "zipped") == 130
    assert "the best network so far is in" in capsys.readouterr().err
    assert fxzip.load(tmp_path / "zipped").tasks == ("pets", "birds")
    assert run("sweep", made / "recipe.yaml", "--out", tmp_path / "rows.csv") == 130
    assert "interrupted; the table has the rows that were done" in capsys.readouterr().err
    assert (tmp_path / "rows.csv").read_text().splitlines()[1].startswith("zip,")


def test_an_interrupted_table_is_not_written(made, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "write_whole", write := fxzip.tools.cli.output.write_whole)
    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "table.csv", "a,b\n")
    assert list(tmp_path.iterdir()) == []


def test_errors_are_one_message_and_debug_shows_where(made, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ZeroDivisionError("what")

    monkeypatch.setattr(zipping, "prepare", fail)
    arguments = ["zip", made / "recipe.yaml", "--out", tmp_path / "zipped"]
    assert run(*arguments) == 1
    assert capsys.readouterr().err == "fxzip: ZeroDivisionError: what `--debug` shows where it came from.\n"
    assert run(*arguments, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_json_is_all_of_stdout(made, tmp_path, monkeypatch, capsys):
    def loud(recipe, *rest):
        print("a package says hello")
        return prepare(recipe, *rest)

    prepare = zipping.prepare
    monkeypatch.setattr(zipping, "prepare", loud)
    assert run("zip", made / "recipe.yaml", "--out", tmp_path / "zipped", "--json") == 0
    printed = capsys.readouterr()
    json.loads(printed.out)
    assert "a package says hello" in printed.err


def test_a_signal_ends_the_program_with_130(made, tmp_path):
    """In a process of its own, interrupted while it waits for batches."""
    (tmp_path / "slow.py").write_text("import time\ndef slow():\n    print('x', flush=True)\n    time.sleep(60)\n")
    recipe = yaml.safe_load((made / "recipe.yaml").read_text())
    recipe["data"] = {"path": "slow:slow"}
    for task in TASKS:
        recipe["models"][task]["checkpoint"] = str(made / f"{task}.safetensors")
    del recipe["test"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    paths = f"{Path(fxzip.__file__).parents[1]}:{Path(__file__).parents[1]}"
    process = subprocess.Popen(
        [sys.executable, "-m", "fxzip", "zip", "recipe.yaml", "--out", "zipped"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )  # fmt: skip
    assert process.stderr.readline() == "x\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "fxzip: interrupted\n"
    assert not (tmp_path / "zipped").exists()

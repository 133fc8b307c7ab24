"""Recipes as people write them, and as they should not: every one that is wrong ends with code 2 and says where."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fxzip.__main__ import main
from fxzip.tools.cli import zipping
from fxzip.tools.cli.parsing import recipe_in
from fxzip.tools.cli.recipe import Data

GOOD = {
    "models": {
        "pets": {"architecture": "models.cli:table", "arguments": {"classes": 3}},
        "birds": {"architecture": "models.cli:table", "arguments": {"classes": 2}},
    },
    "data": {"path": "models.cli:batches"},
}


def run(*arguments):
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes a recipe into a folder of its own, with changes, and gives its path."""
    monkeypatch.chdir(tmp_path)

    def write(text=None, **changes):
        (tmp_path / "deep").mkdir(exist_ok=True)
        path = tmp_path / "deep" / "recipe.yaml"
        path.write_text(yaml.safe_dump({**GOOD, **changes}, sort_keys=False) if text is None else text)
        return path

    return write


WRONG = {
    "no mapping": ("- models", "must hold `models`, `data` and options by name"),
    "nothing": ("", "must hold `models`, `data` and options by name"),
    "no YAML": ("models: {a: [b", "is no YAML"),
    "twice": ("models: {}\nuntil: a\nuntil: b", "`until` stands twice"),
    "binary": ("\x00\x01", "is no YAML"),
    "objects": ("models: !!python/object/apply:os.system ['touch executed']", "is no YAML"),
    "no models": ("until: layer3", "models"),
    "models as a list": ("models: [a, b]", "`models`: "),
    "one model": ("models: {a: {architecture: 'models.cli:table'}}", "at least two networks by name; found 1"),
    "no architecture": ("models: {a: {checkpoint: x}}", "architecture"),
    "unknown key": ("models: {}\nuntli: layer3", "there is no key `untli`"),
    "unknown key of a model": ("models: {a: {architecture: 'x:y', chekpoint: z}}", "there is no key `chekpoint`"),
    "a number as a name": ("1: 2", "by name, as `key: value`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_no_recipes(case, written, tmp_path, capsys):
    text, message = WRONG[case]
    assert run("zip", written(text), "--out", "zipped") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fxzip: ")
    assert "Traceback" not in error
    assert "Namespace" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


CHANGES = {
    "until": ({"until": [1]}, "`until`: "),
    "method": ({"method": "zipit"}, "'zip'"),
    "method with settings": ({"method": {"zip": {"alhpa": 1}}}, "`method: zip` takes the settings alpha, beta"),
    "two methods": ({"method": {"zip": {}, "energy": {}}}, "must be one of energy, zip"),
    "refit": ({"refit": {"repair": {}}}, "`refit` with settings must be one of lstsq, regmean"),
    "settings of a refit": ({"refit": {"lstsq": {"rigde": 1}}}, "`refit: lstsq` takes the settings"),
    "joint": ({"joint": "maybe"}, "`joint`: expected a bool"),
    "max_batches": ({"max_batches": "many"}, "`max_batches`: expected an int"),
    "no batches": ({"max_batches": 0}, "`max_batches` must be a whole number of at least 1"),
    "goals": ({"min_agreement": 0.9}, "must go with `until=\"auto\"`"),
    "nowhere": ({"until": "layer9"}, "layer9"),
    "size": ({"data": {"path": "images", "size": "large"}}, "`data`: "),
    "key of data": ({"data": {"path": "images", "szie": 3}}, "there is no key `szie`"),
    "key of data by task": ({"data": {"pets": {"path": "a"}, "birds": {"paht": "b"}}}, "paht"),
    "tasks of data": ({"data": {"pets": {"path": "a"}, "dogs": {"path": "b"}}}, "found pets, dogs"),
    "no data": ({"data": None}, "`data` is missing"),
    "data that are not there": ({"data": "images"}, "`data.path`: there is no `"),
    "device": ({"device": "abacus"}, "`device` must be one that is there; found `abacus`"),
    "sample": ({"sample_input": "models.cli:nothing"}, "cannot be imported"),
    "deep arguments": ({"models": {"a": {"architecture": "x:y", "arguments": {"a": {"b": {"c": 1}}}}}}, "`models`"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_recipes_with_a_mistake(case, written, tmp_path, capsys):
    changes, message = CHANGES[case]
    assert run("zip", written(**changes), "--out", "zipped", "--quiet") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert "Namespace" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--untli=3"], "there is no --untli=3. Did you mean --until?"),
        (["--until"], "--until needs a value: --until=VALUE"),
        (["--models.pets.chekpoint=a"], "there is no key `chekpoint`"),
        (["--models.pets.architecture.name=a"], "`models.pets.architecture` is"),
        (["--data=[1"], "`--data` must be a value in YAML"),
        (["again.yaml"], "again.yaml"),
    ],
)
def test_arguments_with_a_mistake(arguments, message, written, capsys):
    assert run("zip", written(), "--out", "zipped", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("zip", "recipe.yaml", "--out", "zipped") == 2
    assert "There is no recipe `recipe.yaml`" in capsys.readouterr().err
    assert run("zip", "recipe.yaml") == 2
    assert "--out" in capsys.readouterr().err
    assert run("zip", tmp_path, "--out", "zipped") == 2
    assert "cannot be read" in capsys.readouterr().err


def recorded(monkeypatch):
    """The recipe that the next command goes by, instead of doing anything."""
    seen = []

    def stop(recipe, *_):
        seen.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(zipping, "prepare", stop)
    return seen


def test_paths_are_relative_to_where_they_are_written(written, tmp_path, monkeypatch):
    path = written(data={"pets": "images", "birds": {"path": "/abs", "size": 3}})
    seen = recorded(monkeypatch)
    assert run("zip", path, "--models.pets.checkpoint=here.pt", "--out", "x") == 130
    assert run("zip", "--data.pets=other", "--data.birds.path", "there", path, "--out", "x") == 130
    assert run("zip", "--data", "all", path, "--out", "x") == 130
    first, second, third = seen
    assert first.data["pets"].path.absolute == str(tmp_path / "deep" / "images")
    assert first.data["birds"].path.absolute == "/abs"
    assert first.models["pets"].checkpoint.absolute == str(tmp_path / "here.pt")
    assert second.data["pets"].path.absolute == str(tmp_path / "other")
    assert second.data["birds"].path.absolute == str(tmp_path / "there")
    assert second.data["birds"].size == 3
    assert isinstance(third.data, Data)
    assert third.data.path.absolute == str(tmp_path / "all")


def test_an_architecture_alone_is_a_model(written, tmp_path):
    recipe = recipe_in(written(models={"a": "transformers:vit", "b": "models.cli:table"}))
    assert recipe.models["a"].architecture.relative == "transformers:vit"
    assert recipe.models["a"].architecture.cwd == str(tmp_path / "deep")


def test_text_and_numbers_stay_what_they_are(written):
    arguments = {"text": "3", "number": 3, "share": 1e-3, "flag": True, "names": ["1", 2], "more": {"deep": "0.5"}}
    models = {"a": {"architecture": "x:y", "arguments": arguments}}
    recipe = recipe_in(written(models=models, cuts=["0", 0.5, None, "layer1"]))
    assert recipe.models["a"].arguments == arguments
    assert [type(value) for value in recipe.models["a"].arguments.values()] == [str, int, float, bool, list, dict]
    assert recipe.cuts == ["0", 0.5, None, "layer1"]
    recipe = recipe_in(written("models: {a: {architecture: 'x:y', arguments: {ridge: 1e-3}}}"))
    assert recipe.models["a"].arguments == {"ridge": 0.001}


def test_the_demonstration_of_a_recipe_without_a_file(capsys):
    assert run("zip", "--print_config") == 2  # `models` is missing
    assert run("zip", "--models.a.architecture=timm:resnet18", "--print_config") == 0
    assert yaml.safe_load(capsys.readouterr().out)["models"]["a"]["architecture"] == "timm:resnet18"


@pytest.mark.parametrize("command", ["zip", "compare", "sweep", "inspect", "evaluate", "export", "demo"])
def test_every_command_has_help(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: fxzip {command}" in text
    assert "CONFIG" not in text
    if command in ("zip", "compare", "sweep"):
        names = ("until", "models.TASK.checkpoint", "data.batch_size", "sample_input")
        assert all(f"--{name}" in text for name in names)


@pytest.mark.slow
def test_the_command_line_needs_no_optional_package(tmp_path):
    """Without timm, torchvision, transformers, datasets and Pillow."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('timm', 'torchvision', 'transformers', 'datasets', 'PIL'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Missing())
from fxzip.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(GOOD, sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-c", code, "zip", "recipe.yaml", "--out", "zipped"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},  # recipes name functions of `models.cli`
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "saved in `zipped`" in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "timm:resnet18"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fxzip: This needs the package `timm`, which is not installed.")

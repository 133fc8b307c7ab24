"""What `fxzip` offers, where its stages are, and where names have gone."""

import importlib
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fxzip

PAGE = Path(__file__).parent.parent / "docs" / "own_pipeline.md"
STAGES = {
    "tracing": ["trace"],
    "analysis": ["analyse", "label", "self_check", "solve"],
    "partition": ["align", "find_trunk"],
    "calibration": ["Calibration", "observe"],
    "matching": ["Merge", "Method", "Moments", "SpaceMethod", "resolve"],
    "rewriting": ["plan", "planned", "rewrite"],
    "refit": ["record_statistics", "refits"],
    "compiler": ["Recipe", "assemble"],
}


def test_users_names_are_there_and_stages_are_not_among_them():
    assert all(hasattr(fxzip, name) for name in fxzip.__all__)
    errors = {name for name in fxzip.__all__ if name.endswith(("Error", "Warning"))}
    assert errors == {name for name in dir(fxzip.errors) if name.endswith(("Error", "Warning"))}
    stages = {name for names in STAGES.values() for name in names}
    assert not stages & set(fxzip.__all__)


@pytest.mark.parametrize("package", STAGES)
def test_stages_are_in_their_packages(package):
    module = importlib.import_module(f"fxzip.{package}")
    assert set(STAGES[package]) <= set(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


MOVED = [(name, module) for module, names in fxzip._MOVED.items() for name in names]


@pytest.mark.parametrize(("name", "module"), MOVED)
def test_names_that_moved_say_where_they_are(name, module):
    with pytest.warns(DeprecationWarning, match=rf"`fxzip\.{name}` has moved: use `{module}\.{name}`\.") as caught:
        found = getattr(fxzip, name)
    assert caught[0].filename == __file__
    assert found is getattr(importlib.import_module(module), name)


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fxzip' has no attribute 'tracee'"):
        fxzip.tracee  # noqa: B018


def test_what_has_left_says_why():
    with pytest.raises(AttributeError, match=r"CCA Merge has left fxzip: .* Use `method=\"permute\"`"):
        fxzip.CCA  # noqa: B018
    with pytest.raises(fxzip.OptionError, match="CCA Merge has left fxzip"):
        fxzip.matching.resolve("cca")


def test_importing_fxzip_warns_of_nothing():
    code = "import fxzip; from fxzip import *; from fxzip.baselines import KMeans; import fxzip.baselines"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code], check=True)


def test_baselines_are_all_methods_that_are_not_first_class():
    others = {entry.method.__name__ for entry in fxzip.matching.ENTRIES.values() if not entry.first_class}
    assert set(fxzip.baselines.__all__) == others | {"RegMean", "RegMeanPlusPlus", "reset_batchnorm"}
    assert sys.modules["fxzip.baselines"] is fxzip.baselines


def test_the_page_of_pipelines_runs_and_equals_compile_zip():
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        exec(compile(program, str(PAGE), "exec"), names)
    a, b, x, data = (names[key] for key in ("a", "b", "x", "data"))
    whole = fxzip.compile_zip(a, b, x, data=data, method="permute", refit="repair", hold_out=False, progress=False)
    assert all(map(torch.equal, names["network"](x), whole(x)))
    state = whole.state_dict()
    assert state.keys() == names["network"].state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in names["network"].state_dict().items())

"""Every block of Python in the README runs, in order, as one program."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def blocks():
    """The Python blocks of the README, each with the number of its first line."""
    text = README.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_the_blocks_run_in_order_as_one_program(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks()
    assert len(found) == README.read_text(encoding="utf-8").count("```python")
    for line, block in found:
        exec(compile("\n" * line + block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "trunk ends after" in printed
    assert "self-check" in printed


def test_the_first_two_commands_are_those_of_the_installation():
    commands = re.search(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert commands is not None
    first, second = commands[1].strip().splitlines()
    assert "fxzip demo" in first
    assert "pytest" in second

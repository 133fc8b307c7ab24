"""Every block of Python in the README and in the guide runs, in order, as one program each."""

import re
from pathlib import Path

import pytest
import torch
from test_docs import check_links, links_of

ROOT = Path(__file__).parent.parent
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"


def blocks(page):
    """The Python blocks of a page, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(
    "page", [pytest.param(README, id="README"), pytest.param(GUIDE, id="guide", marks=pytest.mark.slow)]
)
def test_the_blocks_run_in_order_as_one_program(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks(page)
    assert len(found) == page.read_text(encoding="utf-8").count("```python")
    for line, block in found:
        exec(compile("\n" * line + block, str(page), "exec"), names)
    printed = capsys.readouterr().out
    assert re.search(r"2 networks in one: \d\.\d\dx the FLOPs of one, .* of \d+ held-out inputs", printed)
    if page == README:
        assert printed.splitlines()[-1] in README.read_text(encoding="utf-8")
    else:
        assert "trunk ends after" in printed
        assert "self-check" in printed


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.read_text(encoding="utf-8").split()) < 900
    assert links_of(README)
    check_links(README)
    check_links(ROOT / "CONTRIBUTING.md")


def test_the_first_two_commands_are_those_of_the_installation():
    commands = re.search(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert commands is not None
    first, second = commands[1].strip().splitlines()
    assert "fxzip demo" in first
    assert "pytest" in second

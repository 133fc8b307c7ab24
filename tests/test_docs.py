"""The pages of the site: their Python runs, they can be found, and they leave out no public name.

Notebooks (start page, tutorials) are executed by the build, `sphinx-build -W`, and are only looked at here.
"""

import re
from pathlib import Path

import pytest
import torch

import fxzip

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
NOTEBOOKS = [page for page in PAGES if "file_format: mystnb" in (DOCS / page).read_text(encoding="utf-8")]
ELSEWHERE = {
    "guide.md": "tests/test_readme.py",
    "rules.md": "tests/analysis/test_rules.py",
    "own_pipeline.md": "tests/test_public_names.py",
    "page.md": None,  # one line, of a network that other pages have
    "cluster.md": None,  # programs for several processes
}
"""Pages with Python that is run by another file."""


def python_of(page):
    """The Python blocks of a page, each with the number of its first line."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def links_of(page):
    """Links of a page to files, with the places that they name in them."""
    text = re.sub(r"^```.*?^```$", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and python_of(page)])
def test_the_blocks_run_in_order_as_one_program(page, tmp_path, monkeypatch):
    if "onnx" in (DOCS / page).read_text(encoding="utf-8"):
        pytest.importorskip("onnxruntime")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, object] = {}
    for line, block in python_of(page):
        exec(compile("\n" * line + block, page, "exec"), names)


def test_python_of_every_page_is_run_somewhere():
    for page, place in ELSEWHERE.items():
        assert python_of(page), f"{page} has no Python: take it out of the list"
        assert place is None or Path(page).stem in (DOCS.parent / place).read_text(encoding="utf-8")
    for page in NOTEBOOKS:
        text = (DOCS / page).read_text(encoding="utf-8")
        assert not python_of(page), f"{page} has Python that the build does not run"
        assert text.count("```{code-cell} python3") >= 2
    assert len(NOTEBOOKS) >= 5


def test_every_page_is_in_the_navigation():
    listed = set()
    for page in PAGES:
        folder = Path(page).parent
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {Path(DOCS / folder / f"{entry}.md").resolve() for entry in entries}
    assert {(DOCS / page).resolve() for page in PAGES} - listed == {(DOCS / "index.md").resolve()}


@pytest.mark.parametrize("page", [page for page in PAGES if links_of(page)])
def test_links_lead_somewhere(page):
    for link in links_of(page):
        assert ((DOCS / page).parent / link.split("#")[0]).exists(), link


def test_the_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\.\. (?:autofunction|autoclass|data):: (\w+)$", text, re.MULTILINE))
    errors = {name for name in fxzip.__all__ if hasattr(fxzip.errors, name)}
    assert named | errors | {"baselines"} == set(fxzip.__all__)

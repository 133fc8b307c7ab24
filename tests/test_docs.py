"""The pages of the site: their Python runs, they can be found, and they leave out no public name.

Notebooks (start page, tutorials) are executed by the build, `sphinx-build -W`, and are only looked at here.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fxzip

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
NOTEBOOKS = [page for page in PAGES if "file_format: mystnb" in (DOCS / page).read_text(encoding="utf-8")]
ELSEWHERE = {
    "guide.md": "tests/test_readme.py",
    "rules.md": "tests/analysis/test_rules.py",
    "own_pipeline.md": "tests/test_public_names.py",
    "cluster.md": None,  # programs for several processes
}
"""Pages with Python that is run by another file."""
LONG = ["howto/latency.md"]  # times networks, again and again


def small_zip():
    """What a page takes for granted that begins with a zipped network."""
    a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    x, data = torch.randn(8, 4), [torch.randn(50, 4)]
    zipped = fxzip.compile_zip(a, b, x, data=data, progress=False)
    return {"fxzip": fxzip, "a": a, "b": b, "x": x, "data": data, "zipped": zipped}


GIVEN = {"page.md": small_zip}
"""Names that a page uses without making them."""


def python_of(page):
    """The Python blocks of a page, each with the number of its first line."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def prose_of(path):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links_of(path):
    """Links of a page to files and headings of the project."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)) if not link.startswith("http")]


def anchors_of(path):
    """What a link to a heading of the page names behind its `#`."""
    headings = re.findall(r"^#+ (.+)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_links(path):
    """Whether files and headings that a page links to are there."""
    for link in links_of(path):
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not heading or heading in anchors_of(target), link


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in LONG else [])
        for page in PAGES
        if page not in ELSEWHERE and python_of(page)
    ],
)
def test_the_blocks_run_in_order_as_one_program(page, tmp_path, monkeypatch):
    if "onnx" in (DOCS / page).read_text(encoding="utf-8"):
        pytest.importorskip("onnxruntime")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = GIVEN[page]() if page in GIVEN else {}
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


@pytest.mark.parametrize("page", [page for page in PAGES if links_of(DOCS / page)])
def test_links_lead_somewhere(page):
    check_links(DOCS / page)


def test_a_link_to_no_heading_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# A page\n\n## Its `code`, and more\n")
    for link, right in (("other.md#its-code-and-more", True), ("other.md#its-code", False), ("#top", False)):
        (tmp_path / "page.md").write_text(f"[a link]({link})")
        if right:
            check_links(tmp_path / "page.md")
        else:
            with pytest.raises(AssertionError, match=link):
                check_links(tmp_path / "page.md")


def test_the_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\.\. (?:autofunction|autoclass|data):: (\w+)$", text, re.MULTILINE))
    errors = {name for name in fxzip.__all__ if hasattr(fxzip.errors, name)}
    assert named | errors | {"baselines"} == set(fxzip.__all__)

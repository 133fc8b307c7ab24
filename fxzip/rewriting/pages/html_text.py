"""Templates filled in: a whole page, or a fragment for a notebook."""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ...tracing.whole_files import written_whole
from .charts import frontier, widths
from .content import Page, TablePage

if TYPE_CHECKING:
    from jinja2 import Environment

_HUES = (28, 165, 285, 340, 95, 190, 50, 255)
"""Of heads and of lines of a plot, in order. The trunk is blue."""
_SCRIPTS = ("vendor/cytoscape.min.js", "vendor/dagre.min.js", "templates/page.js")
_LICENCES = ("vendor/cytoscape.LICENSE", "vendor/dagre.LICENSE")


def page_html(page: Page) -> str:
    """One file with all that a browser needs to show a zipped network."""
    scripts = [_resource(name) for name in _SCRIPTS]
    template = _environment().get_template("page.html")
    return template.render(
        page=page,
        graph=graph_data(page),
        style=_resource("templates/page.css"),
        scripts=scripts,
        policy=_policy(scripts),
        licences=[_resource(name) for name in _LICENCES],
        frontier=frontier(page.points),
        widths=widths(page.spaces),
        hues=_page_hues(page),
    )


def table_html(page: TablePage) -> str:
    """One file with all that a browser needs to show a table of zips; it has no script."""
    return (
        _environment()
        .get_template("table_page.html")
        .render(
            page=page,
            style=_resource("templates/page.css"),
            policy=_policy([]),
            frontier=frontier(page.points),
            hues=_hues(len({point.line for point in page.points})),
        )
    )


def write_html(path: str | os.PathLike[str], text: str) -> None:
    """Write a page, which is never there in part."""
    with written_whole(path) as part:
        part.write_bytes(text.encode("utf-8", "xmlcharrefreplace"))  # names may hold halves of surrogate pairs


def graph_data(page: Page) -> dict[str, Any]:
    """What the script draws."""
    return {
        "nodes": [asdict(node) for node in page.nodes],
        "groups": [asdict(group) for group in page.groups],
        "spaces": [asdict(space) for space in page.spaces],
        "hues": _page_hues(page),
        "tasks": [task.name for task in page.tasks],
    }


def _page_hues(page: Page) -> list[int]:
    """Enough of them for all heads and lines."""
    return _hues(max(len(page.tasks), len({point.line for point in page.points}), 1))


def _hues(count: int) -> list[int]:
    """So many hues that differ."""
    return [_HUES[n] if n < len(_HUES) else round(n * 137.508) % 360 for n in range(count)]  # then by the golden angle


def fragment(template: str, **values: Any) -> str:
    """A short form for a notebook."""
    return str(_environment().get_template(template).render(**values))


def _policy(scripts: list[str]) -> str:
    """Nothing is loaded, and no script runs but these, known by their hashes."""
    sums = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{own}'" for own in sums) or "'none'"
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"


@cache
def _resource(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    result = Environment(
        loader=PackageLoader("fxzip", "rewriting/pages/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result.filters |= {"count": _count, "percent": _percent, "ratio": _ratio, "prose": _prose, "seconds": _seconds}
    return result


def _count(number: float) -> str:
    """A number as people read it: three digits and a unit.

    >>> [_count(n) for n in (7, 1234, 4_089_284_608)]
    ['7', '1.23 k', '4.09 G']
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.3g}" if isinstance(number, float) else str(number)


def _prose(text: str) -> str:
    """A sentence in which names stand in backticks, as HTML.

    >>> print(_prose("`a<b` ends"))
    <code>a&lt;b</code> ends
    """
    from markupsafe import Markup, escape

    parts = text.split("`")
    if len(parts) % 2 == 0:  # no pairs
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if n % 2 else escape(p) for n, p in enumerate(parts))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _seconds(time: float) -> str:
    """A time in milliseconds.

    >>> _seconds(0.01234)
    '12.3 ms'
    """
    return f"{1000 * time:.3g} ms"


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.2f}" if whole else "–"

"""The site: `sphinx-build -W --keep-going -b html docs build/docs` (`pip install -e '.[docs]'`).

Pages are Markdown (MyST). Tutorials and the start page are notebooks in Markdown, executed in the build; an error in
one fails it. The code blocks of all other pages are run by `tests/test_docs.py`.
"""

import os
import re
import warnings

import fxzip

project = "fxzip"
author = "the authors of fxzip"
copyright = author
version = release = fxzip.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["examples"]
html_theme = "furo"
html_title = f"fxzip {release}"
html_show_sphinx = False
smartquotes = False  # values of options stand in quotes

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # pages that begin a section at the third level

os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm in kernels without widgets
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 1200
nb_execution_show_tb = True
nb_execution_in_temp = True
nb_merge_streams = True

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

warnings.filterwarnings("ignore", category=DeprecationWarning)

_CODE = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_PARAGRAPH = re.compile(r"(?:\A|(?<=\n\n))(?!\s*>>>).+?(?=\n\n|\Z)", re.DOTALL)


def plain_docstring(app, what, name, obj, options, lines):
    """Docstrings are plain text with code in backticks, which reStructuredText would take for something else."""
    lines[:] = re.sub(r"(?:^|(?<=\n\n))(?!\s*>>>).+?(?=\n\n|$)", _literal, "\n".join(lines), flags=re.DOTALL).split(
        "\n"
    )


def _literal(paragraph):
    """A paragraph that is no example: code in double backticks, pages as links, other markup escaped."""
    text, parts, end = paragraph[0], [], 0
    for code in _CODE.finditer(text):
        page = re.fullmatch(r"docs/((?:\w+/)?\w+)\.md", code[2])
        parts += [_escaped(text[end : code.start()]), f":doc:`/{page[1]}`" if page else f"``{code[2]}``"]
        end = code.end()
    return "".join([*parts, _escaped(text[end:])])


def _escaped(text):
    return re.sub(r"(?<=\w)_(?!\w)|[*|]", r"\\\g<0>", text)


def setup(app):
    """Before napoleon, which reads sections and makes fields of them."""
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)

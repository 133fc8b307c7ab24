"""HTML from plain values: the page of a zipped network, that of a table of zips, and short forms for notebooks.

Everything here takes strings and numbers, knows no networks, and escapes all that it is given. A page is one file: its
style, its scripts (Cytoscape.js and dagre, in `vendor/`) and its data are in it, and its content security policy lets
it load nothing and run no script but these.
"""

from . import tabular
from .content import Costs, Node, Page, Point, Space, Stop, TablePage, Task
from .grouping import Group, Placed, grouped
from .html_text import fragment, page_html, table_html, write_html

__all__ = [
    "Costs",
    "Group",
    "Node",
    "Page",
    "Placed",
    "Point",
    "Space",
    "Stop",
    "TablePage",
    "Task",
    "fragment",
    "grouped",
    "page_html",
    "table_html",
    "tabular",
    "write_html",
]

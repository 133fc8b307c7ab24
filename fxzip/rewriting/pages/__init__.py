"""HTML from plain values: the page of a zipped network, and short forms for notebooks.

Everything here takes strings and numbers, knows no networks, and escapes all that it is given. A page is one file: its
style, its scripts (Cytoscape.js and dagre, in `vendor/`) and its data are in it, and its content security policy lets
it load nothing and run no script but these.
"""

from .content import Costs, Node, Page, Point, Space, Stop, Task
from .grouping import Group, Placed, grouped
from .html import fragment, page_html

__all__ = [
    "Costs",
    "Group",
    "Node",
    "Page",
    "Placed",
    "Point",
    "Space",
    "Stop",
    "Task",
    "fragment",
    "grouped",
    "page_html",
]

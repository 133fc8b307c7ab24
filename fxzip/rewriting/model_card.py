"""The text beside a saved network, in the form of the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

HEADER = """---
library_name: fxzip
tags:
- merge
- fxzip
---
"""


def card(report: Any, tasks: tuple[str, ...], versions: dict[str, str], trust: Sequence[str] = ()) -> str:
    """What the network is, the table of its report, and how it is loaded. `report`: None if there is none. `trust`:
    names of functions and classes that its reader must give.

    >>> print(card(None, ("pets", "birds"), {"fxzip": "1", "torch": "2"}).splitlines()[7])
    # A zipped network: `pets`, `birds`
    """
    names = ", ".join("`" + re.sub(r"[^\w \-]", "_", task) + "`" for task in tasks)
    text = "" if report is None else str(report)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    what = (
        f"{report['models']} networks, zipped into one multi-task network without training"
        if report is not None and "models" in report
        else "One task of a zipped network"
    )
    table = f"## Report\n\n{fence}text\n{text}\n{fence}\n\n" if text else ""
    given = f", trust=[{', '.join(re.sub(r'[^.0-9A-Z_a-z]', '_', name) for name in trust)}]" if trust else ""
    return (
        f"{HEADER}\n# A zipped network{f': {names}' if names else ''}\n\n{what}, by fxzip {versions['fxzip']} with "
        f"PyTorch {versions['torch']}.\n\n{table}"
        '## Use\n\n```python\nimport fxzip\n\nnetwork = fxzip.load("path/to/this/folder"'
        f"{given})\n```\n\nThe network is an ordinary `torch.fx.GraphModule`. The code of the original models is not "
        "needed" + (", but the functions and classes that `trust` names are.\n" if trust else ".\n")
    )

"""The page of a zipped network, from the network or from the folder in which it was saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..rewriting.module import EmittedModule
from ..rewriting.serialization import load


def write_page(
    network: EmittedModule | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    table: Sequence[Mapping[str, Any]] | None = None,
    trust: Iterable[Callable[..., Any]] = (),
) -> None:
    """Write the page of a zipped network: see `Report.html`.

    >>> import tempfile, torch, fxzip
    >>> from torch import nn
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    >>> zipped = fxzip.compile_zip(a, b, torch.randn(16, 4), progress=False)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     fxzip.save(zipped, f"{place}/zipped")
    ...     write_page(f"{place}/zipped", f"{place}/page.html")
    ...     os.path.exists(f"{place}/page.html")
    True

    Args:
        network: a zipped or narrowed network, or a folder in which one was saved.
        path: of the file, which is replaced if there is one.
        table: of zips of the same models, from `sweep` or `compare`, for the plot of cost against agreement.
        trust: as in `fxzip.load`, for a folder.

    Raises:
        InputError: the network has no report: it is that of one task alone. LoadError: as `fxzip.load`.
    """
    found = network if isinstance(network, EmittedModule) else load(network, trust=trust)
    if "fxzip_report" not in found.meta:
        raise InputError(
            "A page needs a network with its report; found one without, such as that of a single task. Take what "
            "`compile_zip` or `narrow` has returned, or the folder in which it was saved."
        )
    found.report.html(path, table=table)

"""What commands give: text or JSON on stdout, files that are whole or not there."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ...tracing.whole_files import written_whole


@dataclass(frozen=True)
class Result:
    """What a command found.

    Attributes:
        text: for people.
        values: for `--json`.
        interrupted: what Ctrl-C has cut short, where this is what was done by then.
    """

    text: str
    values: Any
    interrupted: str = ""

    def as_json(self) -> str:
        """One document of JSON.

        >>> print(Result("", {"cost": float("nan"), "heads": (1, 2)}).as_json())
        {
         "cost": null,
         "heads": [
          1,
          2
         ]
        }
        """
        return json.dumps(plain(self.values), indent=1, allow_nan=False)


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are not finite become null, what JSON does not know its text.

    >>> plain({1: (float("inf"), "a")})
    {'1': [None, 'a']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(own) for own in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def check_target(path: Path, *, force: bool, folder: bool = False) -> None:
    """Whether something may be written there; asked before anything is computed.

    Raises:
        RecipeError: it may not.
    """
    if path.exists() and path.is_dir() != folder:
        raise RecipeError(f"`{path}` is {'a folder' if path.is_dir() else 'no folder'}. Choose another name.")
    if path.exists() and not force and not (folder and not any(path.iterdir())):
        raise RecipeError(f"`{path}` is there already. `--force` replaces it.")
    above = next(own for own in path.absolute().parents if own.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RecipeError(f"Nothing can be written to `{above}`.")


def write_whole(path: Path, text: str) -> None:
    """Write a file, which is never there in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def as_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows with these columns as a table of comma-separated values.

    >>> as_csv([{"method": "zip", "cost": 1.0, "error": None}], ["method", "cost", "error"])
    'method,cost,error\\r\\nzip,1.0,\\r\\n'
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

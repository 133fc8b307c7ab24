"""Files that are there whole or not at all: written beside their place, and renamed.

Another process may read the file meanwhile, or write it too, and any may be killed.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished-"
"""How names begin of what is not whole yet; such files are left where a process was killed."""


def beside(place: Path) -> Path:
    """A name that nothing has, in the folder of a place.

    >>> beside(Path("zips/pets")).parent
    PosixPath('zips')
    """
    return place.with_name(f"{UNFINISHED}{uuid.uuid4().hex}")


@contextmanager
def written_whole(place: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a file that takes its place when the block ends; if the block fails, what is there stays.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written_whole(f"{folder}/a.txt") as part:
    ...         _ = part.write_text("all of it")
    ...     [(path.name, path.read_text()) for path in Path(folder).iterdir()]
    [('a.txt', 'all of it')]
    """
    target = Path(os.path.abspath(place))
    part = beside(target)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)

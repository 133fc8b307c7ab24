"""What a compile has found out so far: values that need not be found again if it is interrupted and begun anew.

A stage that takes long asks for its result by `Store.value`, with a function that makes it. The result has to follow
from the request and from what was asked for before; that is all a stage knows. Here everything is made, and nothing
kept; `compiler/resuming.py` keeps it in a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Store:
    """Keeps nothing.

    >>> Store().value("moments", lambda: 3)
    3
    """

    def value(self, name: str, make: Callable[[], T], *, once: bool = False) -> T:
        """A value of a stage: tensors, numbers, text, containers of these, or one of `resuming.KINDS`.

        Args:
            name: what it is. Of one name there may be several in a part, which are told apart by their order.
            make: makes it.
            once: there is one in the whole request, whichever part asks for it first.
        """
        return make()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Values that are asked for inside are told apart by their order from here on: a part that is gone through
        again finds its values again."""
        yield

    def bind(self, facts: Mapping[str, str]) -> None:
        """Say what the values follow from, by name."""


NOTHING = Store()
"""Where nothing is to be resumed."""

"""One display over a whole request: the stage it is in, the zip that is being made, time spent and time left.

In a terminal or a notebook it is a bar (tqdm), drawn anew twice a second whatever the stage does. Elsewhere each stage
is a line in the log `fxzip` once it is done. Stages count by the share of the time that they usually take.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from tqdm.auto import tqdm

from ..calibration import processes

T = TypeVar("T")
logger = logging.getLogger("fxzip")

ONCE = {"tracing": 8.0, "checking": 12.0, "holding out": 3.0, "observing": 8.0}
"""Share of the time of each stage that is gone through once."""

EACH = {"matching": 10.0, "rewriting": 4.0, "refitting": 50.0, "recording statistics": 4.0, "judging": 3.0}
"""The same of the stages of each zip."""

_PULSE = 0.5  # seconds


class Pulse(threading.Thread):
    """Draws a bar anew twice a second. It draws no random numbers."""

    leaves_random_state = True

    def __init__(self, bar: Any) -> None:
        super().__init__(name="fxzip display", daemon=True)
        self._bar, self._over = bar, threading.Event()

    def run(self) -> None:
        while not self._over.wait(_PULSE):
            self._bar.refresh()

    def end(self) -> None:
        """Stop, and wait until it has."""
        self._over.set()
        self.join()


class Display:
    """Shows how far a request is; used as a context manager.

    >>> with Display(show=False) as display, display.stage("matching"):
    ...     pass
    """

    def __init__(self, *, show: bool | None = None) -> None:
        """`show`: a bar; None: on a terminal or in a notebook only."""
        self.first = processes.rank() == 0
        self.show = self.first and (_watched() if show is None else show)
        self._bar: Any = None
        self._pulse: Pulse | None = None
        self._total = sum(ONCE.values()) + sum(EACH.values())
        self._about, self._zips, self._stage = "", 0, ""
        self._depth = 0

    def __enter__(self) -> Display:
        self._depth += 1
        if self.show and self._bar is None:
            form = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
            self._bar = tqdm(total=self._total, desc="fxzip", leave=False, bar_format=form)
            self._pulse = Pulse(self._bar)
            self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._bar is not None and not self._depth:
            assert self._pulse is not None
            self._pulse.end()
            self._bar.close()
            self._bar = self._pulse = None

    def expect(self, zips: int) -> None:
        """So many zips will be made."""
        self._total = sum(ONCE.values()) + zips * sum(EACH.values())
        if self._bar is not None:
            self._bar.total = self._total

    def about(self, text: str) -> None:
        """What the stages from now on work at, the cut that is tried say."""
        self._about = text
        self._zips += 1
        self._describe()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage; its share of the time counts as done once it ends."""
        before, start = self._stage, time.perf_counter()
        self._stage = name
        self._describe()
        base = 0.0 if self._bar is None else float(self._bar.n)
        try:
            yield
        finally:
            self._stage = before
        self._log("%s%s: %.1f s", name, f" ({self._about})" if self._about else "", time.perf_counter() - start)
        self._reach(base + _share(name))

    def watch(self, name: str, items: Iterator[T], total: int | None) -> Iterator[T]:
        """The items, batches of a pass, each shown as it comes; `total`: how many there are, if that is known."""
        base = 0.0 if self._bar is None else float(self._bar.n)
        for number, item in enumerate(items, 1):
            self._describe(f"{name}, batch {number}" + (f" of {total}" if total else ""))
            yield item
            if total:
                self._reach(base + _share(self._stage) * 0.9 * min(number / total, 1.0))

    def _log(self, text: str, *values: object) -> None:
        """Of several processes the first speaks for all."""
        if self.first:
            logger.info(text, *values)

    def say(self, text: str) -> None:
        """A sentence: in the log, and above the bar."""
        self._log("%s", text)
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)

    def _describe(self, stage: str = "") -> None:
        if self._bar is not None:
            text = stage or self._stage or "fxzip"
            self._bar.set_description_str(f"{text} ({self._about})" if self._about else text)

    def _reach(self, amount: float) -> None:
        if self._bar is not None:
            self._bar.update(max(min(amount, self._total) - self._bar.n, 0.0))


def _share(name: str) -> float:
    return ONCE.get(name, EACH.get(name, 0.0))


def _watched() -> bool:
    """Whether somebody sees what is drawn: standard error is a terminal, or this is a notebook."""
    shell = sys.modules.get("IPython")
    kernel = type(shell.get_ipython()).__name__ if shell is not None else ""
    return sys.stderr.isatty() or kernel == "ZMQInteractiveShell"

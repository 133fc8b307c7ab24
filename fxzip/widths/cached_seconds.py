"""Seconds that were measured before, kept per device in the user's cache folder.

One JSON file for each device, number of threads and version of PyTorch, in `$FXZIP_CACHE`, else in the folder `fxzip`
of `$XDG_CACHE_HOME` (`~/.cache` by default). What cannot be read or written is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..tracing.whole_files import written_whole

MOST = 20_000
"""Entries of a file; the oldest leave."""


def cache_folder() -> Path:
    """Where timings are kept."""
    own = os.environ.get("FXZIP_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxzip"


def device_name(device: torch.device) -> str:
    """What timings are comparable on.

    >>> device_name(torch.device("cpu")).startswith("cpu ")
    True
    """
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        what = f"{platform.processor() or platform.machine()} {_model()} {torch.get_num_threads()} threads"
    return f"{device.type} {what} torch {torch.__version__}"


def _model() -> str:
    """The model of the processor, where the system says it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


@dataclass(eq=False)
class CachedSeconds:
    """Seconds by signature.

    Attributes:
        path: the file; None: nothing is kept.
        seconds: by the digest of the signature.
    """

    path: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, device: torch.device) -> CachedSeconds:
        """What is known of a device."""
        name = hashlib.sha256(device_name(device).encode()).hexdigest()[:16]
        return cls.of_file(cache_folder() / "seconds" / f"{name}.json")

    @classmethod
    def of_file(cls, path: Path) -> CachedSeconds:
        """What a file holds; nothing if it cannot be read."""
        return cls(path, _read(path))

    def get(self, signature: str) -> float | None:
        """The seconds of a call; None if it was never timed."""
        return self.seconds.get(_digest(signature))

    def add(self, found: Mapping[str, float]) -> None:
        """Keep what was timed; of what is known already the lower value stays."""
        for signature, seconds in found.items():
            key = _digest(signature)
            self.seconds[key] = min(seconds, self.seconds.pop(key, seconds))
        if self.path is not None:
            others = _read(self.path)
            self.seconds = {**others, **self.seconds}
            with suppress(OSError):
                _write(self.path, dict(list(self.seconds.items())[-MOST:]))


def _digest(signature: str) -> str:
    return hashlib.sha256(signature.encode()).hexdigest()[:24]


def _read(path: Path) -> dict[str, float]:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return {str(key): float(value) for key, value in found.items() if isinstance(value, float) and value >= 0}
    return {}


def _write(path: Path, values: Mapping[str, float]) -> None:
    """Whole or not at all: other processes may read and write too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_text(json.dumps(values))

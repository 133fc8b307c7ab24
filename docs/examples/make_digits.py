"""Inputs for `two_networks.sh`: two timm networks trained on digits of their own, and the images in folders.

    python docs/examples/make_digits.py FOLDER

In your own work these are what you have already. FOLDER gets `low.safetensors` and `high.safetensors` (networks that
know the digits 0 to 4 and 5 to 9), `calibration/` (unlabelled images), and `test/low/`, `test/high/` (a folder for each
class). The digits are scikit-learn's, 8 x 8 pixels, enlarged to 32 x 32.
"""

import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

TASKS = {"low": (0, 1, 2, 3, 4), "high": (5, 6, 7, 8, 9)}
MEAN = STD = 0.5  # what timm says of this architecture
EPOCHS = 6


def main(folder: Path) -> None:
    """Write everything."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = np.kron(digits.images[order] * (255 / 16), np.ones((4, 4))).round().astype(np.uint8)
    labels = digits.target[order]
    train, test = slice(0, 1297), slice(1297, None)

    (folder / "calibration").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images[train][:600]):
        Image.fromarray(image).save(folder / "calibration" / f"{number:04}.png")
    for task, classes in TASKS.items():
        for number, (image, label) in enumerate(zip(images[test], labels[test], strict=True)):
            if label in classes:
                place = folder / "test" / task / str(label)
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(place / f"{number:04}.png")
        chosen = np.isin(labels[train], classes)
        model = trained(images[train][chosen], labels[train][chosen] - classes[0])
        save_file(model.state_dict(), folder / f"{task}.safetensors")


def trained(images: np.ndarray, labels: np.ndarray) -> torch.nn.Module:
    """A small network of timm that tells five digits apart."""
    torch.manual_seed(int(labels.sum()))
    model = timm.create_model("test_resnet", num_classes=5)
    inputs = torch.tensor(images)[:, None].float().div(255).sub(MEAN).div(STD).expand(-1, 3, -1, -1)
    targets = torch.tensor(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs)).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    return model.eval()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

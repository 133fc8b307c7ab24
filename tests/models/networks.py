"""Networks for the tests of the pipeline, and parameters that are not at their initial values."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from models import randomise


def torchvision_model(name: str, seed: int = 0, **options) -> nn.Module:
    settings = {"num_classes": 10, "weights": None} | options
    if name in ("googlenet", "inception_v3"):
        settings["init_weights"] = False
    return randomise(torchvision.models.get_model(name, **settings), seed)


class Mixed(nn.Module):
    """Two inputs, two outputs, concatenation, a module called twice, tied weights."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.twice = nn.Conv2d(12, 12, 3, padding=1)
        self.embed = nn.Embedding(20, 10)
        self.decode = nn.Linear(10, 20, bias=False)
        self.decode.weight = self.embed.weight
        self.join = nn.Linear(22, 16)
        self.back = nn.Linear(16, 10)
        self.classify = nn.Linear(16, classes)

    def forward(self, image: Tensor, words: Tensor) -> dict[str, Tensor]:
        x = self.image(image)
        x = F.relu(x + self.twice(F.relu(self.twice(x))))
        y = F.gelu(self.join(torch.cat([x.mean((2, 3)), self.embed(words).mean(1)], 1)))
        return {"words": self.decode(self.back(y)), "classes": self.classify(y)}


class PaddedBlock(nn.Module):
    """A residual block whose shortcut subsamples and pads channels with zeros (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad or self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class PaddedResNet(nn.Module):
    """ResNet-20 with shortcuts of option A; fewer blocks make it small."""

    def __init__(self, classes: int = 10, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, 1, blocks)
        self.layer2 = self._stage(width, 2 * width, 2, blocks)
        self.layer3 = self._stage(2 * width, 4 * width, 2, blocks)
        self.linear = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        first = PaddedBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(PaddedBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class Block(nn.Module):
    """A residual block with a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = None
        if stride > 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.down is None else self.down(x)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + skip)


class Residual(nn.Module):
    """A small residual classifier."""

    def __init__(self, classes: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.layer1 = nn.Sequential(Block(width, width), Block(width, width))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width))
        self.linear = nn.Linear(2 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean((2, 3)))


class Segmenter(Residual):
    """The same backbone with a segmentation head."""

    def __init__(self, classes: int = 5, width: int = 8) -> None:
        super().__init__(1, width)
        self.linear = nn.Identity()
        self.mask = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.mask(self.features(x)), scale_factor=2.0)

"""Networks that are trained and zipped by the benchmarks: plain PyTorch, written without fxzip in mind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Callable[[int], nn.Module]


def layer_norm(channels: int) -> nn.Module:
    """LayerNorm over channels and positions, with a scale and a bias for each channel."""
    return nn.GroupNorm(1, channels)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, with the ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                norm(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet20(nn.Module):
    """ResNet-20 for 32×32 images (He et al. 2016, section 4.2); `width` multiplies the 16/32/64 channels."""

    def __init__(self, classes: int, width: float = 2, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        w = int(16 * width)
        self.conv1 = nn.Conv2d(3, w, 3, 1, 1, bias=False)
        self.bn1 = norm(w)
        self.layer1 = self._stage(w, w, 1, norm)
        self.layer2 = self._stage(w, 2 * w, 2, norm)
        self.layer3 = self._stage(2 * w, 4 * w, 2, norm)
        self.linear = nn.Linear(4 * w, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Sequential:
        steps = ((inputs, stride), (outputs, 1), (outputs, 1))
        return nn.Sequential(*(BasicBlock(channels, outputs, step, norm) for channels, step in steps))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean(dim=(2, 3)))


class VGG11(nn.Module):
    """VGG-11 with BatchNorm for 32×32 images (Simonyan & Zisserman 2015, column A) with one linear layer at the end."""

    def __init__(self, classes: int, width: float = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for step in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"):
            if step == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            outputs = int(int(step) * width)
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class InvertedResidual(nn.Module):
    """Expand 1×1, depthwise 3×3, project 1×1 (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNet(nn.Module):
    """A small MobileNet v2 for 32×32 images; `width` multiplies the channels."""

    def __init__(self, classes: int, width: float = 1) -> None:
        super().__init__()
        channels = int(32 * width)
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(inplace=True)
        )
        blocks = []
        for base, repeats, stride in ((24, 2, 1), (32, 2, 2), (64, 3, 2), (96, 2, 1)):
            outputs = int(base * width)
            for i in range(repeats):
                blocks.append(InvertedResidual(channels, outputs, stride if i == 0 else 1, expand=4))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        last = int(256 * width)
        self.last = nn.Sequential(
            nn.Conv2d(channels, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6(inplace=True)
        )
        self.linear = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.last(self.blocks(self.stem(x))).mean(dim=(2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual sum."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A vision transformer for 32×32 images: 4×4 patches, six blocks, mean over tokens; `width` multiplies 192."""

    def __init__(self, classes: int, width: float = 1, depth: int = 6) -> None:
        super().__init__()
        heads = max(1, int(6 * width))
        dim = 32 * heads
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, dim))
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": ResNet20,
    "resnet20-layernorm": partial(ResNet20, norm=layer_norm),
    "vgg11": VGG11,
    "mobilenet": MobileNet,
    "vit": partial(SmallViT, depth=6),
}

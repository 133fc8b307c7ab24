"""Scenes drawn at random, and three networks that look at them: what is where, how far away it is, what is nearest.

A scene has two to four things (discs, squares, triangles, crosses) of any colour in front of a ground with a pattern,
each at a distance. What is farther away is smaller, hidden by what is nearer, and lies in more haze. All three networks
are U-Nets of one architecture: one class per pixel, one distance per pixel, one class per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from settings import Outputs, Setting
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 32
KINDS = 4
FAR = 4.0
"""The distance of the ground."""
STEPS, BATCH, WIDTH = 400, 32, 12


@dataclass(frozen=True, eq=False)
class Scenes:
    """Scenes and what they show.

    Attributes:
        images: float [n, 3, s, s].
        kinds: of thing in each pixel, 0 is the ground [n, s, s].
        distances: of each pixel [n, s, s].
        nearest: the kind of the nearest thing [n].
    """

    images: Tensor
    kinds: Tensor
    distances: Tensor
    nearest: Tensor


def draw_scenes(count: int, seed: int) -> Scenes:
    """Scenes, always the same for a seed."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    waves = torch.sin(uniform(0.2, 0.8, 1, 1, 1) * x + uniform(0.2, 0.8, 1, 1, 1) * y + uniform(0, 6, 1, 1, 1))
    images = uniform(0.2, 0.8, 3, 1, 1) + 0.15 * waves
    kinds = torch.zeros(count, SIZE, SIZE, dtype=torch.int64)
    distances = torch.full((count, SIZE, SIZE), FAR)
    things = torch.randint(2, 5, (count,), generator=generator)
    nearest, least = torch.zeros(count, dtype=torch.int64), torch.full((count,), FAR)
    for number in range(4):
        kind = torch.randint(KINDS, (count,), generator=generator)
        distance = uniform(1.0, 3.0)
        across, down = uniform(4, SIZE - 4, 1, 1), uniform(4, SIZE - 4, 1, 1)
        radius = (9 / distance)[:, None, None]
        seen = _inside(kind[:, None, None], y - down, x - across, radius)
        seen &= (number < things)[:, None, None] & (distance[:, None, None] < distances)
        images = torch.where(seen[:, None], uniform(0.0, 1.0, 3, 1, 1), images)
        kinds = torch.where(seen, kind[:, None, None] + 1, kinds)
        distances = torch.where(seen, distance[:, None, None], distances)
        closer = seen.flatten(1).any(1) & (distance < least)
        nearest, least = torch.where(closer, kind, nearest), torch.where(closer, distance, least)
    haze = torch.exp(-0.35 * (distances - 1))[:, None]
    images = haze * images + (1 - haze) * 0.7 + uniform(-0.05, 0.05, 3, SIZE, SIZE)
    return Scenes((images - 0.5) / 0.25, kinds, distances, nearest)


def _inside(kind: Tensor, y: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    square = (x.abs() <= radius) & (y.abs() <= radius)
    shapes = [
        x.square() + y.square() <= radius.square(),
        square,
        square & (2 * x.abs() <= y + radius),
        square & ((x.abs() <= radius / 3) | (y.abs() <= radius / 3)),
    ]
    inside = torch.zeros_like(square)
    for number, shape in enumerate(shapes):
        inside |= shape & (kind == number)
    return inside


class Block(nn.Module):
    """Two 3×3 convolutions with BatchNorm and ReLU."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class UNet(nn.Module):
    """Images [B, 3, s, s] → `outputs` numbers for each pixel [B, outputs, s, s], or for each image [B, outputs]."""

    def __init__(self, outputs: int, whole: bool, width: int = WIDTH) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = Block(3, width), Block(width, 2 * width), Block(2 * width, 4 * width)
        self.up2, self.up1 = Block(6 * width, 2 * width), Block(3 * width, width)
        self.head = nn.Linear(width, outputs) if whole else nn.Conv2d(width, outputs, 1)
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.down3(F.max_pool2d(middle, 2))
        middle = self.up2(torch.cat([F.interpolate(coarse, scale_factor=2.0), middle], 1))
        fine = self.up1(torch.cat([F.interpolate(middle, scale_factor=2.0), fine], 1))
        result: Tensor = self.head(fine.amax((2, 3)) if self.whole else fine)
        return result


def loss_of(task: str, output: Tensor, scenes: Scenes) -> Tensor:
    if task == "distance":
        return F.smooth_l1_loss(output[:, 0], scenes.distances)
    return F.cross_entropy(output, scenes.kinds if task == "kinds" else scenes.nearest)


def trained_on_scenes(task: str, seed: int, steps: int = STEPS) -> nn.Module:
    """A U-Net for one of the three tasks, from its own initial weights."""
    shapes = {"kinds": (KINDS + 1, False), "distance": (1, False), "nearest": (KINDS, True)}
    with torch.random.fork_rng():
        torch.manual_seed(100 * seed + list(shapes).index(task))
        network = UNet(*shapes[task])
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
        for step in range(steps):
            scenes = draw_scenes(BATCH, 1_000_000 * (seed + 1) + step)
            optimizer.zero_grad()
            loss_of(task, network(scenes.images), scenes).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def scenes(seed: int = 0, images: int = 400, tests: int = 500, steps: int = STEPS) -> Setting:
    """Three networks on the same scenes.

    Figures, in per cent: mean IoU of the kinds, mean error of the distance relative to the true one, how often the
    nearest kind is found.
    """
    models = {task: trained_on_scenes(task, seed, steps) for task in ("kinds", "distance", "nearest")}
    fitted, truth = draw_scenes(images, 2 * seed + 1), draw_scenes(tests, 2 * seed + 2)

    def score(outputs: Outputs) -> dict[str, float]:
        kinds, distances, nearest = outputs
        found = kinds.argmax(1)
        overlaps = []
        for kind in range(KINDS + 1):
            a, b = found == kind, truth.kinds == kind
            overlaps.append(float((a & b).sum() / (a | b).sum().clamp_min(1)))
        off = ((distances[:, 0] - truth.distances).abs() / truth.distances).mean()
        return {
            "mean IoU, %": 100 * sum(overlaps) / len(overlaps),
            "error of distance, %": 100 * float(off),
            "nearest found, %": 100 * float((nearest.argmax(1) == truth.nearest).float().mean()),
        }

    return Setting(models, fitted.images[:16], fitted.images.split(50), truth.images.split(50), score)

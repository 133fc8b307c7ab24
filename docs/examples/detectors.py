"""Two detectors of torchvision for different classes as one: a shared backbone and neck, one list of labels, one NMS.

    python docs/examples/detectors.py

In your own work the detectors, and images without boxes, are what you have already. Here two small FCOS are trained on
drawn shapes for a minute each: one finds discs and squares, the other triangles and crosses.
"""

import argparse
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import fxzip

SIZE = 64
STRIDES = (4, 8, 16, 32)
"""Pixels between neighbours of each level of the pyramid."""
TASKS = {"round": ("disc", "square"), "pointed": ("triangle", "cross")}
LABELS = tuple(label for labels in TASKS.values() for label in labels)
"""The one list: what the zipped detector finds. A class that several detectors know is in it once."""


def detector(classes: int) -> FCOS:
    """A small FCOS: three stages of a ResNet, a pyramid of four levels, heads of two convolutions."""
    body = ResNet(BasicBlock, [1, 1, 1, 1])
    layers = {"layer1": "0", "layer2": "1", "layer3": "2"}
    backbone = BackboneWithFPN(body, layers, [64, 128, 256], 64, LastLevelMaxPool())
    anchors = AnchorGenerator(tuple((stride // 2,) for stride in STRIDES), ((1.0,),) * len(STRIDES))
    head = FCOSHead(64, 1, classes, num_convs=2)
    return FCOS(
        backbone, classes, anchor_generator=anchors, head=head, min_size=SIZE, max_size=SIZE, score_thresh=0.05,
        center_sampling_radius=3.0,
    )  # fmt: skip


# --- The zip ----------------------------------------------------------------------------------------------------------


class Raw(nn.Module):
    """What a detector computes from images of one size [B, 3, H, W], before it chooses among its boxes."""

    def __init__(self, detector: FCOS) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(images).values()))


class Joined(nn.Module):
    """A zip of `Raw` detectors as one detector: images in [0, 1], [B, 3, H, W] → boxes, scores, labels of each image.

    Args:
        zipped: heads by the names of the tasks.
        like: a detector whose anchors, thresholds and number of boxes hold for all.
        labels: the one list.
        tasks: the labels of each head, in its order.
    """

    def __init__(
        self, zipped: nn.Module, like: FCOS, labels: Sequence[str], tasks: Mapping[str, Sequence[str]]
    ) -> None:
        super().__init__()
        self.zipped, self.labels = zipped, labels
        self.places = {task: [labels.index(label) for label in own] for task, own in tasks.items()}
        self.anchors, self.transform, self.choose = like.anchor_generator, like.transform, like.postprocess_detections

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        images = torch.stack([self.transform.normalize(image) for image in images])
        outputs = self.zipped(images)
        levels = [tuple(math.ceil(size / stride) for size in images.shape[-2:]) for stride in STRIDES]
        counts = [height * width for height, width in levels]
        shapes = [(images.shape[-2], images.shape[-1])] * len(images)
        grids = [images.new_zeros(1, 1, *level) for level in levels]
        anchors = self.anchors(ImageList(images, shapes), grids)

        found: dict[str, list[Tensor]] = {"cls_logits": [], "bbox_regression": [], "bbox_ctrness": []}
        for task, places in self.places.items():
            own = outputs[task]
            # In the one list: classes that a head does not know have no chance at its places.
            logits = own["cls_logits"].new_full((*own["cls_logits"].shape[:2], len(self.labels)), -torch.inf)
            logits[..., places] = own["cls_logits"]
            found["cls_logits"] += logits.split(counts, 1)
            found["bbox_regression"] += own["bbox_regression"].split(counts, 1)
            found["bbox_ctrness"] += own["bbox_ctrness"].split(counts, 1)
        # The heads' levels one behind another: torchvision chooses among all of them, by one NMS per class.
        return self.choose(found, [list(one.split(counts)) * len(self.places) for one in anchors], shapes)


def zip_detectors(detectors: Mapping[str, FCOS], images: Tensor, until: str | None = "backbone") -> fxzip.ZippedModule:
    """The detectors' networks with one backbone and neck, fitted to unlabelled images in [0, 1], [n, 3, H, W]."""
    transform = next(iter(detectors.values())).transform
    data = torch.stack([transform.normalize(image) for image in images]).split(25)
    raw = {task: Raw(one).eval() for task, one in detectors.items()}
    return fxzip.compile_zip(raw, data[0][:4], data=data, until=until, progress=False)


# --- Shapes to find ---------------------------------------------------------------------------------------------------


def draw(count: int, labels: Sequence[str], seed: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images in [0, 1] with one to three shapes of any kind, and boxes of those in `labels`, numbered in that order."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images, targets = [], []
    for _ in range(count):
        image = 0.3 * torch.rand(3, 1, 1, generator=generator) + 0.1 * torch.rand(3, SIZE, SIZE, generator=generator)
        boxes, numbers = [], []
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            radius = int(torch.randint(7, 14, (), generator=generator))
            x, y = torch.randint(radius + 1, SIZE - radius - 1, (2,), generator=generator).tolist()
            label = LABELS[int(torch.randint(len(LABELS), (), generator=generator))]
            box = [x - radius, y - radius, x + radius, y + radius]
            if boxes and bool((box_iou(torch.tensor([box]).float(), torch.tensor(boxes).float()) > 0).any()):
                continue
            inside = _inside(label, rows - y, columns - x, radius)
            image = torch.where(inside, 0.4 + 0.6 * torch.rand(3, 1, 1, generator=generator), image)
            boxes.append(box)
            numbers.append(labels.index(label) if label in labels else -1)
        images.append(image)
        known = torch.tensor(numbers) >= 0
        targets.append({"boxes": torch.tensor(boxes).float()[known], "labels": torch.tensor(numbers)[known]})
    return torch.stack(images), targets


def _inside(label: str, y: Tensor, x: Tensor, radius: int) -> Tensor:
    square = (x.abs() <= radius) & (y.abs() <= radius)
    if label == "disc":
        return x.square() + y.square() <= radius**2
    if label == "square":
        return square
    if label == "triangle":
        return square & (2 * x.abs() <= y + radius)
    return square & ((x.abs() <= radius / 3) | (y.abs() <= radius / 3))


def trained(labels: Sequence[str], steps: int, seed: int) -> FCOS:
    """A detector of some shapes."""
    torch.manual_seed(seed)
    network = detector(len(labels))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        images, targets = draw(8, labels, seed=10_000 * seed + step)
        loss = sum(network(list(images), targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def average_precision(
    found: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]], label: int
) -> float:
    """Area under precision over recall of one class, per cent; boxes are right from an IoU of 0.5 on."""
    scores, right = [], []
    for one, truth in zip(found, targets, strict=True):
        mine, wanted = one["labels"] == label, truth["boxes"][truth["labels"] == label]
        free = torch.ones(len(wanted), dtype=torch.bool)
        for box, score in zip(one["boxes"][mine], one["scores"][mine], strict=True):  # the best first
            overlaps = box_iou(box[None], wanted)[0] * free
            hit = len(wanted) > 0 and bool(overlaps.max() >= 0.5)
            if hit:
                free[overlaps.argmax()] = False
            scores.append(float(score))
            right.append(hit)
    total = sum(int((truth["labels"] == label).sum()) for truth in targets)
    if not scores or not total:
        return 0.0
    hits = torch.tensor(right)[torch.tensor(scores).argsort(descending=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float(100 * (precision * hits).sum() / total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of training each detector")
    parser.add_argument("--images", type=int, default=300, help="without labels, to fit the zip to")
    settings = parser.parse_args()

    detectors = {task: trained(own, settings.steps, seed) for seed, (task, own) in enumerate(TASKS.items(), 1)}
    images, _ = draw(settings.images, LABELS, seed=1)
    zips = {}
    for name, until in {"backbone and neck": "backbone", "heads' convolutions too": None}.items():
        zips[name] = zip_detectors(detectors, images, until)
        print(f"{name}: {zips[name].report.headline}")

    tests, targets = draw(100, LABELS, seed=2)
    like = detectors["round"]
    apart = fxzip.side_by_side([Raw(one).eval() for one in detectors.values()], tests[:4])
    for name, network in {"apart": _Named(apart), **zips}.items():
        joined = Joined(network, like, LABELS, TASKS).eval()
        with torch.no_grad():
            found = [box for part in tests.split(25) for box in joined(part)]
        print(
            name, *(f"{label} {average_precision(found, targets, k):.1f}" for k, label in enumerate(LABELS)), sep="  "
        )


class _Named(nn.Module):
    """Outputs by the names of the tasks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, dict[str, Tensor]]:
        return dict(zip(TASKS, self.network(images), strict=True))


if __name__ == "__main__":
    main()

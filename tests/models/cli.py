"""Networks and batches that recipes of the tests name."""

import torch
from torch import nn


def small(classes=3, width=8):
    """A small convolutional classifier of images [3, 8, 8]."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
    ).eval()  # fmt: skip


def table(classes=3):
    """A classifier of rows of six numbers."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes)).eval()


class Tokens(nn.Module):
    """A classifier of token ids with a mask."""

    def __init__(self, classes=3):
        super().__init__()
        self.embedding, self.linear, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, input_ids, attention_mask):
        h = self.embedding(input_ids) * attention_mask[..., None]
        return self.head(torch.relu(self.linear(h)).mean(1))


def batches(count=4, labelled=False):
    """Batches of rows of six numbers, drawn anew, the same each time."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        rows = torch.randn(32, 6, generator=generator)
        yield (rows, rows.argmax(1) % 3) if labelled else rows


def failing():
    """A function that raises."""
    raise RuntimeError("no disk")


NUMBER = 3

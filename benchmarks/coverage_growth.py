"""Does the analysis take time linear in the number of nodes? One architecture, deeper and deeper, nothing else changes.

    python benchmarks/coverage_growth.py                  # writes results/coverage/growth.json, which the page reads

Across the zoo widths, resolutions and kinds of calls change together with the number of nodes; here they do not.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from coverage import moved_off
from torch import Tensor, nn

import fxzip
from fxzip.tracing import quiet_execution

DEPTHS = (2, 4, 8, 16, 32, 64, 128)


class Residual(nn.Module):
    """Two convolutions with BatchNorm and a skip: 7 nodes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.last = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.last(self.second(torch.relu(self.norm(self.first(x))))))


class Attention(nn.Module):
    """A transformer block with packed heads, written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed(self.before(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


FAMILIES: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor]]] = {
    "residual convolutions": (
        lambda depth: nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            *(Residual(32) for _ in range(depth)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        ),
        lambda: torch.randn(2, 3, 8, 8),
    ),
    "attention": (
        lambda depth: nn.Sequential(nn.Linear(8, 32), *(Attention(32, 4) for _ in range(depth)), nn.Linear(32, 10)),
        lambda: torch.randn(2, 9, 8),
    ),
}


def measure(family: str, depth: int) -> dict[str, Any]:
    """Nodes, labels and seconds of the analysis beyond a forward pass, the fastest of three."""
    make, sample = FAMILIES[family]
    model = make(depth)
    moved_off(model)
    program = fxzip.tracing.trace(model, sample())
    found = []
    for _ in range(3):
        gc.collect()
        with quiet_execution():
            clock = time.process_time()
            program.module(*program.call.args)
            forward = time.process_time() - clock
        clock = time.process_time()
        labelling = fxzip.analysis.label(program, fxzip.RULES)
        fxzip.analysis.solve(labelling)
        found.append(time.process_time() - clock - forward)
    nodes = len(program.module.graph.nodes)
    return {"family": family, "depth": depth, "nodes": nodes, "labels": labelling.size, "seconds": min(found)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results/coverage/growth.json"))
    settings = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for family in FAMILIES:
        for depth in DEPTHS:
            rows.append(measure(family, depth))
            print("{family:24} {depth:4} blocks {nodes:5} nodes {seconds:.3f} s".format(**rows[-1]), flush=True)
    settings.results.parent.mkdir(parents=True, exist_ok=True)
    settings.results.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

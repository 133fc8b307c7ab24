"""Pairs of trained networks whose ends or idioms leave little to match, each beside the same pair without that oddity.

One logit, a one-channel mask, `x - net(x)`, gates over the order of channels (ECA), message passing (GCN) and text
convolutions over the whole embedding (TextCNN) must lose no more by zipping than their plain counterparts. Run:

    python benchmarks/own_heads.py            # all pairs, about two minutes on one core
    python benchmarks/own_heads.py eca gcn

Prints per pair and variant the scores of the originals and of the zip's heads on fresh inputs, and whether the heads
are distinct. Scores are accuracies, or for masks and regressors the share of variance explained, in percent.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip

Rule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """A task each for two networks of one architecture, with the oddity or without.

    Attributes:
        build: the network, by whether it has the oddity.
        inputs: so many random inputs.
        rules: the targets of the two tasks.
        loss: of outputs and targets.
        score: of outputs and targets, in percent.
    """

    build: Callable[[bool], nn.Module]
    inputs: Callable[[int], Tensor]
    rules: tuple[Rule, Rule]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    steps: int = 400


def _class_loss(output: Tensor, target: Tensor) -> Tensor:
    if output.shape[-1] == 1:
        return F.binary_cross_entropy_with_logits(output[..., 0], target.float())
    return F.cross_entropy(output, target.long())


def _accuracy(output: Tensor, target: Tensor) -> float:
    found = output[..., 0] > 0 if output.shape[-1] == 1 else output.argmax(-1) == 1
    return 100 * float((found == target.bool()).float().mean())


def _explained(output: Tensor, target: Tensor) -> float:
    return 100 * (1 - float((output - target).square().mean() / target.var()))


class Perceptron(nn.Sequential):
    def __init__(self, odd: bool) -> None:
        super().__init__(
            nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1 if odd else 2)
        )  # fmt: skip


class UNet(nn.Module):
    """One level down and up; a mask of one channel, or of two of which the difference counts."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.down, self.low = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.up, self.join = nn.ConvTranspose2d(24, 16, 2, stride=2), nn.Conv2d(32, 16, 3, padding=1)
        self.mask = nn.Conv2d(16, 1 if odd else 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = torch.relu(self.down(x))
        low = torch.relu(self.low(F.max_pool2d(high, 2)))
        return self.mask(torch.relu(self.join(torch.cat([high, torch.relu(self.up(low))], 1))))


def _mask_value(output: Tensor) -> Tensor:
    return output[:, 0] if output.shape[1] == 1 else output[:, 0] - output[:, 1]


class Regressor(nn.Module):
    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.odd, self.net = (
            odd,
            nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x - self.net(x) if self.odd else self.net(x)


class Channels(nn.Module):
    """Two convolutions, each with a gate computed from neighbouring channels (ECA, arXiv 1910.03151), or without."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.gates = nn.ModuleList(nn.Conv1d(1, 1, 3, padding=1) for _ in range(2))
        self.head, self.odd = nn.Linear(24, 2), odd

    def gate(self, x: Tensor, kernel: nn.Module) -> Tensor:
        if not self.odd:
            return x
        weights = torch.sigmoid(kernel(x.mean((2, 3)).unsqueeze(1)))
        return x * weights.transpose(1, 2).unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(torch.relu(self.first(x)), self.gates[0])
        return self.head(self.gate(torch.relu(self.second(x)), self.gates[1]).mean((2, 3)))


class Graph(nn.Module):
    """Two graph convolutions on a ring with chords, by messages that are added up, or as a plain matrix product."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        ring = torch.arange(12)
        edges = torch.cat([torch.stack([ring, (ring + step) % 12]) for step in (1, 11, 5, 7)], 1)
        adjacency = torch.zeros(12, 12).index_put_((edges[1], edges[0]), torch.tensor(0.25))
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("adjacency", adjacency, persistent=False)
        self.first, self.second, self.head, self.odd = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 2), odd

    def spread(self, x: Tensor) -> Tensor:
        if not self.odd:
            return self.adjacency @ x
        source, target = self.edges
        return torch.zeros_like(x).index_add(1, target, x[:, source] * 0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x + self.spread(x)))
        x = torch.relu(self.second(x + self.spread(x)))
        return self.head(x.mean(1))


class Text(nn.Module):
    """Convolutions over words: with a kernel that spans the whole embedding as an axis (TextCNN), or as channels."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.words, self.odd = nn.Embedding(20, 16), odd
        self.wide, self.plain = nn.Conv2d(1, 32, (3, 16)), nn.Conv1d(16, 32, 3)
        self.hidden, self.head = nn.Linear(32, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        x = self.wide(x.unsqueeze(1)).squeeze(3) if self.odd else self.plain(x.transpose(1, 2))
        return self.head(torch.relu(self.hidden(torch.relu(x).amax(2))))


def _image_loss(output: Tensor, target: Tensor) -> Tensor:
    return (_mask_value(output) - target).square().mean()


PAIRS: dict[str, Pair] = {
    "one logit": Pair(
        Perceptron, lambda n: torch.randn(n, 8),
        (lambda x: x[:, 0] * x[:, 1] > 0, lambda x: x[:, 2] + x[:, 3] > 0), _class_loss, _accuracy, 800,
    ),
    "unet": Pair(
        UNet, lambda n: torch.randn(n, 3, 8, 8),
        (lambda x: (x[:, 0] * x[:, 1]), lambda x: F.avg_pool2d(x[:, 2:], 3, 1, 1)[:, 0]), _image_loss,
        lambda output, target: _explained(_mask_value(output), target), 600,
    ),
    "regressor": Pair(
        Regressor, lambda n: torch.randn(n, 8),
        (lambda x: torch.tanh(x) * x.roll(1, 1), lambda x: x - torch.sin(2 * x)),
        lambda output, target: (output - target).square().mean(), _explained, 1500,
    ),
    "eca": Pair(
        Channels, lambda n: torch.randn(n, 3, 8, 8),
        (
            lambda x: (x[:, 0] * x[:, 1]).mean((1, 2)) > 0,
            lambda x: (x[:, 2, 1:] * x[:, 2, :-1]).mean((1, 2)) > 0,
        ),
        _class_loss, _accuracy,
    ),
    "gcn": Pair(
        Graph, lambda n: torch.randn(n, 12, 4),
        (
            lambda x: (x[..., 0] * x[..., 1]).mean(1) > 0,
            lambda x: (x[..., 2] * x[..., 2].roll(1, 1)).mean(1) > 0,
        ),
        _class_loss, _accuracy, 800,
    ),
    "text": Pair(
        Text, lambda n: torch.randint(20, (n, 9)),
        (
            lambda x: ((x[:, 1:] == 3) & (x[:, :-1] > 9)).any(1) | (x == 7).any(1),
            lambda x: (x < 4).sum(1) > 1,
        ),
        _class_loss, _accuracy, 800,
    ),
}  # fmt: skip


def trained(pair: Pair, task: int, odd: bool) -> nn.Module:
    """A network of the pair, trained on its task from a seed of its own."""
    torch.manual_seed(10 * task + odd)
    net = pair.build(odd)
    optimiser = torch.optim.Adam(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 8e-3, total_steps=pair.steps)
    for _ in range(pair.steps):
        x = pair.inputs(128)
        loss = pair.loss(net(x), pair.rules[task](x))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


def measure(pair: Pair, odd: bool, **options: Any) -> dict[str, Any]:
    """Scores of the originals and of the zip with default settings, from 512 unlabelled inputs, on 4,000 fresh ones."""
    nets = [trained(pair, task, odd) for task in (0, 1)]
    torch.manual_seed(99)
    data = list(pair.inputs(512).split(64))
    zipped = fxzip.compile_zip(*nets, data[0][:4], data=data, hold_out=False, progress=False, **options)
    x = pair.inputs(4000)
    with torch.no_grad():
        found = zipped(x)
        targets = [rule(x) for rule in pair.rules]
        return {
            "originals": [pair.score(net(x), target) for net, target in zip(nets, targets, strict=True)],
            "zipped": [pair.score(output, target) for output, target in zip(found, targets, strict=True)],
            "distinct": not torch.equal(*found),
            "cost": zipped.report["flops"]["total"] / zipped.report["flops"]["side_by_side"],
            "report": zipped.report,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", default=[], help=f"of {', '.join(PAIRS)}; all by default")
    chosen = parser.parse_args().pairs or list(PAIRS)
    print(f"{'pair':12}{'oddity':8}{'originals':>16}{'zipped':>16}{'lost':>14}{'FLOPs of both':>15}  heads distinct")
    for name in chosen:
        for odd in (False, True):
            row = measure(PAIRS[name], odd)
            pairs = zip(row["originals"], row["zipped"], strict=True)
            lost = " ".join(f"{before - after:6.1f}" for before, after in pairs)
            scores = [" ".join(f"{value:7.1f}" for value in row[what]) for what in ("originals", "zipped")]
            print(
                f"{name:12}{'yes' if odd else 'no':8}{scores[0]:>16}{scores[1]:>16}{lost:>14}{row['cost']:>15.2f}  "
                f"{'yes' if row['distinct'] else 'NO'}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()

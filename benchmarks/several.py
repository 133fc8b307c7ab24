"""One input, several outputs: 2, 4 and 8 networks, and three tasks of vision, at the cost of one network.

    python benchmarks/several.py digits      # 2, 4 and 8 questions about the same digit, a network for each
    python benchmarks/several.py scenes      # what is where, how far away it is, and which thing is nearest

Networks are trained here, each by itself from its own seed, for two minutes on one core at most. The rows are those of
`settings.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from settings import Outputs, Setting, format_table, measure
from several_scenes import scenes
from torch import Tensor, nn
from torch.nn import functional as F

import fxzip
from fxzip.tools.demo import Digits, SmallResNet, load_digits_split

QUESTIONS: dict[str, tuple[int, ...]] = {
    "which": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    "odd": (0, 1, 0, 1, 0, 1, 0, 1, 0, 1),
    "thirds": (0, 1, 2, 0, 1, 2, 0, 1, 2, 0),
    "prime": (0, 0, 1, 1, 0, 1, 0, 1, 0, 0),
    "fifths": (0, 1, 2, 3, 4, 0, 1, 2, 3, 4),
    "great": (0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
    "square": (1, 1, 0, 0, 1, 0, 0, 0, 0, 1),
    "letters": (1, 0, 0, 2, 1, 1, 0, 2, 2, 1),
}
"""The answer for each digit: itself, its remainder of 2, 3, 5, …; last, letters of its English name beyond three."""
NOISE = 0.5
EPOCHS, WIDTH = 6, 12


def digits(count: int, seed: int = 0) -> Setting:
    """`count` networks that answer a question each about the same digit, an image of 8×8 pixels with noise.

    The figures are the shares of right answers, mean over the questions and of the worst. Calibration: the training
    images, with other noise and without labels.
    """
    split = load_digits_split()
    generator = torch.Generator().manual_seed(seed)
    names = list(QUESTIONS)[:count]
    models = {name: trained_on_digits(name, seed) for name in names}
    fitted = _noisy(split.train_images, generator)
    tests = _noisy(split.test_images, generator)

    def score(outputs: Outputs) -> dict[str, float]:
        right = []
        for name, output in zip(names, outputs, strict=True):
            answers = torch.tensor(QUESTIONS[name])[split.test_labels]
            right.append(100 * float((output.argmax(1) == answers).float().mean()))
        return {"right, %": sum(right) / len(right), "worst, %": min(right)}

    return Setting(models, fitted[:32], fitted.split(100), tests.split(100), score)


@functools.cache
def trained_on_digits(question: str, seed: int) -> nn.Module:
    """A small residual network that answers one question; each question has its own initial weights."""
    split: Digits = load_digits_split()
    answers = torch.tensor(QUESTIONS[question])[split.train_labels]
    with torch.random.fork_rng():
        torch.manual_seed(100 * seed + list(QUESTIONS).index(question))
        network = SmallResNet(int(answers.max()) + 1, WIDTH)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
        steps = EPOCHS * -(-len(answers) // 32)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(answers)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(network(_noisy(split.train_images[rows])), answers[rows]).backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def _noisy(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return images + NOISE * torch.randn(images.shape, generator=generator)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("settings", nargs="*", help="of digits, scenes; both by default")
    add("--counts", nargs="+", type=int, default=[2, 4, 8], help="of networks that read digits")
    add("--rows", nargs="+", default=[], help="only these rows")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--json", type=Path, help="also write the rows to this file")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    settings = parser().parse_args(argv)
    torch.set_num_threads(settings.threads)
    warnings.simplefilter("ignore", fxzip.FxzipWarning)
    wanted = settings.settings or ["digits", "scenes"]
    found: dict[str, list[dict[str, Any]]] = {}
    tables = [(f"digits, {count} networks", functools.partial(digits, count)) for count in settings.counts]
    tables = tables * ("digits" in wanted) + [("scenes, 3 networks", scenes)] * ("scenes" in wanted)
    for title, make in tables:
        setting = make(seed=settings.seed)
        rows = measure(setting, settings.rows, lambda text, title=title: print(f"{title}: {text}", flush=True))
        print(
            f"\n{title}, batch {len(setting.sample)}, {settings.threads} threads\n\n{format_table(rows)}\n", flush=True
        )
        found[title] = [{**vars(row), "figures": dict(row.figures)} for row in rows]
        if settings.json:
            settings.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What heads gain that run together: the time of a zip with its heads apart and together, next to one of its networks.

    python benchmarks/batched_heads.py --markdown

Networks have random parameters, which the time does not depend on; nothing is fitted. All times of a row are from one
interleaved run, the least of each; on a CPU with one thread they are of the processor, so that other work on the
machine does not count. FLOPs are relative to one of the networks: K heads that cost their FLOPs take that time, too.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from cifar_networks import ResNet20, SmallViT
from torch import nn

import fxzip
from fxzip.compiler.timing import fastest
from fxzip.errors import FxzipWarning
from fxzip.tracing.calls import as_call


def mlp(classes: int, width: int = 128) -> nn.Module:
    """A network of five linear layers behind its input."""
    inner = [part for _ in range(3) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, width), nn.ReLU(), *inner, nn.Linear(width, classes)
    )


@dataclass(frozen=True)
class Setting:
    """Networks, and where their heads begin.

    Attributes:
        name: as the table has it.
        make: a network of so many classes.
        until: where the trunk ends.
        shape: of one input.
        cost: FLOPs that the zip may take relative to one network, with heads narrowed by need; None: all widths stay.
    """

    name: str
    make: Callable[[int], nn.Module]
    until: str
    shape: tuple[int, ...]
    cost: float | None = None


SETTINGS = (
    Setting("MLP, heads of 4 layers of 128", mlp, "0", (64,)),
    Setting(
        "ResNet-20 of 8 to 32 features, heads from layer 2 on", partial(ResNet20, width=0.5), "layer1", (3, 32, 32)
    ),
    Setting("the same, narrowed by need to 1.5", partial(ResNet20, width=0.5), "layer1", (3, 32, 32), cost=1.5),
    Setting("ResNet-20 of 16 to 64 features, heads from layer 3 on", partial(ResNet20, width=1), "layer2", (3, 32, 32)),
    Setting(
        "transformer of 64 features, heads of 4 of 6 blocks", partial(SmallViT, width=1 / 3), "blocks.1", (3, 32, 32)
    ),
)


@dataclass(frozen=True)
class Row:
    """Times relative to one of the networks; `calls`: how many calls heads make together."""

    name: str
    heads: int
    batch: int
    flops: float
    apart: float
    together: float
    calls: int


def least(networks: Sequence[nn.Module], x: torch.Tensor, seconds: float) -> list[float]:
    """The least time of each network, in seconds, in rounds through all of them."""
    if x.device.type != "cpu" or torch.get_num_threads() > 1:
        return fastest(networks, as_call(x), seconds=seconds)
    taken: list[list[float]] = [[] for _ in networks]
    end = time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < end or len(taken[0]) < 10:
            for network, own in zip(networks, taken, strict=True):
                start = time.process_time()
                network(x)
                own.append(time.process_time() - start)
    return [min(own) for own in taken]


def zipped(setting: Setting, models: Sequence[nn.Module], device: str) -> fxzip.ZippedModule:
    """The networks in one, heads apart. Heads are narrowed on noise: to what widths does not matter here."""
    data = [torch.randn(32, *setting.shape, device=device) for _ in range(3)]
    if setting.cost is None:
        return fxzip.compile_zip(
            models, data[0], until=setting.until, method="zip", refit=None, hold_out=False, verify=False, progress=False
        )
    return fxzip.compile_zip(
        models, data[0], data=data, until=setting.until, width="auto", max_cost=setting.cost, budget="flops",
        hold_out=False, verify=False, progress=False,
    )  # fmt: skip


def measured(setting: Setting, heads: int, batches: Sequence[int], seconds: float, device: str) -> Iterator[Row]:
    """A row for each batch size: everything that can be one call is."""
    models = [setting.make(10).eval().to(device) for _ in range(heads)]
    apart = zipped(setting, models, device)
    together = fxzip.batch_heads(apart, timed=False)
    calls = len(together.report["batched"]["calls"])
    for batch in batches:
        x = torch.randn(batch, *setting.shape, device=device)
        one, *both = least([models[0], apart, together], x, seconds)
        yield Row(setting.name, heads, batch, apart.report.cost, *(own / one for own in both), calls)


def table(rows: Sequence[Row], markdown: bool) -> str:
    """As text, or as Markdown."""
    head = ("heads", "K", "batch", "FLOPs", "time apart", "time together", "together / apart")
    cells = [
        (row.name, str(row.heads), str(row.batch), f"{row.flops:.2f}", f"{row.apart:.2f}", f"{row.together:.2f}",
         f"{row.together / row.apart:.2f}")
        for row in rows
    ]  # fmt: skip
    if markdown:
        return "\n".join(f"| {' | '.join(own)} |" for own in (head, ("---",) * len(head), *cells))
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(own, widths, strict=True)) for own in (head, *cells))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--heads", type=int, nargs="+", default=[2, 4, 8])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--seconds", type=float, default=2.0, help="about how long each row is measured")
    options.add_argument("--device", default="cpu")
    options.add_argument("--markdown", action="store_true")
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore", FxzipWarning)
    rows = []
    for setting in SETTINGS:
        for heads in given.heads:
            for row in measured(setting, heads, given.batches, given.seconds, given.device):
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    print(table(rows, given.markdown))


if __name__ == "__main__":
    main()

"""How the time of a compile grows: with processes, images, nodes, models and width.

    python benchmarks/scaling.py --axes images nodes models width
    python benchmarks/scaling.py --axes processes --images 2000
    python benchmarks/scaling.py --axes forward --images 1000
    python benchmarks/scaling.py --axes forward --images 128 --network resnet50

`forward` compares the default compile of the CIFAR-10 pair, or of two ResNet-50 with random weights and images of
224×224, with the forward passes of both networks on their images, and says how much memory the process took at most.
`processes` compiles the CIFAR-10 pair (see `cifar.py`) in one process of one thread, and in two of one thread each that
have half of the images each, and compares weights. The other axes compile random residual networks of one size after
another and fit the exponent of seconds = a · size^b. Seconds are CPU seconds of one thread, which other work on the
machine disturbs less than it does the clock; of several processes those of the slowest. Both are printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {
    "images": (256, 512, 1024, 2048),
    "nodes": (8, 16, 32, 64),
    "models": (2, 3, 4, 6, 8),
    "width": (32, 64, 128, 256),
}
TARGETS = {"images": 1.05, "nodes": 1.1, "models": 1.2, "width": 2.2}


class Chain(nn.Module):
    """Residual blocks of two convolutions with BatchNorm."""

    def __init__(self, blocks: int, width: int, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(*self._block(width)) for _ in range(blocks))
        self.head = nn.Linear(width, classes)

    @staticmethod
    def _block(width: int) -> list[nn.Module]:
        convs = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)]
        return [convs[0], nn.BatchNorm2d(width), nn.ReLU(), convs[1], nn.BatchNorm2d(width)]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def seconds_of(images: int = 256, nodes: int = 8, models: int = 2, width: int = 32, side: int = 8) -> float:
    """CPU seconds of one compile with least squares. `nodes`: convolutions of each model."""
    import fxzip

    torch.manual_seed(0)
    networks = [Chain(max(nodes // 2, 1), width).eval() for _ in range(models)]
    data = list(torch.randn(images, 3, side, side).split(64))
    start = time.process_time()
    fxzip.compile_zip(networks, data[0][:2], data=data, refit="lstsq", hold_out=False, progress=False)
    return time.process_time() - start


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """b of seconds = a · size^b, by least squares on logarithms.

    >>> round(exponent([1, 2, 4], [3, 6, 12]), 6)
    1.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(own) for own in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def grow(axis: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Seconds at each size of one axis, and the exponent."""
    seconds_of(images=64)  # what is done once in a process does not count
    seconds = []
    for size in sizes:
        seconds.append(seconds_of(**{axis: size}))
        print(f"{axis} {size}: {seconds[-1]:.1f} s", flush=True)
    return {"sizes": list(sizes), "seconds": seconds, "exponent": exponent(sizes, seconds), "target": TARGETS[axis]}


def load_pair(settings: argparse.Namespace) -> tuple[list[nn.Module], Tensor, list[Tensor]]:
    """The pair, a sample input, and its calibration images in batches."""
    from cifar import find_models
    from cifar import parser as cifar_parser
    from cifar_data import draw_calibration, holdout_split, load_cifar, mixed_batches

    own = cifar_parser().parse_args(["--data", settings.data, "--checkpoints", settings.checkpoints])
    models = find_models(own)
    calibration, _ = holdout_split(load_cifar(own.data, own.cache).train)
    drawn = draw_calibration(calibration, [model.classes for model in models], settings.images, 0)
    return [model.network for model in models], drawn[0][:2], list(mixed_batches(drawn, own.batch_size, 0))


def random_pair(images: int) -> tuple[list[nn.Module], Tensor, list[Tensor]]:
    """Two ResNet-50, a sample input, and random images in batches of 16."""
    from test_bench_pipeline import build

    data = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(0)).split(16)
    return [build("resnet50", seed, "cpu") for seed in (0, 1)], data[0], list(data)


def compile_pair(settings: argparse.Namespace, rank: int = 0, world: int = 1) -> tuple[dict[str, float], Any]:
    """The pair on this rank's part of the images: seconds, and the network."""
    import fxzip

    networks, sample, batches = load_pair(settings)
    part = len(batches) // world
    mine = batches[rank * part : (rank + 1) * part if rank + 1 < world else len(batches)]
    if world > 1:
        torch.distributed.barrier()
    clock, start = time.perf_counter(), time.process_time()
    zipped = fxzip.compile_zip(networks, sample, data=mine, hold_out=False, progress=False)
    return {"wall": time.perf_counter() - clock, "cpu": time.process_time() - start}, zipped


def compare_forward(settings: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of the default compile of a pair, and of the forward passes of both networks before and after."""
    import fxzip

    networks, sample, batches = random_pair(settings.images) if settings.network == "resnet50" else load_pair(settings)

    @torch.no_grad()
    def passes() -> float:
        start = time.process_time()
        for batch in batches:
            for network in networks:
                network(batch)
        return time.process_time() - start

    passes()  # what is done once in a process does not count
    before, start = passes(), time.process_time()
    fxzip.compile_zip(networks, sample, data=batches, progress=False)
    seconds, forward = time.process_time() - start, (before + passes()) / 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts it in KiB
    found = {"images": settings.images, "compile": seconds, "forward": forward, "ratio": seconds / forward}
    return {**found, "peak memory of the process, GiB": peak}


def work(settings: argparse.Namespace) -> None:
    """One process of `processes`: writes its seconds and its weights."""
    torch.set_num_threads(1)
    rank, world = settings.rank, settings.world
    if world > 1:
        address = f"tcp://localhost:{settings.port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    seconds, zipped = compile_pair(settings, rank, world)
    torch.save({"seconds": seconds, "weights": zipped.state_dict()}, settings.out / f"{world}_{rank}.pt")


def compare_processes(settings: argparse.Namespace) -> dict[str, Any]:
    """One process against two."""
    found: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in (1, 2):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            command = [sys.executable, __file__, "--axes", "worker", "--images", str(settings.images), "--out", folder,
                       "--data", settings.data, "--checkpoints", settings.checkpoints, "--port", str(port),
                       "--world", str(world)]  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            ranks = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(world)]
            if any(process.wait() for process in ranks):
                raise RuntimeError(f"A process of {world} failed; see its output above.")
            found[world] = [torch.load(Path(folder) / f"{world}_{rank}.pt") for rank in range(world)]

    one, (first, second) = found[1][0], found[2]
    difference = max(
        float(
            (value.double() - first["weights"][name].double()).abs().max() / value.double().abs().max().clamp(min=1e-9)
        )
        for name, value in one["weights"].items()
    )
    slowest = {kind: max(first["seconds"][kind], second["seconds"][kind]) for kind in ("wall", "cpu")}
    return {
        "images": settings.images,
        "one": one["seconds"],
        "two": slowest,
        "speed-up": {kind: one["seconds"][kind] / slowest[kind] for kind in slowest},
        "target": 1.7,
        "largest relative difference of weights": difference,
        "equal on both ranks": all(torch.equal(v, second["weights"][k]) for k, v in first["weights"].items()),
    }


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--axes", nargs="+", default=["processes", *SIZES], choices=["processes", "forward", "worker", *SIZES])
    add("--images", type=int, default=2000, help="of the pair, for `processes` and `forward`")
    add("--data", default=os.environ.get("FXZIP_DATA", "../shared/data"), help="as in cifar.py")
    add("--checkpoints", default=os.environ.get("FXZIP_CHECKPOINTS", "../shared/checkpoints"), help="as in cifar.py")
    add("--network", default="resnet20x2", choices=["resnet20x2", "resnet50"], help="of the pair, for `forward`")
    add("--largest", type=int, help="leave out sizes beyond this one")
    add("--json", type=Path, help="also write what was measured to this file")
    for name in ("rank", "world", "port"):
        add(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    add("--out", type=Path, help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    settings = parser().parse_args(argv)
    if settings.axes == ["worker"]:
        work(settings)
        return
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, 1 thread; load {os.getloadavg()[0]:.1f} at the start")
    found: dict[str, Any] = {}
    for axis in settings.axes:
        if axis == "processes":
            found[axis] = compare_processes(settings)
            print(json.dumps(found[axis], indent=2), flush=True)
            continue
        if axis == "forward":
            found[axis] = compare_forward(settings)
            print(json.dumps(found[axis], indent=2), flush=True)
            continue
        sizes = [size for size in SIZES[axis] if settings.largest is None or size <= settings.largest]
        found[axis] = grow(axis, sizes)
        print(f"{axis}: exponent {found[axis]['exponent']:.2f}, at most {TARGETS[axis]} wanted", flush=True)
    if settings.json:
        settings.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Several processes, each with a part of the data, give the network that one process gives with all of it."""

import datetime
import functools
import re
import socket
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import randomise
from torch import nn

import fxzip
from fxzip.calibration import processes

SECONDS = 60.0
QUICK = {"least": 300, "positions": 3}


class Net(nn.Module):
    """Convolutions with a shortcut, a normalisation and a linear head."""

    def __init__(self, classes):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.body, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


def nets():
    return randomise(Net(3), 1), randomise(Net(4), 2)


def data(count=8, rows=10):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(rows, 3, 8, 8, generator=generator) for _ in range(count)]


def compiled(batches, **options):
    return fxzip.compile_zip(*nets(), torch.ones(2, 3, 8, 8), data=batches, progress=False, **options)


def worker(rank, jobs, answers):
    """Does jobs, each in a group of its own."""
    torch.set_num_threads(1)
    for work, world, port, timeout in iter(jobs.get, None):
        try:
            dist.init_process_group(
                "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world,
                timeout=datetime.timedelta(seconds=timeout),
            )  # fmt: skip
            answers.put((rank, "result", work(rank, world)))
        except BaseException as error:
            answers.put((rank, type(error).__name__, f"{error}\n{traceback.format_exc()}"))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    """Runs a function in some processes: what each returns, or how it failed."""
    context = mp.get_context("spawn")
    answers, jobs = context.Queue(), [context.Queue() for _ in range(4)]
    workers = [context.Process(target=worker, args=(rank, own, answers)) for rank, own in enumerate(jobs)]
    for process in workers:
        process.start()

    def run(work, world=2, *, timeout=SECONDS):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for own in jobs[:world]:
            own.put((work, world, port, timeout))
        found = {rank: rest for rank, *rest in (answers.get(timeout=2 * SECONDS) for _ in range(world))}
        return [tuple(found[rank]) for rank in range(world)]

    yield run
    for own in jobs:
        own.put(None)
    for process in workers:
        process.join(5)
        process.kill()


@pytest.fixture(scope="module")
def results(ranks):
    """The same where none is to fail."""

    def run(work, world=2):
        every = ranks(work, world)
        for kind, value in every:
            assert kind == "result", value
        return [value for _, value in every]

    return run


def mine(batches, rank, world):
    """Contiguous parts, of unequal lengths."""
    cut = [0, 3, 8] if world == 2 else [0, 1, 4, 6, 8]
    return batches[cut[rank] : cut[rank + 1]]


KINDS = {
    "lstsq": {"refit": fxzip.LeastSquares(least=600, positions=5)},
    "scarce": {"refit": fxzip.LeastSquares(least=40, positions=1)},
    "repair": {"refit": "repair"},
    "batchnorm": {"refit": "batchnorm"},
    "regmean": {"refit": "regmean"},
    "auto": {"until": "auto", "min_agreement": 0.2, "refit": "repair"},
}


EXACT = ("lstsq", "scarce")
"""What gives the weights of one process to the bit: all that is fitted amplifies rounding, from layer to layer."""


def several(rank, world, kinds=tuple(KINDS)):
    found = {}
    for kind in kinds:
        zipped = compiled(mine(data(), rank, world), **KINDS[kind])
        report = zipped.report
        found[kind] = {
            "weights": {name: value.numpy() for name, value in zipped.state_dict().items()},
            "latency": report["latency"]["zipped"],
            "agreement": report["agreement"],
        }
    return found


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.thinned(2)
def test_all_ranks_have_the_network_of_one_process(world, results):
    kinds = tuple(KINDS) if world == 2 else ("lstsq", "repair")
    first, *others = results(functools.partial(several, kinds=kinds), world)
    for kind in kinds:
        alone = compiled(data(), **KINDS[kind])
        for name, value in alone.state_dict().items():
            own = torch.from_numpy(first[kind]["weights"][name])
            torch.testing.assert_close(
                own, value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=f"{kind} {name}"
            )
            for other in others:
                assert torch.equal(own, torch.from_numpy(other[kind]["weights"][name]))
        for other in others:
            assert other[kind]["latency"] == first[kind]["latency"]
            assert other[kind]["agreement"] == first[kind]["agreement"]
        assert first[kind]["agreement"]["inputs"] == alone.report["agreement"]["inputs"]


def failing(rank, world):
    if rank == 1:
        return compiled(
            [torch.randn(4, 3, 8, 8), torch.full((4, 3, 8, 8), float("nan"))], refit="repair", hold_out=False
        )
    return compiled(data(), refit="repair", hold_out=False)


def empty(rank, world):
    return compiled([] if rank == 1 else data(), refit="repair")


def others(rank, world):
    models = [randomise(Net(3), 1 + rank), randomise(Net(4), 2)]
    return fxzip.compile_zip(*models, torch.ones(2, 3, 8, 8), data=data(), progress=False)


@pytest.mark.parametrize(("work", "kinds", "message"), [
    (failing, ("ProcessError", "DataError"), "rank 1: DataError: Features must be finite"),
    (empty, ("ProcessError", "DataError"), "rank 1: DataError: `data` must yield at least one batch"),
    (others, ("ProcessError", "ProcessError"), "those of rank 1 differ from those of rank 0"),
])  # fmt: skip
def test_what_fails_on_one_rank_is_named_on_all(work, kinds, message, ranks):
    found = ranks(work)
    assert tuple(kind for kind, _ in found) == kinds
    assert message in found[0][1]


def leaving(rank, world):
    if rank == 1:
        time.sleep(1)
        raise SystemExit("this rank is gone")
    with processes.together():
        return processes.total(torch.ones(3))


def sleeping(rank, world):
    if rank == 1:
        time.sleep(8)
        return None
    return processes.total(torch.ones(3))


def strange(rank, world):
    with processes.together():
        return processes.total(torch.ones(3 + rank))


@pytest.mark.parametrize(("work", "message"), [
    (leaving, "rank 0 lost the others"), (sleeping, "rank 0 lost the others"),
    (strange, r"rank 0 is at a sum of \(3,\), torch.float32, rank 1 is at a sum of \(4,\)"),
])  # fmt: skip
def test_nobody_waits_for_what_does_not_come(work, message, ranks):
    begin = time.monotonic()
    found = ranks(work, timeout=3)[0]
    assert found[0] == "ProcessError"
    assert re.search(message, found[1])
    assert time.monotonic() - begin < 50


def exchanged(rank, world):
    own = torch.arange(3.0) + 10 * rank
    with processes.together():
        made = []
        first = processes.of_first(lambda: made.append(rank) or rank + 7)
        with processes.apart():
            alone = processes.total(own)
        return {
            "sum": processes.total(own).tolist(), "long": float(processes.total(torch.ones(3 << 20)).sum()),
            "rows": processes.gathered(torch.full((rank + 1, 2), float(rank))).tolist(),
            "all": processes.everyone(rank), "first": first, "made": made, "alone": alone.tolist(),
            "before": processes.before([rank + 1, 5]), "whole": processes.total(torch.tensor(rank)).item(),
        }  # fmt: skip


def test_exchanges(results):
    first, second, third = results(exchanged, 3)
    assert first["sum"] == second["sum"] == third["sum"] == [30.0, 33.0, 36.0]
    assert first["long"] == 9 << 20
    assert second["rows"] == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    assert third["all"] == [0, 1, 2]
    assert (first["first"], second["first"]) == (7, 7)
    assert (first["made"], second["made"]) == ([0], [])
    assert second["alone"] == [10.0, 11.0, 12.0]
    assert third["before"] == ([3, 10], [6, 15])
    assert second["whole"] == 3


def test_without_a_group_nothing_happens():
    value = torch.ones(3)
    assert processes.count() == 1
    assert processes.total(value) is value
    assert processes.gathered(value) is value
    assert processes.everyone(3) == [3]
    with pytest.raises(ValueError, match="mine"), processes.together():
        raise ValueError("mine")


def sources(rank, world):
    """Of each model, what a rank has of its own data."""
    return [mine(own, rank, world) for own in (data(), data()[::-1])]


def per_model(rank, world):
    zipped = compiled(fxzip.PerModel(*sources(rank, world)), joint=True, refit=fxzip.LeastSquares(**QUICK))
    return {name: value.numpy() for name, value in zipped.state_dict().items()}


def test_a_source_for_each_model_and_joint_decisions(results):
    first, second = results(per_model)
    parts = [[*one, *two] for one, two in zip(sources(0, 2), sources(1, 2), strict=True)]
    alone = compiled(fxzip.PerModel(*parts), joint=True, refit=fxzip.LeastSquares(**QUICK))
    assert any("joint" in name for name in first) == any("joint" in name for name, _ in alone.named_buffers())
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(torch.from_numpy(first[name]), value, rtol=1e-4, atol=1e-5)
        assert (first[name] == second[name]).all()


def test_exact_sums_do_not_depend_on_the_order():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(40, 40, generator=generator, dtype=torch.float64) for _ in range(30)]
    found = []
    for order in (range(30), [0, *range(29, 0, -1)]):
        sums = processes.ExactSum(30)
        for number in order:
            sums.add(values[number].clone())
        found.append(sums.total())
    assert torch.equal(*found)
    plain = torch.stack(values).sum(0)
    assert not torch.equal(sum(values[1:], values[0]), sum(values[:0:-1], values[0]))
    torch.testing.assert_close(found[0], plain, rtol=0, atol=5e-12)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_exact_sums_of_what_has_no_size(value):
    sums = processes.ExactSum(2)
    sums.add(torch.tensor([value, 1e-30]).double() * (value != 0))
    sums.add(torch.tensor([0.0, 2.5]).double())
    assert torch.equal(sums.total()[:1].isfinite(), torch.tensor([value == 0.0]))

"""Least squares keeps its bound on memory, and what it gives does not depend on the bound."""

import gc
import logging
import tempfile
import time

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxzip
from fxzip.calibration.observer import observe
from fxzip.compiler.options import Options
from fxzip.compiler.survey import survey
from fxzip.refit.least_squares import batches, spill_file
from fxzip.refit.least_squares.memory import Meter, free_memory
from fxzip.refit.least_squares.spill_file import SpillFile
from fxzip.refit.least_squares.spilling import Shelf
from fxzip.rewriting.zip_plan import plan
from fxzip.tracing.calls import as_call


class Peak(TorchDispatchMode):
    """The most bytes of storages that live at a time, of those made under the mode."""

    def __init__(self):
        super().__init__()
        self.alive, self.total, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.total += storage.nbytes() - self.alive.get(storage._cdata, (None, 0))[1]
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.total > self.most:
            self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
            self.total = sum(size for _, size in self.alive.values())
            self.most = max(self.most, self.total)
        return out


class Written(nn.Module):
    """Writes in place, into views and into what others read; one layer is called twice."""

    def __init__(self, classes):
        super().__init__()
        self.conv, self.same, self.norm = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        y = torch.relu_(self.norm(self.conv(x)))
        z = self.same(self.same(y).relu_())
        z += y
        return self.head(z.relu().mean((2, 3)))


def conv(classes, seed):
    return randomise(Residual(classes), seed)


def mlp(classes, seed):
    layers = [nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)]
    return randomise(nn.Sequential(*layers), seed)


def written(classes, seed):
    return randomise(Written(classes), seed)


def transformer(classes, seed):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return randomise(nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, classes)), seed)


def prepared(make, shape, rows, count):
    models = make(3, 1), make(4, 2)
    trunk = survey(models, as_call(torch.randn(2, *shape)), Options(verify=False)).trunk()
    calls = [as_call(torch.randn(rows, *shape)) for _ in range(count)]
    planned = plan(trunk, observe(trunk, calls[:1]), fxzip.Permute())
    return fxzip.rewriting.rewrite(planned), planned, calls


QUICK = {"least": 1000, "positions": 5, "turns": 1, "rounds": 1}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("make", "shape", "mebibytes", "rows", "count"), [
    pytest.param(conv, (3, 16, 16), 5, 4, 24, marks=pytest.mark.slow), (mlp, (16,), 2, 200, 12),
    (written, (3, 24, 24), 4, 4, 12), (transformer, (32, 8), 3, 10, 12),
])  # fmt: skip
def test_the_bound_is_kept(make, shape, mebibytes, rows, count):
    """What lives at a time is counted, tensor by tensor; without the bound it is several times as much."""
    arguments = prepared(make, shape, rows, count)
    with Peak() as peak:
        result = fxzip.LeastSquares(memory=mebibytes << 20, **QUICK)(*arguments)
    assert result.meta["fxzip_fit"].inputs == rows * count
    assert (mebibytes << 20) / 8 < peak.most <= mebibytes << 20
    with Peak() as free:
        fxzip.LeastSquares(memory=1 << 40, **QUICK)(*arguments)
    assert free.most > 2 * peak.most


@pytest.mark.thinned(3)
@pytest.mark.parametrize("make", [pytest.param(conv, marks=pytest.mark.slow), mlp, transformer, written])
def test_the_result_is_the_same_to_the_bit(make, monkeypatch):
    shape = {mlp: (16,), transformer: (32, 8)}.get(make, (3, 12, 12))
    arguments = prepared(make, shape, 16, 6)
    whole = fxzip.LeastSquares(memory=1 << 40, **QUICK)(*arguments)
    spilled = fxzip.LeastSquares(memory=1, **QUICK)(*arguments)
    monkeypatch.setattr(batches, "free_on_disk", lambda: 0)
    again = fxzip.LeastSquares(memory=1, **QUICK)(*arguments)
    assert not whole.meta["fxzip_fit"].memory.spilled
    assert spilled.meta["fxzip_fit"].memory.on_file
    assert not again.meta["fxzip_fit"].memory.on_file
    for other in (spilled, again):
        for (name, value), found in zip(whole.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(value, found), name
    assert not torch.equal(next(whole.parameters()), next(arguments[0].parameters()))


def test_a_disk_that_fills_up_changes_nothing(monkeypatch):
    arguments = prepared(written, (3, 12, 12), 16, 6)
    whole = fxzip.LeastSquares(memory=1 << 40, **QUICK)(*arguments)
    write, left = SpillFile.write, [60]

    def full(self, value):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("No space left on device")
        return write(self, value)

    monkeypatch.setattr(SpillFile, "write", full)
    found = fxzip.LeastSquares(memory=1 << 20, **QUICK)(*arguments)
    assert left[0] < 0
    assert found.meta["fxzip_fit"].inputs == 96
    assert all(map(torch.equal, whole.parameters(), found.parameters()))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_on_the_disk(error, monkeypatch, tmp_path):
    """Neither while it lasts nor afterwards: no process that is killed can leave anything."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = prepared(mlp, (16,), 64, 6)
    put, seen = Shelf.put, []

    def watched(self, *given):
        put(self, *given)
        seen.append((list(tmp_path.iterdir()), self._file.size))
        if error is not None and len(seen) == 20:
            raise error

    monkeypatch.setattr(Shelf, "put", watched)
    if error is None:
        fxzip.LeastSquares(memory=1, **QUICK)(*arguments)
    else:
        with pytest.raises(error):
            fxzip.LeastSquares(memory=1, **QUICK)(*arguments)
    assert max(size for _, size in seen) > 100_000
    assert not any(files for files, _ in seen)
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_what_is_expected_and_measured_is_told(caplog):
    with caplog.at_level(logging.INFO, logger="fxzip"):
        result = fxzip.LeastSquares(memory=1 << 20, **QUICK).refitted(*prepared(written, (3, 12, 12), 16, 6))
    usage = result.module.meta["fxzip_fit"].memory
    assert usage.expected > 0
    assert usage.spilled > 0
    before, after = (record.getMessage() for record in caplog.records if "least squares" in record.getMessage())
    assert before.startswith("least squares on 96 inputs: ")
    assert "expected at the peak" in before
    assert "measured" not in before
    assert "measured" in after
    assert any("kept to a bound on memory" in note for note in result.notes)
    assert any("smaller batches" in note for note in result.notes) == (usage.expected > usage.limit)


def wide(classes, seed):
    return randomise(nn.Sequential(nn.Linear(16384, 16), nn.ReLU(), nn.Linear(16, classes)), seed)


def plain(classes, seed):
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return randomise(nn.Sequential(*layers, nn.Linear(32, classes)), seed)


@pytest.mark.parametrize(("make", "shape", "rows", "count"), [
    (wide, (16384,), 80, 8), (plain, (3, 32, 32), 50, 20),
])  # fmt: skip
def test_what_is_expected_is_what_is_measured(make, shape, rows, count):
    """Of a regression of more inputs than positions, and of values of all batches."""
    result = fxzip.LeastSquares()(*prepared(make, shape, rows, count))
    usage = result.meta["fxzip_fit"].memory
    assert usage.measured > 150 << 20
    assert 0.6 < usage.measured / usage.expected < 1.5


def test_memory_that_was_taken_before_hides_nothing():
    """What is free, and kept by the C library, is not there before the work, and used by it."""

    def many(count):
        return [torch.ones(15_000) for _ in range(count)]

    first = many(4000)
    del first[::2]
    del first
    with Meter() as meter:
        second = many(2000)
        time.sleep(0.05)
        del second
    assert 100 << 20 < meter.grown < 140 << 20


def test_the_default_bound_is_a_share_of_what_is_free():
    x = torch.randn(4, 16)
    zipped = fxzip.compile_zip(mlp(3, 1), mlp(4, 2), x, data=[x] * 12, progress=False, verify=False)
    usage = zipped.meta["fxzip_fit"].memory
    assert usage.limit == pytest.approx(min(free_memory(x.device) / 3, 3 << 30), rel=0.2)
    assert not usage.spilled


def test_a_shelf_gives_back_what_it_was_given():
    """Views of one memory, what was one tensor, strides, dtypes, containers, parameters; and what is written later."""
    module = nn.Linear(64, 64)
    base = torch.randn(4, 64, 64)
    env = {
        "base": base, "same": base, "view": base[:, 3:], "other": base.transpose(1, 2), "half": base.half(),
        "parts": (base[0], (3, None)), "parameter": module.weight, "list": [torch.ones(5000)], "bits": base > 0,
        "complex": torch.complex(base, base).conj(), "one": torch.ones(1), "steps": torch.randn(3, 4, 64, 64)[::2],
    }  # fmt: skip
    apart = {key: env[key].clone() for key in ("half", "bits", "complex", "one", "steps")}
    whole, held = base.clone(), env["list"]
    with SpillFile() as file:
        shelf = Shelf(file)
        for _ in range(3):
            shelf.put(env, module)
            size = file.size
            env = shelf.get()
            views = {"base": whole, "view": whole[:, 3:], "other": whole.transpose(1, 2)}
            for key, value in {**apart, **views}.items():
                assert torch.equal(env[key], value), key
                assert env[key].dtype == value.dtype
            assert env["base"] is env["same"]
            assert env["parameter"] is module.weight
            assert env["list"] is held
            assert env["other"].stride() == base.transpose(1, 2).stride()
            assert torch.equal(env["parts"][0], whole[0])
            env["view"].add_(1)
            whole[:, 3:] += 1
            assert torch.equal(env["base"], whole)
        assert size < 10 * base.nbytes
        shelf.put({}, module)
        assert file._free == [(0, file.size)]


def test_what_was_not_changed_is_not_written_again(monkeypatch):
    written = []
    write = SpillFile.write
    monkeypatch.setattr(SpillFile, "write", lambda self, value: written.append(value.nbytes) or write(self, value))
    with SpillFile() as file:
        shelf = Shelf(file)
        shelf.put({"a": torch.randn(3000), "b": torch.randn(4000)}, nn.Module())
        assert written == [12000, 16000]
        env = shelf.get()
        env["b"].mul_(2)
        env["c"] = torch.randn(5000)
        shelf.put(env, nn.Module())
        assert written == [12000, 16000, 16000, 20000]


def test_parts_of_a_file_are_used_again():
    with SpillFile() as file:
        first, second, third = (file.write(torch.ones(n)) for n in (3000, 2000, 3000))
        size = file.size
        file.free(first)
        file.free(second)
        assert file.write(torch.ones(5000)).start == 0
        assert file.size == size
        assert torch.equal(file.read(third, torch.device("cpu")).view(torch.float32), torch.ones(3000))
    assert spill_file.free_on_disk() > 0

"""Least squares keeps its bound on memory: what lives at a time is counted, tensor by tensor."""

import pytest
import torch
from networks import Residual, randomise
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fxzip
from fxzip.calibration.observer import observe
from fxzip.compiler.options import Options
from fxzip.compiler.survey import survey
from fxzip.refit.least_squares.lockstep import within_memory
from fxzip.rewriting.zip_plan import plan
from fxzip.tracing.calls import as_call


class Peak(TorchDispatchMode):
    """The most bytes of storages that live at a time, of those made under the mode."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def conv(classes, seed):
    return randomise(Residual(classes), seed)


def mlp(classes, seed):
    layers = [nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)]
    return randomise(nn.Sequential(*layers), seed)


def transformer(classes, seed):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return randomise(nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, classes)), seed)


def fitted(make, shape, memory, batches, **settings):
    models = make(3, 1), make(4, 2)
    sample = torch.randn(2, *shape)
    trunk = survey(models, as_call(sample), Options(verify=False)).trunk()
    calls = [as_call(torch.randn(batches[0], *shape)) for _ in range(batches[1])]
    planned = plan(trunk, observe(trunk, calls[:1]), fxzip.Permute())
    zipped = fxzip.rewriting.rewrite(planned)
    with Peak() as peak:
        result = fxzip.LeastSquares(memory=memory, **settings)(zipped, planned, calls)
    return peak.most, result


@pytest.mark.parametrize(("make", "shape", "mebibytes"), [
    (conv, (3, 24, 24), 8), (mlp, (16,), 4), (transformer, (32, 8), 8),
])  # fmt: skip
def test_the_bound_is_kept(make, shape, mebibytes):
    rows = 40 if make is not mlp else 4000
    peak, result = fitted(make, shape, mebibytes << 20, (rows, 8), least=2000)
    used, seen = result.meta["fxzip_fit"].inputs
    assert seen == rows * 8
    assert 0 < used < seen
    assert peak <= mebibytes << 20
    assert peak > (mebibytes << 20) / 8


def test_the_note_says_how_many_inputs_were_used():
    x = [torch.randn(50, 16) for _ in range(4)]
    options = {"data": x, "progress": False, "verify": False, "hold_out": False}
    zipped = fxzip.compile_zip(
        mlp(3, 1), mlp(4, 2), x[0], refit=fxzip.LeastSquares(memory=200_000, least=16), **options
    )
    used, seen = zipped.meta["fxzip_fit"].inputs
    assert (f"least squares used {used} of {seen} inputs: those beyond the memory limit were left out "
            "(`fxzip.LeastSquares(memory=...)` raises it)") in zipped.report["notes"]  # fmt: skip
    whole = fxzip.compile_zip(mlp(3, 1), mlp(4, 2), x[0], refit=fxzip.LeastSquares(), **options)
    assert whole.meta["fxzip_fit"].inputs == (200, 200)
    assert not any("memory limit" in note for note in whole.report["notes"])


def calls(*sizes):
    return [as_call(torch.ones(size, 3)) for size in sizes]


def test_batches_are_taken_evenly_and_the_first_is_cut():
    data = [(0, call) for call in calls(4, 4, 4)] + [(1, call) for call in calls(6, 2, 2)]
    found, (used, seen) = within_memory(data, 10.0, 100.0, 2)
    assert (used, seen) == (10, 22)
    assert [(source, number, len(call.args[0])) for source, number, call in found] == [(0, 0, 4), (1, 3, 6)]
    found, (used, _) = within_memory([(0, call) for call in calls(50, 1)], 10.0, 100.0)
    assert [len(call.args[0]) for _, _, call in found] == [10]
    assert used == 10
    found, (used, _) = within_memory([(0, call) for call in calls(50, 1)], 10.0, 100.0, whole=True)
    assert [len(call.args[0]) for _, _, call in found] == [50]

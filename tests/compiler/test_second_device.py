"""A compile on a second type of device: everything is made where the models are, and gives what it gives on the CPU.

The device is that of `models/second_device.py`: it computes as the CPU does, and refuses operands that are elsewhere.
What a real GPU alone shows is not tested so: what runs beside the host, and what its kernels round otherwise.
"""

import copy
from collections import Counter

import pytest
import torch
from models import randomise, second_device
from models.networks import Block
from models.second_device import DEVICE, copies
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.calibration.moment_sums import MomentSums
from fxzip.matching import ENTRIES
from fxzip.matching.merge import Merge
from fxzip.refit import REFITS
from fxzip.refit.least_squares.ridge import _Normal
from fxzip.rewriting.merged_parameters import PlaceMap

if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != DEVICE.type:
    pytest.skip("PyTorch knows one accelerator; here it is a real one", allow_module_level=True)

close = torch.testing.assert_close


@pytest.fixture(scope="module", autouse=True)
def _at_hand():
    with second_device.second_device():
        yield


class Perceptron(nn.Module):
    """A multi-layer perceptron with LayerNorm."""

    def __init__(self, classes, width=10):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(torch.relu(self.second(F.gelu(self.norm(self.first(x))))))


class Tokens(nn.Module):
    """A transformer on tokens, with positions that it makes itself."""

    def __init__(self, classes, width=8):
        super().__init__()
        self.embed, self.positions = nn.Embedding(11, width), nn.Embedding(7, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 12), nn.Linear(12, width), nn.Linear(width, classes)

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.view(*part.shape[:2], 2, -1).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(x.mean(1))


class Image(nn.Module):
    """A residual block with BatchNorm, and a projection beside it."""

    def __init__(self, classes):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.block, self.head = Block(4, 6, 2), nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.block(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))


def batches(*shape, count=5, rows=12):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(rows, *shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def tokens():
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(11, (12, 5), generator=generator) for _ in range(5)]


KINDS = {
    "images": (Image, lambda: batches(3, 6, 6)),
    "table": (Perceptron, lambda: batches(6)),
    "tokens": (Tokens, tokens),
}


def networks(kind, count=2):
    """Models in float64, in which what a device rounds otherwise decides nothing, and data; on the CPU."""
    make, data = KINDS[kind]
    return [randomise(make(3 + k), k).double() for k in range(count)], data()


def on_device(models):
    return [copy.deepcopy(model).to(DEVICE) for model in models]


def zipped(models, data, **options):
    sample = data[0][:2] if isinstance(data, list) else data[0][0][:2]
    options = {"data": data, "progress": False, "verify": False, **options}
    return fxzip.compile_zip(list(models), sample.to(models[0].head.weight.device), **options)


def assert_same(found, expected):
    """A network on the device, and one on the CPU."""
    assert {value.device for value in found.state_dict().values()} == {DEVICE}
    assert {value.device.type for value in expected.state_dict().values()} == {"cpu"}
    assert found.code.replace(f"device='{DEVICE}'", "device='cpu'") == expected.code.replace(f"'{DEVICE}'", "'cpu'")
    for name, value in expected.state_dict().items():
        close(found.state_dict()[name].cpu(), value, rtol=1e-6, atol=1e-6)


def assert_zips_as_on_the_cpu(kind, count=2, sources=None, **options):
    models, data = networks(kind, count)
    data = data if sources is None else fxzip.PerModel(data[:3], data[2:])
    assert_same(zipped(on_device(models), data, **options), zipped(models, data, **options))


# Compiles


@pytest.mark.parametrize("kind", ["images", "tokens", pytest.param("table", marks=pytest.mark.slow)])
@pytest.mark.thinned(2)
def test_the_default(kind):
    models, data = networks(kind)
    found, expected = zipped(on_device(models), data, verify=True), zipped(models, data)
    assert_same(found, expected)
    for own, other in zip(*(part.report.as_dict()["agreement"]["heads"] for part in (found, expected)), strict=True):
        assert own == pytest.approx(other, abs=1e-6)


@pytest.mark.thinned(12)
@pytest.mark.parametrize("kind", ["images", "tokens"])
@pytest.mark.parametrize("method", ENTRIES)
def test_methods(method, kind):
    if ENTRIES[method].extra:
        pytest.importorskip(ENTRIES[method].extra)
    if "base" not in ENTRIES[method].needs:
        assert_zips_as_on_the_cpu(kind, method=method, refit=None)
        return
    models, data = networks(kind)
    base = randomise(KINDS[kind][0](3), 9).double()
    expected = zipped(models, data, method=method, refit=None, base=base)
    assert_same(zipped(on_device(models), data, method=method, refit=None, base=base.to(DEVICE)), expected)


@pytest.mark.thinned(14)
@pytest.mark.parametrize("kind", ["images", "tokens"])
@pytest.mark.parametrize("refit", REFITS)
def test_refits(refit, kind):
    assert_zips_as_on_the_cpu(kind, method="permute", refit=refit)


WAYS = {
    "narrower": {"width": 0.5},
    "wider": {"width": 2.0},
    "by need": {"width": "auto", "max_cost": 1.2, "budget": "flops"},
    "of few parameters": {"width": "auto", "max_cost": 1.2, "budget": "parameters"},
    "of little memory": {"width": "auto", "max_cost": 1.5, "budget": "memory"},
    "of low rank": {"rank": 0.5},
    "ranks by need": {"rank": "auto", "max_cost": 1.2, "budget": "flops"},
    "cut": {"until": 0.5},
    "from a stem on": {"start": "block"},
    "cut by agreement": {"until": "auto", "min_agreement": 0.9},
    "cut by cost": {"until": "auto", "max_cost": 1.6, "budget": "flops"},
    "cut and by need": {"until": "auto", "width": "auto", "max_cost": 1.6, "budget": "flops"},
    "of data per model": {"sources": True},
    "of joint heads": {"sources": True, "joint": True},
    "of three": {"count": 3},
    "on a file": {"refit": fxzip.LeastSquares(memory=40_000.0)},
}


@pytest.mark.slow
@pytest.mark.thinned(3)
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_ask(way):
    try:
        assert_zips_as_on_the_cpu("images", **WAYS[way])
    except RuntimeError as error:  # PyTorch counts the devices at the first gradient in a process
        if "device_ready_queues_" not in str(error):
            raise
        pytest.skip("gradients were computed in this process before it had the device")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"width": "auto", "max_cost": 1.5}, {"until": "auto", "max_cost": 1.8}])
def test_latency(options):
    """What is timed differs from run to run, and with it what is chosen."""
    models, data = networks("images")
    found = zipped(on_device(models), data, **options)
    assert all(y.device == DEVICE for y in found(data[0].to(DEVICE)))


@pytest.mark.parametrize("kind", [pytest.param("images", marks=pytest.mark.slow), "table"])
def test_data_on_the_device(kind):
    models, data = networks(kind)
    found = zipped(on_device(models), [batch.to(DEVICE) for batch in data], method="permute", refit="repair")
    assert_same(found, zipped(models, data, method="permute", refit="repair"))


@pytest.mark.parametrize("on_the_device", [False, True])
def test_a_device_without_float64(on_the_device, monkeypatch):
    """What is zipped on the CPU in its stead is the zip of the CPU, to the bit."""
    monkeypatch.setattr(second_device, "has_float64", False)
    models, data = networks("table")
    models, data = [model.float() for model in models], [batch.float() for batch in data]
    found = zipped(on_device(models), [batch.to(DEVICE) for batch in data] if on_the_device else data)
    expected = zipped(models, data)
    assert all(y.device == DEVICE for y in found(data[0].to(DEVICE)))
    assert all(
        torch.equal(own.cpu(), value) for own, value in zip(found.parameters(), expected.parameters(), strict=True)
    )


# Beside compiles


def loss(network):
    return float(network(batches(3, 6, 6)[0].to(next(network.parameters()))).square().mean())


@pytest.mark.slow
def test_tools():
    models, data = networks("images")
    there, sample = on_device(models), data[0][:2].to(DEVICE)

    twin = fxzip.relabel(there[0], sample)
    close(twin(sample).cpu(), models[0](sample.cpu()))
    assert abs(fxzip.barrier(there[0], twin, sample, loss=loss, data=data, points=3, progress=False).height) < 1e-6
    assert fxzip.soup([there[0], copy.deepcopy(there[0])], sample).head.weight.device == DEVICE
    assert str(fxzip.inspect(there[0], sample)) == str(fxzip.inspect(models[0], sample.cpu()))

    narrow = {"data": data, "budget": "flops", "progress": False}
    assert_same(fxzip.narrow(there[0], sample, **narrow), fxzip.narrow(models[0], sample.cpu(), **narrow))


def test_what_is_side_by_side_agrees():
    models, data = networks("images")
    there, sample = on_device(models), data[0][:2].to(DEVICE)
    found, expected = fxzip.side_by_side(there, sample), fxzip.side_by_side(models, sample.cpu())
    close([y.cpu() for y in found(sample)], list(expected(sample.cpu())))
    assert fxzip.agreement(found, there, data).heads[0].same_class == 1
    labelled = fxzip.PerModel(*([(batch, torch.zeros(12).long()) for batch in data] for _ in models))
    assert fxzip.evaluate(found, labelled).per_task == fxzip.evaluate(expected, labelled).per_task


@pytest.mark.parametrize("kind", ["images", "table"])
def test_heads_run_together(kind):
    models, data = networks(kind)
    there, sample = on_device(models), data[0][:2].to(DEVICE)
    network = fxzip.side_by_side(there, sample)
    found = fxzip.batch_heads(network, sample, timed=False)
    assert found.report["batched"]["calls"]
    assert {value.device for value in found.state_dict().values()} == {
        value.device for value in network.state_dict().values()
    }
    close([y.cpu() for y in found(sample)], [y.cpu() for y in network(sample)])
    close([found.single(1)(sample).cpu()], [network(sample)[1].cpu()])
    assert fxzip.batch_heads(network, sample).report["batched"]["seconds"]["apart"] > 0


def scored(network):
    """What is scored is where the models are."""
    x = batches(3, 6, 6)[0].to(next(network.parameters()))
    assert x.device == DEVICE
    return float(network(x)[0].square().mean())


@pytest.mark.slow
def test_tools_on_a_device_without_float64(monkeypatch):
    """What they return, and give to be scored, is where the models are."""
    monkeypatch.setattr(second_device, "has_float64", False)
    models, data = networks("images")
    there, data = [model.float().to(DEVICE) for model in models], [batch.float() for batch in data]
    sample, quiet = data[0][:2].to(DEVICE), {"data": data, "progress": False}

    twin = fxzip.relabel(there[0], sample)
    close(twin(sample), there[0](sample), rtol=1e-4, atol=1e-4)
    pair = fxzip.side_by_side(there, sample)
    assert fxzip.agreement(pair, there, data).heads[1].same_class == 1
    assert fxzip.inspect(there[0], sample).spaces
    assert fxzip.barrier(there[0], twin, sample, score=scored, points=3, **quiet).height == pytest.approx(0, abs=1e-4)
    for network in (
        twin,
        fxzip.soup([there[0], copy.deepcopy(there[0])], sample),
        fxzip.narrow(there[0], sample, budget="flops", **quiet),
    ):
        assert next(network.parameters()).device == DEVICE
        assert network(sample).device == DEVICE
    table = fxzip.compare(there, sample, methods=["zip", "alone"], score=scored, budget="flops", **quiet)
    assert all("score" in row for row in table)


@pytest.mark.slow
def test_tables():
    models, data = networks("table")
    there, sample = on_device(models), data[0][:2].to(DEVICE)
    assert len(fxzip.sweep(there, sample, data=data, cuts=[None, 0.5], progress=False).rows) >= 2
    assert len(fxzip.compare(there, sample, data=data, methods=["zip", "permute"], progress=False).rows) >= 2


def test_saved_and_loaded(tmp_path):
    models, data = networks("table")
    found = zipped(on_device(models), data, refit=None)
    fxzip.save(found, tmp_path / "zip")
    loaded = fxzip.load(tmp_path / "zip")
    assert {value.device.type for value in loaded.state_dict().values()} == {"cpu"}
    expected = list(loaded(data[0]))
    close([y.cpu() for y in found(data[0].to(DEVICE))], expected)
    close([y.cpu() for y in loaded.to(DEVICE)(data[0].to(DEVICE))], expected)


@pytest.mark.slow
def test_resumed(tmp_path):
    models, data = networks("table")
    first, second = (zipped(on_device(models), data, resume=tmp_path) for _ in range(2))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert_same(second, zipped(models, data))


# What it costs


def waits(width=10, count=5, **options):
    """How often the host and the device wait for each other in a compile, by kind and line."""
    models = on_device(randomise(Perceptron(3 + k, width), k).double() for k in range(2))
    copies.clear()
    zipped(models, batches(6, count=count), **options)
    return Counter(copies)


def test_how_often_the_device_is_waited_for_does_not_depend_on_the_width():
    """But for what is iterated, such as ridges that are tried."""
    expected = waits(count=3).total()
    assert expected > 100
    assert waits(width=20, count=3).total() <= 1.1 * expected


@pytest.mark.slow
def test_no_batch_is_copied_back():
    """A batch goes to the device once in a pass; from there come numbers only."""
    expected, longer = waits(hold_out=False), waits(count=10, hold_out=False)
    assert not [place for place, often in longer.items() if place[0] == "to the host" and often > expected[place]]
    line = [
        place for place in longer if place[1].startswith("tracing/calls.py") and longer[place] == 2 * expected[place]
    ]
    assert len(line) == 1


# The device sees what it is to see


def on_the_cpu(function):
    """The same with what it returns left on the CPU."""

    def left(*args, **kwargs):
        return function(*args, **kwargs).cpu()

    return left


def beside_a_constant(function):
    """The same with a constant added that is on no device that was named."""

    def added(*args, **kwargs):
        found = function(*args, **kwargs)
        return found + torch.zeros(found.shape[-1])

    return added


FAULTS = {
    "moments": (MomentSums, "add", lambda add: lambda own, rows: add(own, rows + torch.zeros(rows.shape[1]))),
    "a merge": (Merge, "M", beside_a_constant),
    "a sparse matrix": (PlaceMap, "_sparse", on_the_cpu),
    "a regression": (_Normal, "side", on_the_cpu),
    "a result": (_Normal, "solve", beside_a_constant),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.thinned(2)
def test_planted_faults_are_seen(fault, monkeypatch):
    place, name, planted = FAULTS[fault]
    models, data = networks("table")
    monkeypatch.setattr(place, name, planted(getattr(place, name)))
    options = {"width": 0.5, "refit": "lstsq" if place is _Normal else None}
    zipped(models, data, **options)  # on the CPU it is none
    with pytest.raises((RuntimeError, fxzip.FxzipError), match="same device"):
        zipped(on_device(models), data, **options)


@pytest.mark.parametrize("call", [
    lambda x: x + torch.ones(4), lambda x: torch.ones(4) @ x, lambda x: torch.stack([x[0], torch.ones(())]),
    lambda x: x[torch.tensor([0])], lambda x: x.index_select(0, torch.tensor([0])), lambda x: torch.ones(4).add_(x),
    lambda x: torch.zeros(4, dtype=torch.float64, device=x.device), lambda x: x.double(),
    lambda x: torch.randn(4, device=x.device, generator=torch.Generator()), lambda x: x.numpy(),
])  # fmt: skip
def test_what_the_device_refuses(call, monkeypatch):
    monkeypatch.setattr(second_device, "has_float64", False)
    with pytest.raises((RuntimeError, TypeError), match="device"):
        call(torch.ones(4).to(DEVICE))


def test_what_the_device_is():
    """Storages, views, scalars and copies are as on other devices."""
    x = torch.arange(6.0).to(DEVICE)
    x.view(2, 3).T[0] = -1
    assert x.tolist() == [-1, 1, 2, -1, 4, 5]
    assert (x * torch.tensor(2.0)).device == DEVICE
    assert copy.deepcopy(x).data_ptr() != x.data_ptr()
    assert torch.equal(x.clone().resize_(8)[:6], x)
    network = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    close(copy.deepcopy(network).to(DEVICE)(x.view(1, 1, 6)).cpu(), network(x.cpu().view(1, 1, 6)))
    for make in (nn.LSTM, nn.GRU):
        cell = make(3, 2)
        close(copy.deepcopy(cell).to(DEVICE)(x.view(2, 1, 3))[0].cpu(), cell(x.cpu().view(2, 1, 3))[0])

"""Heads in one call where that is faster, by a clock that is given; what users do with such a network."""

import pytest
import torch
from models import randomise
from torch import nn

import fxzip
from fxzip.tools import batched_heads

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def rows(classes):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes))


def images():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4),
        nn.ReLU(), nn.Linear(4, 3),
    )  # fmt: skip


@pytest.fixture
def network():
    return fxzip.side_by_side({name: randomise(rows(n), n) for name, n in (("a", 2), ("b", 3), ("c", 2))}, X)


@pytest.fixture
def clock(monkeypatch):
    """Gives the networks these times, in their order; the first has its heads apart."""

    def give(*seconds):
        monkeypatch.setattr(batched_heads, "fastest", lambda networks, call: list(seconds[: len(networks)]))

    return give


def test_slower_heads_stay_apart_to_the_bit(network, clock):
    clock(1.0, 0.99)
    found = fxzip.batch_heads(network, X)
    assert found.report["batched"] == {
        "calls": [],
        "apart": [
            "_0",
            "_1",
            "_2",
            "_3",
            "_4",
            "_0_1",
            "_1_1",
            "_2_1",
            "_3_1",
            "_4_1",
            "_0_2",
            "_1_2",
            "_2_2",
            "_3_2",
            "_4_2",
        ],
        "seconds": {"apart": 1.0, "together": 0.99},
        "flops": network.report["flops"]["total"],
    }
    assert found.report.notes[-1] == "heads run apart: together they take 0.99x the time"
    assert all(torch.equal(value, network(X)[name]) for name, value in found(X).items())


def test_faster_heads_run_together(network, clock):
    clock(1.0, 0.5)
    found = fxzip.batch_heads(network, X)
    assert found.report["batched"]["calls"] == ["_0", "_1", "_2", "_3"]
    assert found.report["batched"]["apart"] == ["_4", "_4_1", "_4_2"]
    assert found.report.notes[-1] == "heads run together in 4 calls: 0.50x the time of the network with its heads apart"
    assert "note: heads run together in 4 calls" in str(found.report)
    assert found.report["flops"] == network.report["flops"]
    torch.testing.assert_close(found(X), network(X))


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [
        ((1.0, 0.5, 0.6, 0.7), ["_0", "_1", "_2", "_3", "_4", "_5", "_6", "_7"]),
        ((1.0, 0.6, 0.5, 0.7), ["_0", "_1", "_2", "_3", "_4"]),
        ((1.0, 0.6, 0.7, 0.5), ["_5", "_6", "_7"]),
    ],
)
def test_the_fastest_way_is_taken(clock, seconds, calls):
    """All calls, convolutions with what is behind them, or linear calls with what is behind them."""
    network = fxzip.side_by_side([randomise(images(), k) for k in range(3)], IMAGES)
    clock(*seconds)
    found = fxzip.batch_heads(network, IMAGES)
    assert found.report["batched"]["calls"] == calls
    assert found.report["batched"]["seconds"] == {"apart": 1.0, "together": 0.5}
    torch.testing.assert_close(found(IMAGES), network(IMAGES))


def test_latency_is_that_of_the_zip_in_the_ratio_that_was_timed(clock):
    models = [randomise(rows(3), k) for k in range(2)]
    zipped = fxzip.compile_zip(models, X, until="0", data=[X], hold_out=False, progress=False)
    clock(2.0, 0.5)
    found = fxzip.batch_heads(zipped, X)
    assert found.report["latency"]["zipped"] == pytest.approx(zipped.report["latency"]["zipped"] / 4)
    assert found.report["latency"]["originals"] == zipped.report["latency"]["originals"]


def test_heads_of_other_widths_get_zeros_if_that_is_faster(clock):
    models = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 8)) for n in (8, 7, 8)]
    network = fxzip.side_by_side([randomise(model, k) for k, model in enumerate(models)], X)
    clock(1.0, 0.8, 0.6)
    found = fxzip.batch_heads(network, X)
    assert found.report["batched"]["calls"] == ["_0", "_1", "_2", "_3", "_4"]
    assert found.report["batched"]["flops"] > found.report["flops"]["total"]
    assert found.report.notes[-1] == "features of zeros bring heads to one width: 3% more FLOPs"
    torch.testing.assert_close(found(X), network(X))
    clock(1.0, 0.6, 0.8)
    found = fxzip.batch_heads(network, X)
    assert found.report["batched"]["calls"] == ["_0", "_1"]
    assert found.report["batched"]["flops"] == found.report["flops"]["total"]


def test_without_a_clock_nothing_depends_on_the_machine(network, monkeypatch):
    monkeypatch.setattr(batched_heads, "fastest", None)  # it would be called
    found = fxzip.batch_heads(network, timed=False)
    assert found.report["batched"]["calls"] == ["_0", "_1", "_2", "_3"]
    assert found.report["batched"]["seconds"] is None


def test_really_timed(network):
    found = fxzip.batch_heads(network, X)
    seconds = found.report["batched"]["seconds"]
    assert seconds["apart"] > 0
    assert bool(found.report["batched"]["calls"]) == (seconds["together"] < 0.98 * seconds["apart"])


def test_what_users_do_with_it(network, tmp_path):
    found = fxzip.batch_heads(network, timed=False)
    fxzip.save(found, tmp_path / "together")
    loaded = fxzip.load(tmp_path / "together")
    assert all(torch.equal(value, found(X)[name]) for name, value in loaded(X).items())
    torch.testing.assert_close(loaded.single("b")(X), network(X)["b"])

    alone = found.single("b")
    fxzip.save(alone, tmp_path / "alone")
    assert torch.equal(fxzip.load(tmp_path / "alone")(X), alone(X))

    torch.save(found, tmp_path / "together.pt")
    again = torch.load(tmp_path / "together.pt", weights_only=False)
    assert all(torch.equal(value, found(X)[name]) for name, value in again(X).items())

    program = torch.export.load(fxzip.export(found, tmp_path / "together.pt2")).module()
    torch.testing.assert_close(dict(program(X[:3])), found(X[:3]))
    found.report.html(tmp_path / "together.html")
    page = (tmp_path / "together.html").read_text(encoding="utf-8")
    assert "linear_heads" in page
    assert '"label": "all heads"' in page or '"label":"all heads"' in page


def test_what_is_no_network_with_several_heads_is_an_error(network):
    with pytest.raises(fxzip.OptionError, match=r"needs a network with several heads, .* found `Sequential`"):
        fxzip.batch_heads(rows(2), X)
    with pytest.raises(fxzip.OptionError, match="run together already; pass the network with its heads apart"):
        fxzip.batch_heads(fxzip.batch_heads(network, timed=False), X)


def test_heads_that_have_nothing_in_common():
    network = fxzip.side_by_side([rows(2), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))], X)
    found = fxzip.batch_heads(network, X)
    assert found.report["batched"]["calls"] == []
    assert found.report.notes[-1] == "heads have no calls that can be made together"
    assert all(map(torch.equal, found(X), network(X)))

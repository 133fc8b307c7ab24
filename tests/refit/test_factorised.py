"""Calls as two calls of a rank: the closed form, what a zip computes with them, and what stays whole."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest
import torch
from models import randomise
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import fxzip
from fxzip.partition.alignment import align
from fxzip.refit.least_squares import walk
from fxzip.refit.least_squares.blocks import Blocks
from fxzip.refit.least_squares.reduced_rank import cut_rank
from fxzip.refit.least_squares.ridge import Regression, ridge_solution
from fxzip.refit.least_squares.solving import Solved, solve
from fxzip.refit.unfit import Unfit
from fxzip.rewriting.factorised import Factors, LinearSize, factorise, factorised_calls, linear_size, why_whole
from fxzip.tracing import trace
from fxzip.tracing.calls import as_call
from fxzip.widths import rank_losses
from fxzip.widths.rank_losses import CallOutputs
from fxzip.widths.ranks import as_emitted, choose_ranks
from fxzip.widths.requests import ScaledRanks


def _images(count: int = 160, channels: int = 3, size: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed)).double()


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def _residual(classes: int, seed: int, width: int = 12) -> nn.Module:
    stem = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    net = nn.Sequential(*stem, _Block(width), _Block(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(width, classes))  # fmt: skip
    return randomise(net, seed).double()


def _of_rank(net: nn.Module, ranks: dict[str, int]) -> nn.Module:
    """The network with weights of these ranks."""
    with torch.no_grad():
        for path, rank in ranks.items():
            weight = net.get_submodule(path).weight
            u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            weight.copy_(((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(weight.shape))
    return net


def _share(rank: int, outputs: int, inputs: int) -> float:
    """A factor that gives this rank."""
    return (rank + 0.5) / LinearSize(outputs, inputs).break_even


def _zip(*models: nn.Module, x: Tensor, **options) -> fxzip.ZippedModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxzip.FxzipWarning)
        return fxzip.compile_zip(*models, x[:2], data=[x], progress=False, **options)


def _far(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _calls(zipped: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in zipped.graph.nodes if node.op == "call_module"]


# The closed form


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_reduced_rank_regression_reaches_the_optimum_of_the_svd(rank, constant) -> None:
    """Eckart and Young: the error of the best rank-r predictor is that of the full one and the tail of its values."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(300, 9, generator=generator).double() + constant
    t = x @ torch.randn(9, 6, generator=generator).double() + torch.randn(300, 6, generator=generator).double()
    prior = torch.zeros(9 + constant, 6).double()
    found = ridge_solution(Regression(x, t, prior, constant=constant), 1e-13, rank=rank)
    weight, factors = found.weight, found.factors

    ones = torch.cat([x, torch.ones(300, 1).double()], 1) if constant else x
    centred = (lambda v: v - v.mean(0)) if constant else (lambda v: v)
    full = torch.linalg.lstsq(centred(x), centred(t)).solution
    tail = np.linalg.svd((centred(x) @ full).numpy(), compute_uv=False)[rank:]
    least = float((centred(t) - centred(x) @ full).square().sum()) + float((tail**2).sum())
    assert float((ones @ weight - t).square().sum()) == pytest.approx(least, rel=1e-9)

    assert [tuple(own.shape) for own in factors] == [(9, rank), (rank, 6)]
    torch.testing.assert_close(factors[0] @ factors[1], weight[:9], rtol=1e-9, atol=1e-12)
    assert np.linalg.matrix_rank(weight[:9].numpy(), tol=1e-9) == rank


def test_with_a_ridge_no_weight_of_that_rank_is_better() -> None:
    """The objective with its prior, against gradient descent on the factors from the solution and from elsewhere."""
    generator = torch.Generator().manual_seed(0)
    x, prior = torch.randn(40, 7, generator=generator).double() + 1, torch.randn(8, 5, generator=generator).double()
    t = torch.randn(40, 5, generator=generator).double()
    ones = torch.cat([x, torch.ones(40, 1).double()], 1)
    strength = 0.3
    weight = ridge_solution(Regression(x, t, prior), strength, rank=2).weight
    bound = strength * float((ones.T @ ones).diagonal().mean())

    def objective(own: Tensor) -> Tensor:
        return (ones @ own - t).square().sum() + bound * (own - prior).square().sum()

    best = float(objective(weight))
    for seed in range(4):
        start = torch.Generator().manual_seed(seed)
        parts = [torch.randn(*shape, generator=start).double().requires_grad_() for shape in ((7, 2), (2, 5), (1, 5))]
        optimiser = torch.optim.LBFGS(parts, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure(parts=parts, optimiser=optimiser) -> Tensor:
            optimiser.zero_grad()
            value = objective(torch.cat([parts[0] @ parts[1], parts[2]]))
            value.backward()
            return value

        optimiser.step(closure)
        assert float(closure()) >= best * (1 - 1e-7)


def test_rounds_in_front_of_a_relu_lower_the_error_at_the_same_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    x, offset = torch.randn(400, 8, generator=generator), torch.randn(400, 6, generator=generator)
    t = x @ torch.randn(8, 6, generator=generator) + torch.randn(400, 6, generator=generator)

    def error(rounds: int) -> float:
        solution = ridge_solution(Regression(x, t, torch.zeros(9, 6), offset), 1e-12, rounds=rounds, rank=2).weight
        y, wanted = x.double() @ solution[:-1] + solution[-1] + offset, (t + offset).double()
        return float(torch.where(wanted > 0, y - wanted, y.clamp(min=0)).square().sum())

    errors = [error(rounds) for rounds in (0, 1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.98 * errors[0]


def test_what_has_the_rank_already_is_left_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 2, generator=generator).double() @ torch.randn(2, 6, generator=generator).double()
    solution = torch.cat([weight, torch.randn(1, 6, generator=generator).double()])
    x = torch.randn(50, 9, generator=generator).double()
    ones = torch.cat([x, torch.ones(50, 1).double()], 1)
    cut = cut_rank(solution, Blocks.of(ones), 0.5, 2, constant=True)
    torch.testing.assert_close(cut.weight, solution, rtol=0, atol=1e-12)


# Emission


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(10, 8), (5, 10)),
        (nn.Linear(10, 8, bias=False), (2, 5, 10)),
        (nn.Conv1d(4, 8, 3, stride=2, padding=1, dilation=2), (2, 4, 12)),
        (nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding="valid", bias=False), (2, 4, 8, 8)),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 8, 8)),
        (nn.Conv2d(4, 8, 3, padding="same", dilation=2), (2, 4, 8, 8)),
        (nn.Conv3d(2, 8, 2), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(4, 8, 3, stride=2), (2, 4, 6)),
        (nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 5)),
    ],
)
def test_two_calls_compute_what_one_does(layer, shape) -> None:
    net = fx.symbolic_trace(nn.Sequential(layer.double(), nn.Tanh()))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    expected = net(x)
    node = next(iter(net.graph.find_nodes(op="call_module", target="0")))
    assert not why_whole(net, node)
    size = linear_size(net, node)
    weight = layer.weight.detach()
    flat = weight.transpose(0, 1).flatten(1) if size.along else weight.flatten(1)
    assert (size.outputs, size.inputs) == tuple(flat.shape)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    state = torch.get_rng_state()
    factorise(net, {node: Factors(v, u * s)})
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert _calls(net) == ["0.0", "0.1", "1"]
    assert net.get_submodule("0.1").bias is layer.bias
    assert net.get_submodule("0.0").bias is None


# In a zip


def test_a_factor_of_one_changes_no_bit() -> None:
    x, models = _images(), (_residual(3, 0), _residual(4, 1))
    plain, whole = _zip(*models, x=x), _zip(*models, x=x, rank=1.0)
    assert str(plain.graph) == str(whole.graph)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), whole.state_dict().values(), strict=True))
    named = _zip(*models, x=x, rank={"3.conv1": 1.0})
    assert str(plain.graph) == str(named.graph)


@pytest.mark.parametrize("until", [None, "3"])
def test_a_network_of_low_rank_comes_back_as_two_calls(until) -> None:
    """Zipped with a relabelled copy, at a rank at which nothing is lost: in trunk and heads."""
    ranks = {"3.conv1": 4, "3.conv2": 5, "4.conv1": 3, "4.conv2": 2}
    net = _of_rank(_residual(4, 0), ranks)
    x = _images(400)
    other = fxzip.relabel(net, x[:2])
    wanted = {path: _share(rank, 12, 108) for path, rank in ranks.items()}
    zipped = _zip(net, other, x=x, rank=wanted, until=until)
    for found in zipped(x[:50]):
        assert _far(found, net(x[:50])) < 1e-5
    parts = ["trunk"] * 4 if until is None else ["trunk", "trunk", "head_0", "head_0"]
    for part, (path, rank) in zip(parts, ranks.items(), strict=True):
        first, second = (zipped.get_submodule(f"{part}.{path}.{n}") for n in (0, 1))
        assert first.out_channels == second.in_channels == rank
        assert f"{part}.{path}.0" in _calls(zipped)


def test_a_linear_network_is_as_good_as_the_svd_says() -> None:
    """Without nonlinearity and with one space: what the second call gives is the best of its rank."""
    net = randomise(nn.Sequential(nn.Linear(10, 9), nn.Linear(9, 4))).double()
    x = torch.randn(500, 10, generator=torch.Generator().manual_seed(0)).double()
    refit = fxzip.LeastSquares(ridge=1e-12, turns=0)
    zipped = _zip(net, copy.deepcopy(net), x=x, rank={"0": _share(3, 9, 10)}, refit=refit, hold_out=False)
    assert zipped.get_submodule("trunk.0.0").out_features == 3
    values = net[0](x)
    found = zipped.get_submodule("trunk.0")(x)
    tail = torch.linalg.svdvals(values - values.mean(0))[3:]
    assert float((found - values).square().sum()) == pytest.approx(float(tail.square().sum()), rel=1e-6)


def test_a_trunk_call_may_have_a_rank_below_its_width_and_sums_mend_what_it_loses() -> None:
    """Nearer to the networks than the zip with the same weights cut by themselves, at the same cost."""
    x, models = _images(300), (_residual(3, 0), _residual(4, 1))
    whole = _zip(*models, x=x, hold_out=False)
    half = _zip(*models, x=x, rank=0.5, hold_out=False)
    assert half.report.cost < 0.55 < 0.99 < whole.report.cost
    cut = copy.deepcopy(whole)
    nodes = [node for node in cut.graph.nodes if f"trunk.{node.target}".count("conv") and not why_whole(cut, node)]
    factors = {}
    for node in nodes:
        u, s, v = torch.linalg.svd(cut.get_submodule(str(node.target)).weight.detach().flatten(1), full_matrices=False)
        factors[node] = Factors(v[:5], u[:, :5] * s[:5])
    factorise(cut, factors)
    errors = [
        sum(_far(y, net(x)) for y, net in zip(zipped(x), models, strict=True)) for zipped in (whole, half, cut)
    ]  # fmt: skip
    assert errors[0] < errors[1] < 0.8 * errors[2]


def test_one_factor_leaves_out_the_layers_in_front_of_outputs() -> None:
    zipped = _zip(_residual(3, 0), _residual(4, 1), x=_images(), rank=0.5)
    assert {"head_0.7", "head_1.7", "trunk.0.1", "trunk.4.conv2.1"} <= set(_calls(zipped))
    named = _zip(_residual(8, 0), _residual(8, 1), x=_images(), rank={"7": 0.5})
    assert {"head_0.7.1", "head_1.7.1", "trunk.0"} <= set(_calls(named))
    one = _zip(_residual(8, 0), _residual(8, 1), x=_images(), rank={"head_1.7": 0.5})
    assert {"head_0.7", "head_1.7.1"} <= set(_calls(one))


class _Odd(nn.Module):
    """Layers that are not to be touched, and one that is."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.plain = nn.Linear(12, 12)
        self.grouped = nn.Conv1d(12, 12, 3, padding=1, groups=3)
        self.depthwise = nn.Conv1d(12, 12, 3, padding=1, groups=12)
        self.twice = nn.Linear(12, 12)
        self.one, self.other = nn.Linear(12, 12), nn.Linear(12, 12)
        self.other.weight = self.one.weight
        self.normed = parametrizations.weight_norm(nn.Linear(12, 12))
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.recurrent = nn.GRU(12, 12, batch_first=True)
        self.last = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x).relu()
        x = self.depthwise(self.grouped(x.transpose(1, 2))).transpose(1, 2).relu()
        x = self.twice(self.twice(x).relu()).relu()
        x = self.normed(self.other(self.one(x).relu())).relu()
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.last(self.recurrent(x)[0].mean(1))


def test_what_is_left_alone_is_named_with_its_reason() -> None:
    x = torch.randn(64, 5, 12, generator=torch.Generator().manual_seed(0))
    models = randomise(_Odd(3), 0), randomise(_Odd(4), 1)
    names = ["plain", "grouped", "depthwise", "twice", "one", "other", "normed", "attention", "recurrent"]
    zipped = _zip(*models, x=x, rank=dict.fromkeys(names, 0.4))
    called = set(_calls(zipped))
    found = {
        name: next((path for path in called if path.split(".", 1)[1] in (name, f"{name}.1")), "") for name in names
    }
    assert [name for name, path in found.items() if path.endswith(".1")] == ["plain", "normed"]  # as it is traced
    notes = [note for note in zipped.report.notes if "stays one call" in note]
    for name, why in {
        "grouped": "it is grouped", "depthwise": "it is grouped", "twice": "called several times",
        "one": "others read", "other": "others read", "attention": "`MultiheadAttention` is neither",
        "recurrent": "`GRU` is neither",
    }.items():  # fmt: skip
        assert any(f".{name}`" in note and why in note for note in notes), (name, notes)
    everywhere = _zip(*models, x=x, rank=0.4)
    assert [path for path in _calls(everywhere) if path.endswith(".1")] == ["trunk.plain.1", "trunk.normed.1"]


def test_a_call_that_cannot_be_fitted_stays_one_and_is_named(monkeypatch) -> None:
    def refuse(net, unit, *rest) -> Solved:
        if "conv1" in unit.name:
            raise Unfit("it is not to be had")
        return solve(net, unit, *rest)

    monkeypatch.setattr(walk, "solve", refuse)
    zipped = _zip(_residual(3, 0), _residual(4, 1), x=_images(), rank={"3.conv1": 0.5, "3.conv2": 0.5})
    assert [own["name"] for own in zipped.report["ranks"]] == ["trunk.3.conv2"]
    assert any("but one stays" in note and "_3_conv1" in note for note in zipped.report.notes)


@pytest.mark.slow
def test_whatever_a_zip_can_do_it_can_do_with_ranks(tmp_path) -> None:
    x, models = _images(), (_residual(3, 0), _residual(4, 1))
    zipped = _zip(*models, x=x, rank=0.5, until="3")
    expected = zipped(x)

    def same(network, outputs=expected) -> None:
        for found, y in zip(network(x), outputs, strict=True):
            torch.testing.assert_close(found, y, rtol=1e-9, atol=1e-9)

    same(copy.deepcopy(zipped))
    file = io.BytesIO()
    torch.save(zipped, file)
    file.seek(0)
    same(torch.load(file, weights_only=False))
    fxzip.save(zipped, tmp_path / "zipped")
    loaded = fxzip.load(tmp_path / "zipped")
    same(loaded)
    assert loaded.report["ranks"] == zipped.report["ranks"]
    same(torch.export.export(zipped, (x,)).module())
    for k in range(2):
        torch.testing.assert_close(zipped.single(k)(x), expected[k], rtol=0, atol=0)
    zipped.report.html(str(tmp_path / "page.html"))

    train = copy.deepcopy(zipped).train()
    train(x)[0].sum().backward()
    assert train.get_submodule("trunk.3.conv1.0").weight.grad is not None
    again = _zip(zipped.single(0), fxzip.relabel(zipped.single(0), x[:2]), x=x)
    for found in again(x):
        assert _far(found, expected[0]) < 1e-5


def test_the_report_counts_and_lists_what_became_two() -> None:
    x, models = _images(), (_residual(3, 0), _residual(4, 1))
    zipped = _zip(*models, x=x, rank={"4.conv1": _share(4, 12, 108)})
    assert zipped.report["ranks"] == [{"name": "trunk.4.conv1", "rank": 4, "outputs": 12, "inputs": 108}]
    assert "trunk.4.conv1" in str(zipped.report)
    nodes = zipped.report["nodes"]
    two = sum(own["flops"] for name, own in nodes.items() if "4_conv1" in name)
    assert two == 2 * 2 * 36 * 4 * (12 + 108)
    whole = _zip(*models, x=x)
    assert whole.report["ranks"] == []
    saved = 2 * 2 * 36 * (12 * 108 - 4 * (12 + 108))
    assert whole.report["flops"]["total"] - zipped.report["flops"]["total"] == saved


# By need


@pytest.mark.thinned(3)
@pytest.mark.parametrize("options", [{}, {"width": "auto"}, {"width": 0.75}, {"until": "3", "width": "auto"}])
def test_ranks_by_need_keep_the_budget(options) -> None:
    x, models = _images(), (_residual(3, 0), _residual(4, 1))
    zipped = _zip(*models, x=x, rank="auto", max_cost=0.5, budget="flops", **options)
    assert 0.4 < zipped.report.cost <= 0.5
    assert zipped.report["ranks"] or options.get("width") == "auto"


def test_calls_are_observed_in_several_passes_where_memory_is_short(monkeypatch) -> None:
    x = _images()
    programs = tuple(trace(_residual(n, n), as_call(x[:2])) for n in (3, 4))
    passes = []

    def data():
        passes.append(1)
        return [as_call(x[:80]), as_call(x[80:])]

    whole = CallOutputs.observe(align(programs), data)
    assert len(passes) == 1
    monkeypatch.setattr(rank_losses, "MEMORY", 8 * 24**2 * 2)
    parts = CallOutputs.observe(align(programs), data)
    assert len(passes) == 1 + 3  # two at a time of the six that both make
    assert list(parts.joint) == list(whole.joint)
    for own, other in zip(parts.joint.values(), whole.joint.values(), strict=True):
        assert torch.equal(own.outer, other.outer)


@pytest.mark.slow
def test_ranks_keep_budgets_of_other_kinds() -> None:
    """Of parameters, counted; of seconds, which are measured with calls made two."""
    x, models = _images(), (_residual(3, 0), _residual(4, 1))
    small = _zip(*models, x=x, rank="auto", max_cost=0.6, budget="parameters").report
    assert small["parameters"]["total"] <= 0.6 * small["parameters"]["originals"][0]
    assert small["ranks"]
    fast = _zip(*models, x=x, rank="auto", max_cost=1.6, budget="latency").report["budget"]
    assert fast["currency"] == "latency"
    assert fast["spent"] > 0


def test_a_network_takes_what_it_will_before_it_is_fitted() -> None:
    x, models = _images(), (_residual(3, 0), _residual(4, 1))
    whole = _zip(*models, x=x, refit=None)
    ranks = choose_ranks(whole, ScaledRanks(0.5), {}).kept
    cut = as_emitted(whole, ranks)
    assert [own["name"] for own in factorised_calls(cut)] == [f"trunk.{path}" for path in (
        "0", "3.conv1", "3.conv2", "4.conv1", "4.conv2"
    )]  # fmt: skip
    assert not factorised_calls(whole)
    assert as_emitted(whole, {}) is whole


def test_ranks_by_need_find_where_rank_is_low() -> None:
    """What has a low rank is made two calls, and nothing is lost; what has not is left whole."""
    ranks = {"3.conv1": 2, "4.conv2": 2}
    net = _of_rank(_residual(4, 0), ranks)
    x = _images(400)
    zipped = _zip(net, fxzip.relabel(net, x[:2]), x=x, rank="auto", max_cost=0.63, budget="flops")
    found = {own["name"]: own["rank"] for own in zipped.report["ranks"]}
    assert found == {"trunk.3.conv1": 2, "trunk.4.conv2": 2}
    assert max(_far(y, net(x)) for y in zipped(x)) < 0.02


def test_narrow_takes_ranks_too() -> None:
    net = _of_rank(_residual(4, 0), {"3.conv1": 2, "3.conv2": 2, "4.conv1": 2, "4.conv2": 2})
    x = _images(400)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxzip.FxzipWarning)
        narrow, both = (
            fxzip.narrow(net, x[:2], data=[x], max_cost=0.5, budget="flops", rank=rank, progress=False)
            for rank in (1.0, "auto")
        )
    assert both.report.cost <= 0.5
    assert _far(both(x), net(x)) < 0.5 * _far(narrow(x), net(x))


# What may be asked


def test_requests_that_cannot_be_met() -> None:
    x, models = _images(), (_residual(3, 0), _residual(4, 1))
    with pytest.raises(fxzip.OptionError, match=r"`rank` must lie in \(0, 1\].*found 1.5"):
        _zip(*models, x=x, rank=1.5)
    with pytest.raises(fxzip.OptionError, match=r"`rank` must lie in .*found 0"):
        _zip(*models, x=x, rank={"3.conv1": 0})
    with pytest.raises(fxzip.OptionError, match=r"`rank` must be a number, .*found 'half'"):
        _zip(*models, x=x, rank="half")
    with pytest.raises(fxzip.OptionError, match=r"`rank` needs `refit=.lstsq.`.*found refit='repair'"):
        _zip(*models, x=x, rank=0.5, refit="repair")
    with pytest.raises(fxzip.OptionError, match="Pass unlabelled `data`"):
        fxzip.compile_zip(*models, x[:2], rank=0.5)
    with pytest.raises(fxzip.OptionError, match='`width="auto"` takes `rank` 1 or "auto"'):
        _zip(*models, x=x, rank=0.5, width="auto")
    with pytest.raises(fxzip.InputError, match=r"found '3.conv9'\. Did you mean .*'3\.conv1'"):
        _zip(*models, x=x, rank={"3.conv9": 0.5})
    with pytest.raises(fxzip.CostError, match="cannot be reached"):
        _zip(*models, x=x, rank="auto", max_cost=0.001, budget="flops")

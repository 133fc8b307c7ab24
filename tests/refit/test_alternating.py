"""Free features: where they are allowed, what the alternation finds, and what it is worth."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxzip
from fxzip.refit.least_squares.alternating import FreeTarget, alternate
from fxzip.refit.least_squares.blocks import Blocks
from fxzip.refit.least_squares.dataflow import follow
from fxzip.refit.least_squares.walk import Walk
from fxzip.tracing.calls import Call


def _solver(x: Tensor) -> Callable[[Blocks], Tensor]:
    return lambda t: torch.linalg.lstsq(x.double(), t.whole().double()).solution


def _same(values: Tensor) -> Tensor:
    return values


# alternate ----------------------------------------------------------------------------------------------------------


def test_without_a_nonlinearity_it_is_reduced_rank_regression() -> None:
    """Oracle: the optimum of min ‖(F - X W U) S‖² is the truncated SVD of the fitted values in the metric S Sᵀ."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    features = x @ torch.randn(6, 5, generator=generator, dtype=torch.float64)
    features = features + torch.randn(400, 5, generator=generator, dtype=torch.float64)
    features = features - features.mean(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    fitted = x @ torch.linalg.lstsq(x, features).solution
    _, _, axes = torch.linalg.svd(fitted @ root)
    kept = axes[:2].T @ axes[:2]
    best = ((features @ root - fitted @ root @ kept).square().sum() / (features @ root).square().sum()).item()

    start = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    free = FreeTarget(features, root @ root.T, _same, None)
    _, lost = alternate(x, start, free, _solver(x), 500)
    assert lost[0] > best + 0.05
    assert lost[-1] == pytest.approx(best, abs=5e-3)
    assert lost[-1] > best - 1e-6


@pytest.mark.parametrize("function", [torch.relu, F.gelu, F.hardswish])
def test_what_is_lost_never_grows_and_is_that_of_the_weights(function) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, 8, generator=generator)
    offset = torch.randn(600, 3, generator=generator)
    features = function(x @ torch.randn(8, 6, generator=generator) + offset.repeat(1, 2))
    metric = torch.diag(torch.arange(1.0, 7.0)).double()
    start = torch.randn(8, 3, generator=generator).double()
    free = FreeTarget(features, metric, function, offset)
    weight, lost = alternate(x, start, free, _solver(x), 12)
    assert len(lost) > 3
    assert all(later < earlier for earlier, later in itertools.pairwise(lost))
    assert lost[-1] < 0.9 * lost[0]

    told = function(x @ weight.float() + offset).double()
    told = torch.cat([told, told.new_ones(600, 1)], 1)
    left = features.double() - told @ torch.linalg.lstsq(told, features.double()).solution
    whole = (features - features.mean(0)).double()
    share = (left.square().sum(0) @ metric.diagonal()) / (whole.square().sum(0) @ metric.diagonal())
    assert lost[-1] == pytest.approx(float(share), rel=1e-3)


def test_what_is_told_already_is_left_alone() -> None:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(2))
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(3)).double()
    features = torch.relu(x @ start.float())[:, [0, 2, 1, 1]] * torch.tensor([2.0, 1.0, 0.5, 3.0])
    weight, lost = alternate(x, start, FreeTarget(features, torch.eye(4).double(), torch.relu, None), _solver(x), 5)
    assert torch.equal(weight, start)
    assert len(lost) == 1


def test_features_that_never_vary_ask_for_nothing() -> None:
    start = torch.ones(2, 1).double()
    free = FreeTarget(torch.ones(9, 3), torch.eye(3).double(), torch.relu, None)
    weight, lost = alternate(torch.ones(9, 2), start, free, _solver(torch.ones(9, 2)), 5)
    assert torch.equal(weight, start)
    assert lost == []


# where features are free --------------------------------------------------------------------------------------------


class _Chain(nn.Module):
    """first, what lies in between, last."""

    def __init__(self, between: Callable[[Tensor], Tensor] | nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Conv2d(3, 8, 3, padding=1), between, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def _freedom(net: nn.Module, start: str, fitted: tuple[str, ...] = ("last",)) -> object:
    graph = fx.symbolic_trace(net.eval())
    flow = follow(graph, Call((torch.randn(2, 3, 8, 8),), {}))
    nodes = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    last = {step.node: step.call for step in flow.steps if step.name in ("convolution", "addmm")}
    found = {(nodes[name], last[nodes[name]]) for name in fitted}
    return flow.freedom(nodes[start], 1, found)


def _flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 2))


class _Mixed(nn.Module):
    """conv, then a function of its result with further linear calls."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.last, self.norm, self.how = nn.Conv2d(8, 8, 1), nn.GroupNorm(1, 8), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


FREE = {
    "relu": _Chain(nn.ReLU(), nn.Conv2d(8, 2, 3)),
    "gelu": _Chain(nn.GELU(), nn.Conv2d(8, 2, 1)),
    "relu6 in place": _Chain(nn.ReLU6(inplace=True), nn.Conv2d(8, 2, 1)),
    "nothing": _Chain(nn.Identity(), nn.Conv2d(8, 2, 1)),
    "pool": _Chain(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), nn.Conv2d(8, 2, 1)),
    "sum afterwards": _Mixed(lambda net, x: (h := torch.relu(net.first(x))) + net.last(h)),
    "two functions behind a sum": _Mixed(lambda net, x: net.last(torch.relu(torch.relu(net.first(x)) + net.second(x)))),
    "joined to others": _Mixed(lambda net, x: F.conv2d(torch.cat([torch.relu(net.first(x)), net.second(x)], 1), W16)),
}
W16 = torch.randn(4, 16, 1, 1)
HELD = {
    "returned": _Chain(nn.ReLU(), nn.Identity()),
    "normalised over features": _Chain(nn.GroupNorm(1, 8), nn.Conv2d(8, 2, 1)),
    "softmax": _Chain(nn.Softmax(1), nn.Conv2d(8, 2, 1)),
    "gated": _Mixed(lambda net, x: net.last(net.first(x) * torch.sigmoid(net.first(x)))),
    "returned too": _Mixed(lambda net, x: (h := torch.relu(net.first(x))).mean() + net.last(h)),
    "summed before the function": _Mixed(lambda net, x: net.last(torch.relu(net.first(x) + net.second(x)))),
    "two functions": _Mixed(lambda net, x: net.last(torch.relu(h := net.first(x))) + net.last(torch.tanh(h))),
    "part of them read": _Mixed(lambda net, x: F.conv2d(torch.relu(net.first(x))[:, :4], W4)),
    "joined along places": _Mixed(lambda net, x: net.last(torch.cat([torch.relu(net.first(x)), net.second(x)], 2))),
}
W4 = torch.randn(4, 4, 1, 1)


@pytest.mark.parametrize("name", [name for name in FREE if name not in ("sum afterwards", "joined to others")])
def test_free(name) -> None:
    function = _freedom(FREE[name], "first")
    assert function is not None
    values = torch.linspace(-2, 8, 7)
    kind = {"gelu": F.gelu, "relu6 in place": F.relu6, "nothing": _same}.get(name, torch.relu)
    assert torch.equal(function(values), kind(values))


def test_free_only_where_all_readers_are_fitted() -> None:
    net = FREE["sum afterwards"]
    assert _freedom(net, "first") is None  # the sum is returned
    behind = _Mixed(lambda net, x: net.last((h := torch.relu(net.first(x))) + net.last(h)))
    assert _freedom(behind, "first") is None  # `last` is one module with two calls, of which one is named here
    assert _freedom(FREE["relu"], "first", ()) is None
    assert _freedom(_Chain(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)), "first", ()) is None


@pytest.mark.parametrize("name", HELD)
def test_held(name) -> None:
    fitted = () if name in ("returned", "part of them read") else ("last",)
    assert _freedom(HELD[name], "first", fitted) is None


def test_joined_along_features_is_free_along_places_not() -> None:
    graph = fx.symbolic_trace(FREE["joined to others"].eval())
    flow = follow(graph, Call((torch.randn(2, 3, 8, 8),), {}))
    first = next(node for node in graph.graph.nodes if node.target == "first")
    reader = next((step.node, step.call) for step in flow.steps if step.node.target is F.conv2d)
    assert flow.freedom(first, 1, {reader}) is not None
    assert flow.freedom(first, 2, {reader}) is None


def test_the_sum_behind() -> None:
    graph = fx.symbolic_trace(HELD["summed before the function"].eval())
    flow = follow(graph, Call((torch.randn(2, 3, 8, 8),), {}))
    nodes = {str(node.target): node for node in graph.graph.nodes}
    total = next(node for node in graph.graph.nodes if node.target is operator.add)
    assert flow.sum_behind(nodes["first"]) is total
    assert flow.sum_behind(nodes["second"]) is total
    assert flow.sum_behind(nodes["last"]) is None


# in the refit -------------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class _Net(nn.Module):
    def __init__(self, features: bool = False) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(_Block(8, 8, 1), _Block(8, 12, 2))
        self.head, self.features = nn.Linear(12, 4), features

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.blocks(torch.relu(self.stem(x)))
        logits = self.head(h.mean((2, 3)))
        return (logits, h) if self.features else logits


def _net(seed: int, features: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    net = _Net(features)
    for batch in _data(9, 4):
        net.train()(batch)
    return net.eval()


def _data(seed: int, batches: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 12, 12, generator=generator) for _ in range(batches)]


def _error(zipped: nn.Module, nets: list[nn.Module], x: Tensor) -> float:
    with torch.no_grad():
        found, wanted = zipped(x), [net(x) for net in nets]
    parts = [(f - w).square().sum() / (w - w.mean(0)).square().sum() for f, w in zip(found, wanted, strict=True)]
    return float(sum(parts)) / len(nets)


@pytest.mark.slow
def test_free_features_tell_more_of_convolutions_on_inputs_that_were_not_seen() -> None:
    nets = [_net(0), _net(1)]
    data, unseen = _data(5), torch.cat(_data(77, 4))
    fits = {turns: fxzip.LeastSquares(turns=turns) for turns in (0, 3)}
    errors = {
        k: _error(fxzip.compile_zip(*nets, data[0], data=data, refit=fit, width=1.5), nets, unseen)
        for k, fit in fits.items()
    }
    assert errors[3] < 0.9 * errors[0]


@pytest.mark.slow
def test_a_shortcut_that_is_computed_later_is_made_up_for() -> None:
    """The same network with its identity shortcut as a module, called behind the block, or as the value itself."""

    class Plain(_Block):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))

    nets = [_net(0), _net(1)]
    plain = copy.deepcopy(nets)
    for net in plain:
        net.blocks[0].__class__ = Plain
    data = _data(5)
    for fit in (fxzip.LeastSquares(), fxzip.LeastSquares(turns=0)):
        a, b = (fxzip.compile_zip(*own, data[0], data=data, refit=fit) for own in (nets, plain))
        for one, other in zip(a(data[1]), b(data[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_report_says_how_much_is_lost_where() -> None:
    nets = [_net(0), _net(1)]
    data = _data(5)
    zipped = fxzip.compile_zip(*nets, data[0], data=data)
    [note] = [note for note in zipped.report["notes"] if "features" in note and "is lost in" in note]
    lost = zipped.meta["fxzip_fit"].lost
    assert sorted(lost) == ["blocks_0_conv1", "blocks_0_conv2", "blocks_1_conv1", "blocks_1_conv2", "stem"]
    worst = max(lost, key=lost.__getitem__)
    assert note.startswith("5 of them compute")
    assert f"`{worst}`, {lost[worst]:.1%}" in note


def test_the_smaller_summand_is_fitted_first_and_the_larger_mends_it() -> None:
    nets = [_net(0), _net(1)]
    data = _data(5)
    zipped = fxzip.compile_zip(*nets, data[0], data=data)
    order = zipped.meta["fxzip_fit"].fitted if "fxzip_fit" in zipped.meta else None
    assert order is not None
    assert order.index("blocks_1_shortcut") < order.index("blocks_1_conv2")
    assert order.index("blocks_1_conv1") < order.index("blocks_1_shortcut")


def test_features_that_are_returned_stay_what_the_merge_says() -> None:
    """With the trunk's features among the outputs of the zip nothing behind the last block is free."""
    nets = [_net(0, True), _net(1, True)]
    data = _data(5)
    zipped = fxzip.compile_zip(*nets, data[0], data=data)
    lost = zipped.meta["fxzip_fit"].lost
    assert "blocks_0_conv1" in lost
    assert "blocks_1_conv2" not in lost


def test_a_twin_is_left_exact() -> None:
    net = _net(0).double()
    data = [batch.double() for batch in _data(5)]
    zipped = fxzip.compile_zip(net, copy.deepcopy(net), data[0], data=data)
    x = data[1]
    for own in zipped(x):
        torch.testing.assert_close(own, net(x), atol=1e-8, rtol=1e-8)


def test_few_positions_are_not_free() -> None:
    nets = [_net(0), _net(1)]
    data = _data(5, 1)
    zipped = fxzip.compile_zip(*nets, data[0][:2], data=[data[0][:2]])
    assert "blocks_1_conv2" not in zipped.meta["fxzip_fit"].lost


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_reason_to_lose_anything(dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    x = 30 * torch.randn(3000, 4, generator=generator)
    features = torch.relu(x @ torch.randn(4, 6, generator=generator))
    start = torch.randn(4, 3, generator=generator).double()
    x, features = x.to(dtype), features.to(dtype)
    free = FreeTarget(features, torch.eye(6).double(), torch.relu, None)
    _, lost = alternate(x, start, free, _solver(x), 6)
    _, exact = alternate(
        x.double(), start, FreeTarget(features.double(), torch.eye(6).double(), torch.relu, None), _solver(x), 6
    )
    assert len(lost) > 3
    assert lost[-1] == pytest.approx(exact[-1], abs=5e-3)


def test_a_function_that_overflows_ends_the_search() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(500, 4, generator=generator)
    features = torch.exp(x @ torch.randn(4, 6, generator=generator))
    start = torch.randn(4, 3, generator=generator).double()

    def explode(values: Tensor) -> Tensor:
        return torch.exp(20 * values)

    weight, lost = alternate(x, start, FreeTarget(features, torch.eye(6).double(), explode, None), _solver(x), 6)
    assert torch.equal(weight, start)
    assert lost == []
    weight, lost = alternate(x, 1e-2 * start, FreeTarget(features, torch.eye(6).double(), explode, None), _solver(x), 6)
    assert bool(weight.isfinite().all())
    assert all(later < earlier for earlier, later in itertools.pairwise(lost))


def test_maxima_and_sums_over_features_hold_them() -> None:
    assert _freedom(_Chain(nn.MaxPool2d(2), nn.Conv2d(8, 2, 1)), "first") is None
    assert _freedom(_Chain(nn.AvgPool2d(2), nn.Conv2d(8, 2, 1)), "first") is not None
    over_features = _Mixed(
        lambda net, x: net.last(torch.relu(net.first(x)).mean(1, keepdim=True).expand(-1, 8, -1, -1))
    )
    assert _freedom(over_features, "first") is None
    over_places = _Mixed(lambda net, x: net.last(torch.relu(net.first(x)).mean((2, 3), keepdim=True)))
    assert _freedom(over_places, "first") is not None


def test_many_sums_take_no_longer_than_there_are() -> None:
    """Two ways from each sum to the next, 40 times; and more sums than Python recurses."""

    def ladder(net: nn.Module, x: Tensor) -> Tensor:
        h = torch.relu(net.first(x))
        for _ in range(40):
            h = h + F.avg_pool2d(h, 3, 1, 1)
        return net.last(h)

    def chain(net: nn.Module, x: Tensor) -> Tensor:
        h = start = torch.relu(net.first(x))
        for _ in range(1200):
            h = h + start
        return net.last(h)

    assert _freedom(_Mixed(ladder), "first") is not None
    assert _freedom(_Mixed(chain), "first") is not None


def test_small_features_are_told_as_well_as_large_ones() -> None:
    """A twin whose hidden features differ in size by a thousand, read by weights that make up for it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    sizes = 10 ** torch.linspace(-1.5, 1.5, 16, dtype=torch.float64)
    with torch.no_grad():
        net[0].weight.mul_(sizes[:, None])
        net[0].bias.mul_(sizes)
        net[2].weight.div_(sizes)
    data = [torch.randn(64, 12, dtype=torch.float64) for _ in range(6)]
    twin = fxzip.relabel(net, data[0], seed=1)
    zipped = fxzip.compile_zip(net, twin, data[0], data=data)
    for own in zipped(data[1]):
        torch.testing.assert_close(own, net(data[1]), atol=1e-9, rtol=1e-9)


def test_a_shared_call_is_not_computed_ahead_of_its_fit(monkeypatch) -> None:
    """a(p) + s(p), where s is fitted at an earlier call on something else than the sum."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.s = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            p = torch.relu(self.stem(x))
            a, b, c = self.a(p), self.s(torch.tanh(p)), self.s(p)
            return self.left(torch.relu(a + c)) + self.right(torch.relu(b))

    torch.manual_seed(0)
    nets = [Net().eval() for _ in range(2)]
    data = [torch.randn(128, 6) for _ in range(4)]
    zipped = fxzip.compile_zip(*nets, data[0], data=data)
    ahead = Walk._summand
    monkeypatch.setattr(
        Walk, "_summand", lambda self, part, *rest: None if part.name == "trunk" else ahead(self, part, *rest)
    )
    plain = fxzip.compile_zip(*nets, data[0], data=data)
    for one, other in zip(zipped(data[1]), plain(data[1]), strict=True):
        assert torch.equal(one, other)


def test_a_reader_with_fewer_positions_than_inputs_holds_features() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.fc(torch.relu(self.conv(x)).flatten(1))))

    torch.manual_seed(0)
    nets = [Net().eval() for _ in range(2)]
    data = [torch.randn(100, 3, 8, 8) for _ in range(3)]
    few = fxzip.compile_zip(*nets, data[0][:2], data=data[:1], hold_out=False).meta["fxzip_fit"].lost
    enough = fxzip.compile_zip(*nets, data[0][:2], data=data, hold_out=False).meta["fxzip_fit"].lost
    assert "conv" not in few
    assert "conv" in enough

"""One call for all heads: the same function, head by head, and no call that is not known to give it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import randomise
from models.random_networks import random_network
from models.zoo import ZOO
from torch import nn

import fxzip
from fxzip.ops import join_heads, linear_heads, norm_heads, part_heads, turn_heads
from fxzip.rewriting.batching import PART, batchable, emitted, padded, rules, values_of
from fxzip.rewriting.module import part_of
from fxzip.tracing.calls import Call, as_call, batch_size, with_batch
from fxzip.tracing.containers import leaves

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def apart(model, sample, heads=3):
    """Heads with other parameters each, in float64."""
    models = [randomise(copy.deepcopy(model), k).double() for k in range(heads)]
    return fxzip.side_by_side(models, sample)


def together(network, sample, axes=(0, 1)):
    calls = batchable(network, values_of(network, as_call(sample)), axes)
    return emitted(network, calls), [call.site.node for call in calls]


def assert_same(found, wanted, call):
    for size in (batch_size(call), 1, 7):
        other = with_batch(call, size)
        mine, theirs = (leaves([own(*other.args, **other.kwargs)]) for own in (found, wanted))
        for value, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


class Block(nn.Module):
    def __init__(self, width, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.GroupNorm(2, width)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def images(classes=5, groups=1):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Block(4, groups), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(36, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, classes),
    )  # fmt: skip


def rows(classes=5):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, classes))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("axes", [(0, 1), (0,), (1,)])
def test_heads_give_what_they_give_apart(groups, heads, axes):
    network = apart(images(groups=groups), IMAGE, heads)
    found, calls = together(network, IMAGE, axes)
    assert len(calls) == {(0, 1): 16, (0,): 4, (1,): 12}[axes]
    assert_same(found, network, as_call(IMAGE))
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in network.parameters())


def test_the_last_calls_stay_apart_where_numbers_of_classes_differ():
    models = [randomise(rows(classes), k).double() for k, classes in enumerate((2, 3, 4))]
    network = fxzip.side_by_side({"a": models[0], "b": models[1], "c": models[2]}, ROWS)
    found, calls = together(network, ROWS)
    assert [node.name for node in calls] == ["_0", "_1", "_2", "_3"]
    assert list(found(ROWS)) == ["a", "b", "c"]
    assert_same(found, network, as_call(ROWS))


TOGETHER = {
    "mlp": 5,
    "resnet": 38,
    "squeeze_excite": 15,
    "attention_packed": 25,
    "attention_rotary": 30,
    "mixer": 14,
    "view": 6,
}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.thinned(3)
def test_networks_of_the_zoo(name):
    model, sample = ZOO[name]()
    call = as_call(sample)
    call = Call(tuple(v.double() if v.is_floating_point() else v for v in call.args), {})
    network = apart(model, call.args)
    found, calls = together(network, call)
    assert len(calls) >= TOGETHER.get(name, 0)
    assert_same(found, network, call)
    for k in range(3):
        assert_same(found.single(k), network.single(k), call)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_networks(first):
    made = 0
    for seed in range(first, first + 20):
        model, sample = random_network(seed)
        network = apart(model, sample.double(), 2)
        found, calls = together(network, sample.double())
        assert_same(found, network, as_call(sample.double()))
        made += len(calls)
    assert made > 60


def test_features_of_a_zip_are_given_back_by_one_table():
    models = [randomise(images(), k) for k in range(3)]
    sample = IMAGE.float()
    network = fxzip.compile_zip(models, sample, until="2", method="zip", refit=None, hold_out=False, progress=False)
    found, _ = together(network, sample)
    given_back = [node for node in found.graph.nodes if node.target is fxzip.ops.unmerge]
    assert len(given_back) == 1
    assert part_of(given_back[0]) == PART
    for value, expected in zip(found(sample), network(sample), strict=True):
        torch.testing.assert_close(value, expected)
    for k in range(3):
        torch.testing.assert_close(found.single(k)(sample), network.single(k)(sample))


def test_what_is_not_taken_together_is_the_same_to_the_bit():
    network = apart(images(), IMAGE)
    found = emitted(network, [])
    assert all(map(torch.equal, found(IMAGE), network(IMAGE)))
    assert [node.name for node in found.graph.nodes] == [node.name for node in network.graph.nodes]
    assert found.state_dict().keys() == network.state_dict().keys()


def test_the_network_itself_stays_as_it_is():
    network = apart(images(), IMAGE)
    before, code = copy.deepcopy(network.state_dict()), network.code
    writes = [(name, own.inplace) for name, own in network.named_modules() if isinstance(own, nn.ReLU)]
    together(network, IMAGE)
    assert code == network.code
    assert writes == [(name, own.inplace) for name, own in network.named_modules() if isinstance(own, nn.ReLU)]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_one_head_has_its_part_of_the_parameters():
    network = apart(images(groups=2), IMAGE)
    found, _ = together(network, IMAGE)
    memory = {p.untyped_storage().data_ptr() for p in found.parameters()}
    for k in range(3):
        alone, wanted = found.single(k), network.single(k)
        torch.testing.assert_close(alone(IMAGE), wanted(IMAGE), rtol=1e-9, atol=1e-11)
        assert sum(p.numel() for p in alone.parameters()) == sum(p.numel() for p in wanted.parameters())
        assert {p.untyped_storage().data_ptr() for p in alone.parameters()} <= memory
    torch.testing.assert_close(found(IMAGE), network(IMAGE), rtol=1e-9, atol=1e-11)  # nothing of it has changed


def test_gradients_and_statistics_in_train_mode():
    network = apart(images(), IMAGE)
    found, _ = together(network, IMAGE)
    for own in (network, found):
        own.train()
        sum(value.square().mean() * (k + 1) for k, value in enumerate(own(IMAGE))).backward()
    mine, theirs = (dict(own.named_parameters()) for own in (found, network))
    for name in ("0.weight", "3.conv1.weight", "3.bn1.bias", "3.bn2.weight"):
        wanted = torch.cat([theirs[f"head_{k}.{name}"].grad for k in range(3)])
        torch.testing.assert_close(mine[f"batched.{name}"].grad, wanted, rtol=1e-9, atol=1e-11)
    for name in ("6.weight", "6.bias", "7.weight", "7.bias"):
        wanted = torch.stack([theirs[f"head_{k}.{name}"].grad for k in range(3)])
        torch.testing.assert_close(mine[f"batched.{name}"].grad, wanted, rtol=1e-9, atol=1e-11)
    wanted = torch.cat([network.get_submodule(f"head_{k}.3.bn1").running_var for k in range(3)])
    torch.testing.assert_close(found.get_submodule("batched.3.bn1").running_var, wanted)
    torch.testing.assert_close(found.eval()(IMAGE), network.eval()(IMAGE), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (lambda x: x - x.mean(0), 1),
        (lambda x: x.softmax(0), 1),
        (lambda x: x.flatten(), 1),
        (lambda x: x.transpose(0, 1), 2),
        (lambda x: x.cumsum(1), 1),
        (lambda x: x.relu() + 1, 3),
        (lambda x: x.softmax(1) * 2, 3),
        (lambda x: x.view(x.size(0), -1), 2),
        (lambda x: x.view(x.shape[0], -1), 2),
        (lambda x: x.view(-1, 4), 1),
        (lambda x: x.sum(), 1),
    ],
)
def test_calls_that_mix_inputs_or_are_not_known_stay_apart(function, calls):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 8)

        def forward(self, x):
            return function(self.linear(x))

    network = apart(Mixing(), ROWS)
    found, made = together(network, ROWS)
    assert len(made) == calls
    for value, expected in zip(found(ROWS), network(ROWS), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


def tied(model):
    model[2].weight = model[0].weight


def frozen(model):
    model[0].requires_grad_(False)


def without_bias(model):
    model[0].bias = None


@pytest.mark.parametrize(("change", "left"), [(tied, []), (frozen, ["_2"]), (without_bias, ["_2"])])
def test_what_one_head_does_otherwise_stays_apart(change, left):
    """Heads that are alike further on run together from there."""
    models = [randomise(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), k) for k in range(2)]
    change(models[1])
    network = fxzip.side_by_side(models, ROWS.float())
    found, made = together(network, ROWS.float())
    assert [node.name for node in made] == left
    torch.testing.assert_close(found(ROWS.float()), network(ROWS.float()))


def test_calls_with_hooks_stay_apart():
    network = apart(rows(), ROWS)
    network.get_submodule("head_1.0").register_forward_hook(lambda module, given, result: 2 * result)
    found, made = together(network, ROWS)
    assert [node.name for node in made] == ["_2", "_3", "_4"]
    torch.testing.assert_close(found(ROWS), network(ROWS))


def test_calls_with_hooks_of_gradients_stay_apart():
    network, called = apart(rows(), ROWS), []
    network.get_submodule("head_1.4").register_full_backward_hook(lambda *given: called.append(given))
    found, made = together(network, ROWS)
    assert [node.name for node in made] == ["_0", "_1", "_2", "_3"]
    sum(value.sum() for value in found(ROWS)).backward()
    assert len(called) == 1


def test_one_network_twice_stays_apart():
    """Its parameters are those of both heads."""
    network = fxzip.side_by_side([rows(), rows()], ROWS.float())
    network.head_1 = network.head_0
    assert batchable(network, values_of(network, as_call(ROWS.float()))) == []


def test_heads_that_write_in_place_stay_apart():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 8)

        def forward(self, x):
            y = self.linear(x)
            y[:, 0] = 0
            return y

    network = apart(Writing(), ROWS)
    assert together(network, ROWS)[1] == []


def test_a_wrong_rule_shows(monkeypatch):
    """A test of the tests: a call that mixes the inputs of a batch, said to treat them one by one."""
    wrong = {**rules.FUNCTIONS, "cumsum": rules.Rule(lambda site: (0,))}
    monkeypatch.setattr(rules, "FUNCTIONS", wrong)

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 8)

        def forward(self, x):
            return self.linear(x).cumsum(0)

    network = apart(Mixing(), ROWS)
    found, _ = together(network, ROWS)
    with pytest.raises(AssertionError):
        assert_same(found, network, as_call(ROWS))
    with pytest.raises(fxzip.FxzipError, match="must give what they give apart; on a batch of 4, the output differs"):
        fxzip.batch_heads(network, ROWS, timed=False)


class Narrow(nn.Module):
    """A residual block with few features inside."""

    def __init__(self, inner):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def narrowed(inner, width, rows, classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), Narrow(inner), nn.Conv2d(4, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4 * width, rows), nn.GELU(), nn.Linear(rows, classes),
    )  # fmt: skip


SIZES = ((5, 6, 7, 2), (7, 5, 9, 3), (3, 6, 6, 4))


def of_other_widths():
    models = [randomise(narrowed(*sizes), k).double() for k, sizes in enumerate(SIZES)]
    return fxzip.side_by_side(models, IMAGE)


def test_heads_of_other_widths_get_zeros():
    network = of_other_widths()
    assert [node.name for node in together(network, IMAGE)[1]] == ["_0", "_1_bn2", "add", "relu_1"]
    wider = padded(network, values_of(network, as_call(IMAGE)))
    assert_same(wider, network, as_call(IMAGE))
    assert [wider.get_submodule(f"head_{k}.1.conv1").weight.shape[0] for k in range(3)] == [7, 7, 7]
    assert [wider.get_submodule(f"head_{k}.9").weight.shape for k in range(3)] == [(2, 9), (3, 9), (4, 9)]
    found, calls = together(wider, IMAGE)
    assert [node.name for node in calls[-3:]] == ["_6", "_7", "_8"]
    assert len(calls) == 15
    assert_same(found, network, as_call(IMAGE))
    for k in range(3):
        assert_same(found.single(k), network.single(k), as_call(IMAGE))


def test_zeros_stay_zeros_in_training():
    network = of_other_widths()
    wider = padded(network, values_of(network, as_call(IMAGE)))
    found, _ = together(wider, IMAGE)
    for _ in range(3):
        for own in (network, found):
            own.train()
            own.zero_grad()
            sum(value.square().mean() for value in own(IMAGE)).backward()
            with torch.no_grad():
                for p in own.parameters():
                    p -= 0.05 * p.grad
    assert_same(found.eval(), network.eval(), as_call(IMAGE))


def wide(function=lambda x: x, width=6, *, layer=nn.Linear):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = layer(6, width), nn.Linear(width, 3)

        def forward(self, x):
            return self.last(function(self.first(x)))

    return Wide()


@pytest.mark.parametrize(
    ("function", "wider"),
    [
        (F.relu, True),
        (lambda x: x * F.silu(x), True),
        (lambda x: torch.tanh(x) - F.gelu(x), True),
        (torch.sigmoid, False),
        (lambda x: x + 1, False),
        (torch.cos, False),
        (lambda x: x.softmax(1), False),
        (lambda x: x / x.norm(dim=1, keepdim=True), False),
        (lambda x: x - x.mean(1, keepdim=True), False),
        (lambda x: x.flip(1), False),
        (lambda x: x * x[:, :1], False),
    ],
)
def test_zeros_go_only_through_what_gives_zeros_for_them(function, wider):
    models = [randomise(wide(function, width), width).double() for width in (5, 7)]
    network = fxzip.side_by_side(models, ROWS)
    found = padded(network, values_of(network, as_call(ROWS)))
    assert (found is not None) == wider
    assert_same(found or network, network, as_call(ROWS))


def test_features_that_are_returned_get_no_zeros():
    class Two(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first, self.last = nn.Linear(6, width), nn.Linear(width, 3)

        def forward(self, x):
            y = self.first(x)
            return y, self.last(y)

    network = fxzip.side_by_side([randomise(Two(width), width).double() for width in (5, 7)], ROWS)
    assert padded(network, values_of(network, as_call(ROWS))) is None


def test_layers_with_hooks_and_tied_ones_get_no_zeros():
    for change in (
        lambda network: network.head_1.first.register_forward_hook(lambda module, given, result: result + 1),
        lambda network: setattr(network.head_1, "again", network.head_1.last),
    ):
        network = fxzip.side_by_side([randomise(wide(width=width), width).double() for width in (5, 7)], ROWS)
        change(network)
        assert padded(network, values_of(network, as_call(ROWS))) is None


@pytest.mark.parametrize("size", [0, 1, 5])
def test_operations(size):
    values = tuple(torch.randn(size, 4, 3) for _ in range(3))
    for axis in (0, 1):
        whole = join_heads(values, axis)
        assert all(map(torch.equal, part_heads(whole, 3, axis), values))
        assert torch.equal(turn_heads(whole, 3, axis, 1 - axis), join_heads(values, 1 - axis))
    weight, bias = torch.randn(3, 5, 3), torch.randn(3, 5)
    for own in (bias, None):
        wanted = [
            F.linear(v, w, None if own is None else own[k]) for k, (v, w) in enumerate(zip(values, weight, strict=True))
        ]
        found = part_heads(linear_heads(join_heads(values, 0), weight, own), 3, 0)
        torch.testing.assert_close(list(found), wanted)
        shared = linear_heads(values[0], weight, own, shared=True)
        first = [F.linear(values[0], w, None if own is None else own[k]) for k, w in enumerate(weight)]
        torch.testing.assert_close(list(part_heads(shared, 3, 0)), first)
    scale, shift = torch.randn(3, 4, 3), torch.randn(3, 4, 3)
    for own in (shift, None):
        each = zip(values, scale, shift, strict=True)
        wanted = [F.layer_norm(v, (4, 3), s, None if own is None else b) for v, s, b in each]
        found = part_heads(norm_heads(join_heads(values, 0), scale, own, 1e-5), 3, 0)
        torch.testing.assert_close(list(found), wanted)


def test_values_of_other_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"need values of one shape; found \(2, 3\), \(2, 4\)"):
        join_heads((torch.ones(2, 3), torch.ones(2, 4)), 1)

"""Model soups against brute force, and greedy's path against one worked out by hand."""

import copy
from itertools import combinations

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn

import fxzip


def point(*values):
    """A network that is its weight."""
    model = nn.Linear(len(values), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values], dtype=torch.float64))
    return model


POINTS = [(1.0, 0.0), (0.0, 1.2), (-1.0, 0.1), (0.2, -0.4)]
MODELS = [point(*p) for p in POINTS]


def near(*target):
    goal = torch.tensor([target], dtype=torch.float64)
    return lambda network: -float((network.weight.detach() - goal).norm())


def mean(chosen):
    return torch.tensor([POINTS[i] for i in chosen], dtype=torch.float64).mean(0, keepdim=True)


def test_uniform_is_the_mean():
    found = fxzip.soup(MODELS)
    torch.testing.assert_close(found.weight.data, mean(range(4)), rtol=0, atol=1e-15)
    assert found.fxzip_soup.models == (0, 1, 2, 3)
    assert found.fxzip_soup.scores == ()
    assert fxzip.soup(MODELS, score=near(0, 0)).fxzip_soup.scores == pytest.approx([-float(mean(range(4)).norm())])


def test_greedy_path_by_hand():
    """Target (0, 0.1). Distances alone: √1.01, 1.1, 1, √0.29: order 3, 2, 0, 1.
    3: √0.29 = 0.539. With 2: mean (-0.4, -0.15), √(0.16 + 0.0625) = 0.472, better: kept.
    With 0: mean (0.0667, -0.1), √(0.00444 + 0.04) = 0.211, better: kept.
    With 1: mean (0.05, 0.225), √(0.0025 + 0.015625) = 0.135, better: kept."""
    found = fxzip.soup(MODELS, kind="greedy", score=near(0, 0.1)).fxzip_soup
    assert found.models == (3, 2, 0, 1)
    assert found.alone == pytest.approx((-(1.01**0.5), -1.1, -1.0, -(0.29**0.5)))
    assert found.scores == pytest.approx((-(0.29**0.5), -(0.2225**0.5), -((0.04 / 9 + 0.04) ** 0.5), -(0.018125**0.5)))


def test_greedy_leaves_out_what_does_not_help():
    """Target (0.2, -0.4), which is network 3: the order is 3, 0, 2, 1, and no mean comes as near."""
    found = fxzip.soup(MODELS, kind="greedy", score=near(0.2, -0.4))
    assert found.fxzip_soup.models == (3,)
    torch.testing.assert_close(found.weight.data, MODELS[3].weight.data)


def test_what_scores_as_well_comes_in():
    """Recipe 1 keeps a network if the score is at least that without it; networks that score alike stay in order."""
    found = fxzip.soup(MODELS, kind="greedy", score=lambda network: 0.5)
    assert found.fxzip_soup.models == (0, 1, 2, 3)


@pytest.mark.parametrize("seed", range(20))
def test_greedy_against_all_soups(seed):
    """Of all 15 soups of 4 networks: greedy's is the one that its rule leads to among them."""
    target = torch.randn(2, generator=torch.Generator().manual_seed(seed)).tolist()
    score = near(*target)
    table = {
        frozenset(chosen): score(point(*mean(chosen)[0].tolist()))
        for size in range(1, 5)
        for chosen in combinations(range(4), size)
    }
    assert len(table) == 15
    order = sorted(range(4), key=lambda i: -table[frozenset({i})])
    kept = frozenset(order[:1])
    for i in order[1:]:
        kept = kept | {i} if table[kept | {i}] >= table[kept] else kept
    found = fxzip.soup(MODELS, kind="greedy", score=score)
    assert frozenset(found.fxzip_soup.models) == kept
    assert score(found) == pytest.approx(table[kept])
    assert max(table.values()) + 1e-12 >= score(found) >= max(table[frozenset({i})] for i in range(4)) - 1e-12


def test_a_soup_of_whole_networks():
    models = [randomise(Residual(4), seed) for seed in range(3)]
    models[0].train()
    x = torch.randn(4, 3, 8, 8)
    before = copy.deepcopy([m.state_dict() for m in models])
    found = fxzip.soup(models, x)
    assert not found.training
    assert models[0].training
    assert isinstance(found, Residual)
    for name, value in found.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([own[name] for own in before]).mean(0))
    for model, own in zip(models, before, strict=True):
        assert all(torch.equal(v, own[n]) for n, v in model.state_dict().items())
    same = fxzip.soup([models[0]] * 4)
    torch.testing.assert_close(same(x), copy.deepcopy(models[0]).eval()(x))


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.decode = nn.Linear(3, 5, bias=False)
            self.decode.weight = self.embed.weight

    a, b = Tied(), Tied()
    found = fxzip.soup([a, b])
    assert found.decode.weight is found.embed.weight
    torch.testing.assert_close(found.embed.weight, (a.embed.weight + b.embed.weight) / 2)


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.first(x).relu())


class Another(Other):
    def forward(self, x):
        return self.last(self.first(x).tanh())


@pytest.mark.parametrize(("models", "message"), [
    ([Residual(4), Residual(5)], r"`linear.weight` has the shapes \(4, 16\) and \(5, 16\) in the first and model 1. "
     r'For heads of their own use `compile_zip\(..., method="average"\)`.'),
    ([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)], "the first has `bias` and the other has not"),
    ([nn.Linear(2, 2, bias=False), nn.Linear(2, 2)], "model 1 has `bias` and the other has not"),
    ([nn.Linear(2, 2)], "`soup` needs at least two models; found 1"),
])  # fmt: skip
def test_networks_that_are_not_of_one_architecture(models, message):
    with pytest.raises(fxzip.InputError, match=message):
        fxzip.soup(models)


def test_graphs_that_part_are_seen_with_a_sample():
    models = [Other(), Another()]
    assert fxzip.soup(models) is not None
    with pytest.raises(fxzip.InputError, match="the graphs of the first and model 1 part: the first calls `relu`"):
        fxzip.soup(models, torch.randn(2, 4))


def test_integers_that_are_no_counts_must_agree():
    models = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for shift, model in enumerate(models):
        model.register_buffer("order", torch.arange(3) + shift)
    with pytest.raises(fxzip.InputError, match="`order`, which holds no floats, has other values in model 1"):
        fxzip.soup(models)


@pytest.mark.parametrize(("settings", "message"), [
    ({"kind": "greedy"}, '`kind="greedy"` needs a `score`: a function that takes a network'),
    ({"kind": "learned"}, "`kind` must be one of 'uniform', 'greedy'; found 'learned'."),
    ({"kind": "greedy", "score": lambda network: None}, "`score` must return a number, greater is better; found None."),
    ({"kind": "greedy", "score": lambda network: float("nan")}, "found nan"),
])  # fmt: skip
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises((fxzip.InputError, fxzip.OptionError), match=message):
        fxzip.soup(MODELS, **settings)

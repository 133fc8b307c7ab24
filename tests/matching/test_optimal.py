"""The best pairs of all features: against all pairings."""

import pytest
import torch
from test_matching import features, observed, shuffle
from torch import nn

import fxzip
from fxzip.matching import Optimal, Permute, similarity
from fxzip.matching.moments import moments


def pairings(items):
    """All ways to join an even number of items in pairs."""
    if not items:
        yield []
        return
    first, *rest = items
    for other in rest:
        yield from ([(first, other), *more] for more in pairings([i for i in rest if i != other]))


def total(alike, labels):
    groups = [(labels == c).nonzero().flatten().tolist() for c in labels.unique()]
    return sum(float(alike[i, j]) for i, j in groups)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_best_of_all_pairings_of_eight_features(seed):
    statistics = observed(4, 4, seed=seed)
    alike = similarity(statistics)
    values = [sum(float(alike[i, j]) for i, j in pairs) for pairs in pairings(list(range(8)))]
    assert len(values) == 105
    merge = Optimal()(statistics, 4)
    assert total(alike, merge.labels()) == pytest.approx(max(values), abs=1e-9)
    assert merge.correlation == pytest.approx(max(values) / 4, abs=1e-9)


def greedy(alike):
    """Total of pairs that are joined one after the other, the likest first."""
    left, value = alike.clone().fill_diagonal_(-torch.inf), 0.0
    for _ in range(len(alike) // 2):
        i, j = divmod(int(left.argmax()), len(alike))
        value += float(alike[i, j])
        left[[i, j]] = left[:, [i, j]] = -torch.inf
    return value


def test_it_is_better_than_the_best_pairs_across_models_and_than_greedy_pairs():
    statistics = observed(20, 20, seed=3)
    alike = similarity(statistics)
    best = total(alike, Optimal()(statistics).labels())
    assert best > total(alike, Permute()(statistics).labels())
    assert best > greedy(alike)


def test_features_of_one_model_may_be_joined():
    x, y = features(2, 2)
    close = moments([x[:, [0, 0]] + 0.01 * y, y[:, [1, 1]] + 0.01 * x])
    assert Optimal()(close).labels().tolist() == [0, 0, 1, 1]


def test_relabelled_twins_are_recovered():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)), torch.randn(99, 4)
    (own,) = features(7)
    torch.testing.assert_close(Optimal()(moments([own, own[:, shuffle(7)]])).assignment(1), shuffle(7))
    for output in fxzip.compile_zip(net, fxzip.relabel(net, x), x, data=[x], method="optimal", refit=None)(x):
        torch.testing.assert_close(output, net(x), atol=1e-5, rtol=1e-5)


def matchings(items, pairs):
    """All ways to join so many pairs, the rest alone."""
    if not pairs:
        yield []
    elif len(items) >= 2 * pairs:
        first, *rest = items
        yield from matchings(rest, pairs)
        for other in rest:
            yield from ([(first, other), *more] for more in matchings([i for i in rest if i != other], pairs - 1))


@pytest.mark.parametrize(("sizes", "size"), [((3, 3), 4), ((4, 2), 4), ((2, 2, 2), 3), ((5,), 3)])
def test_more_than_half_leaves_features_alone(sizes, size):
    statistics = observed(*sizes, seed=2)
    alike = similarity(statistics)
    count = sum(sizes)
    values = [sum(float(alike[p]) for p in pairs) for pairs in matchings(list(range(count)), count - size)]
    labels = Optimal()(statistics, size).labels()
    members = [(labels == c).nonzero().flatten().tolist() for c in range(size)]
    assert all(1 <= len(own) <= 2 for own in members)
    assert sum(float(alike[tuple(own)]) for own in members if len(own) == 2) == pytest.approx(max(values), abs=1e-9)


@pytest.mark.parametrize(("sizes", "size"), [((3, 3), 2), ((3, 3, 3), 4), ((4, 2), 7)])
def test_sizes_that_pairs_cannot_give(sizes, size):
    total = sum(sizes)
    message = f"of the {total} features it keeps {-(-total // 2)} to {total}; got `size` {size}"
    with pytest.raises(fxzip.OptionError, match=message):
        Optimal()(observed(*sizes), size)

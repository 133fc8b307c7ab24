"""Numbers of places: the second result of `max` along features, and what is computed with it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.analysis import relative_difference

X = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers, a function of their features, and a head or what the function gives."""

    def __init__(self, function, *, last):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.function, self.last = function, last

    def forward(self, x):
        h = torch.relu(self.second(torch.relu(self.first(x))))
        return self.function(self.head(h)) if self.last else self.head(self.function(h))


def net(function, *, last=False):
    torch.manual_seed(0)
    return Net(function, last=last).double().eval()


def only_values(h):
    values, _ = h.view(-1, 12, 2).max(-1)
    return values


RETURNED = {
    "max": lambda y: y.max(1),
    "min": lambda y: y.min(1),
    "places alone": lambda y: y.max(1)[1],
    "by name": lambda y: y.min(1, keepdim=True).indices,
}
USED = {
    "one-hot": lambda h: h + F.one_hot(h.max(1)[1], 12).to(h.dtype),
    "compared": lambda h: h * (h.max(1, keepdim=True).indices > 5),
    "taken": lambda h: h + torch.arange(12, dtype=h.dtype)[h.min(1).indices][:, None],
}
NOT_USED = {
    "values": lambda h: h - h.max(1, keepdim=True).values,
    "values, unpacked": lambda h: torch.cat([h, only_values(torch.cat([h, -h], 1))[:, :0]], 1),
    "along another axis": lambda h: h + h[None].max(0).indices,
}


@pytest.mark.parametrize("name", RETURNED)
def test_places_that_are_returned_are_the_model_s(name):
    model = net(RETURNED[name], last=True)
    assert [space.size for space in fxzip.inspect(model, X, verify=False).spaces] == [12, 12]
    twin = fxzip.relabel(model, X[:4], seed=1)
    zipped = fxzip.compile_zip(model, twin, X[:4], data=[X], method="permute", refit=None, progress=False)
    for found in (twin(X), *zipped(X)):
        assert relative_difference(tuple(model(X)), tuple(found)) <= 1e-12


@pytest.mark.parametrize("name", USED)
def test_where_places_are_used_features_keep_theirs(name):
    model = net(USED[name])
    found = fxzip.inspect(model, X)
    assert [space.size for space in found.spaces] == [12]
    assert any("depends on the order of features" in reason for reason in found.fixed.values())


@pytest.mark.parametrize("name", NOT_USED)
def test_where_they_are_not_used_features_move(name):
    assert [space.size for space in fxzip.inspect(net(NOT_USED[name]), X).spaces] == [12, 12]


class Shuffled(nn.Module):
    """Grouped convolutions around a channel shuffle: two blockings with equally many blocks across each other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.d, self.e = (nn.Conv2d(8, 8, 3, padding=1, groups=2) for _ in range(2))
        self.c, self.shuffle, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.ChannelShuffle(2), nn.Linear(8, 3)

    def forward(self, x):
        h = self.e(self.shuffle(self.d(torch.relu(self.b(torch.relu(self.a(x)))))))
        return self.head(torch.relu(self.c(h)).mean((2, 3)))


@pytest.mark.parametrize("seed", range(3))
def test_of_blockings_across_each_other_a_trunk_gives_up_the_one_that_the_network_does(seed):
    torch.manual_seed(0)
    model = Shuffled().double().eval()
    x = torch.randn(24, 3, 8, 8, dtype=torch.float64)
    twin = fxzip.relabel(model, x[:4], seed=seed)
    zipped = fxzip.compile_zip(model, twin, x[:4], data=[x], method="permute", refit=None, progress=False)
    for found in zipped(x):
        assert relative_difference(model(x), found) <= 1e-12

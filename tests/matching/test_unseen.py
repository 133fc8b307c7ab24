"""Features that no data shows, or shows too little of: matched by their weights, so that a zip with a relabelled copy
is the network itself, on any input."""

from itertools import pairwise

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn
from torch.nn import functional as F

import fxzip
from fxzip.matching import Permute, marks, similarity
from fxzip.matching.moments import moments


def weight(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.4)


class LinearOnParameter(nn.Module):
    """Prompts through a small network, their sum added to the features."""

    def __init__(self):
        super().__init__()
        self.q = weight(5, 16)
        self.p = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.i, self.h = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.h(torch.relu(self.i(x)) + self.p(self.q).sum(0))


class LowRank(nn.Module):
    def __init__(self, ranks=(16, 5, 6)):
        super().__init__()
        self.factors = nn.ParameterList([weight(a, b) for a, b in pairwise(ranks)])
        self.b, self.h = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        kernel = self.factors[0]
        for factor in list(self.factors)[1:]:
            kernel = kernel @ factor
        return self.h(torch.relu(self.b(torch.relu(x @ kernel.t()))))


class WeightLoRA(nn.Module):
    """W + B A as a parametrisation written by hand."""

    def __init__(self):
        super().__init__()
        self.l, self.a, self.b, self.h = nn.Linear(6, 16), weight(4, 6), weight(16, 4), nn.Linear(16, 3)

    def forward(self, x):
        return self.h(torch.relu(F.linear(x, self.l.weight + self.b @ self.a, self.l.bias)))


class ConvLoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.a, self.b = nn.Conv2d(2, 8, 1), weight(4, 8, 3, 3), weight(8, 4)
        self.h = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.i(x.view(-1, 2, 3, 1).expand(-1, 2, 3, 3)))
        kernel = torch.einsum("or,rikl->oikl", self.b, self.a)
        return self.h(F.conv2d(x, kernel, padding=1).relu().mean((2, 3)))


class Pooling(nn.Module):
    """Attention pooling: learned queries ask the tokens."""

    def __init__(self):
        super().__init__()
        self.i, self.q = nn.Linear(2, 12), weight(4, 12)
        self.to_q, self.to_k, self.to_v = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(12, 12)
        self.h = nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.i(x.view(-1, 3, 2)))
        scores = (self.to_q(self.q) @ self.to_k(x).transpose(1, 2)).softmax(-1)
        return self.h((scores @ self.to_v(x)).sum(1))


class Tokens(nn.Module):
    """Learned tokens in front of those of the input, and a table of positions through a layer."""

    def __init__(self):
        super().__init__()
        self.i, self.tokens, self.table, self.place = nn.Linear(2, 12), weight(1, 4, 12), weight(7, 9), nn.Linear(9, 12)
        self.mix, self.h = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), self.i(x.view(-1, 3, 2))], 1) + self.place(self.table)
        return self.h(torch.relu(self.mix(torch.relu(x))).mean(1))


class Hyper(nn.Module):
    """The weight comes out of a network that reads a learned code."""

    def __init__(self):
        super().__init__()
        self.coded, self.up, self.out = weight(12, 7), nn.Linear(7, 9), nn.Linear(9, 6)
        self.b, self.h = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.h(torch.relu(self.b(torch.relu(x @ self.out(torch.tanh(self.up(self.coded))).t()))))


KINDS = {
    "queries": LinearOnParameter,
    "low rank": LowRank,
    "three factors": lambda: LowRank((16, 5, 7, 6)),
    "LoRA": WeightLoRA,
    "LoRA of a kernel": ConvLoRA,
    "pooling": Pooling,
    "tokens": Tokens,
    "hypernetwork": Hyper,
}


def twin_error(model, x, other, **options):
    """How far a zip with a relabelled copy is from the model, on other inputs, relative to its output."""
    twin = fxzip.relabel(model, x)
    zipped = fxzip.compile_zip(model, twin, x[:2], data=[x], refit=None, progress=False, **options)
    with torch.no_grad():
        expected = model(other)
        return max(float((found - expected).abs().max() / expected.abs().max()) for found in zipped(other)), zipped


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method", ["permute", "zip"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_of_parameters_alone_are_matched(kind, method):
    model, x = KINDS[kind]().double().requires_grad_(False), torch.randn(64, 6).double()
    error, zipped = twin_error(model, x, torch.randn(20, 6).double(), method=method)
    assert error < 1e-9
    assert zipped.report["spaces"]


def test_average_is_by_position_there_too():
    model, x = LowRank().double(), torch.randn(64, 6).double()
    error, _ = twin_error(model, x, x, method="average")
    assert error > 0.1


def test_three_models_of_which_two_are_relabelled():
    model, x = LowRank((16, 5, 7, 6)).double(), torch.randn(64, 6).double()
    twins = [fxzip.relabel(model, x, seed=seed) for seed in (1, 2)]
    zipped = fxzip.compile_zip([model, *twins], x[:2], data=[x], method="permute", refit=None, progress=False)
    for found in zipped(x):
        torch.testing.assert_close(found, model(x), rtol=1e-9, atol=1e-9)


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.i, self.r = nn.Linear(2, 8), kind(8, 6, batch_first=True, **options)
        self.h = nn.Linear(6 * (2 if options.get("bidirectional") else 1), 4)

    def forward(self, x):
        return self.h(self.r(torch.relu(self.i(x.view(x.shape[0], -1, 2))))[0].mean(1))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}, {"nonlinearity": "relu"}])
def test_what_a_recurrent_layer_reads_is_observed(options):
    model, x = Recurrent(nn.RNN, **options).double(), torch.randn(64, 10).double()
    error, zipped = twin_error(model, x, torch.randn(20, 10).double(), method="permute")
    assert error < 1e-9
    assert [space["correlation"] for space in zipped.report["spaces"] if space["name"] == "i.weight"] == [1.0]


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("method", ["permute", "zip"])
def test_few_inputs_and_features_that_they_cannot_tell_apart(rows, method):
    """Most features are constant, silent or affine copies of others on so few places."""
    model = nn.Sequential(
        nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)
    )  # fmt: skip
    x = torch.randn(rows, 6).double()
    error, _ = twin_error(randomise(model, 3).double(), x, torch.randn(50, 6).double(), method=method)
    if method == "permute":
        assert error < 1e-9
    else:  # zip joins features of one model that are alike on the data: exact on these only
        assert twin_error(model, x, x, method=method)[0] < 1e-9


def test_one_image_and_a_convolutional_network():
    model, x = randomise(Residual(4), 1).double(), torch.randn(1, 3, 4, 4).double()
    twin = fxzip.relabel(model, x)
    zipped = fxzip.compile_zip(model, twin, x, data=[x], method="permute", refit=None, progress=False)
    other = torch.randn(6, 3, 8, 8).double()
    for found in zipped(other):
        torch.testing.assert_close(found, model(other), rtol=1e-9, atol=1e-9)


def test_affine_copies_are_told_apart_by_how_near_they_are():
    x = torch.randn(50, 1).double() * torch.tensor([[1.0, 3.0, 0.5]]).double() + torch.tensor([[0.0, 1.0, 7.0]])
    for order in ([2, 0, 1], [1, 0, 2], [1, 2, 0]):
        found = moments([x, x[:, order]])
        assert found.unclear().all()
        assert Permute()(found).assignment(1).tolist() == order


def test_silent_features_are_told_apart_by_marks():
    x = torch.randn(50, 4).double()
    x[:, 1:] = 0
    order = torch.tensor([3, 1, 0, 2])
    found = moments([x, x[:, order]])
    own = torch.randn(4, 5).double()
    marked = type(found)(found.count, found.total, found.outer, found.sizes, None, torch.cat([own, own[order]]))
    assert Permute()(marked).assignment(1).tolist() == order.tolist()
    close = similarity(marked)[:4, 4:]
    assert torch.equal(close.argmax(1), order.argsort())


def test_clear_features_are_compared_by_correlation_alone():
    x = torch.randn(50, 4).double()
    found = moments([x, torch.randn(50, 4).double()])
    assert not found.unclear().any()
    torch.testing.assert_close(similarity(found), found.correlation)


def test_marks_do_not_depend_on_the_order_of_other_features():
    model, x = randomise(Residual(4), 1).double(), torch.randn(2, 3, 8, 8).double()
    from fxzip.compiler.survey import survey
    from fxzip.rewriting.weight_evidence import weights_of
    from fxzip.tracing.calls import as_call

    trunk = survey([model, fxzip.relabel(model, x)], as_call(x)).trunk()
    for space in range(len(trunk.spaces[0].spaces)):
        first, other = marks(weights_of(trunk), space).chunk(2)
        gaps = torch.cdist(first, other)
        assert float(gaps.min(1).values.max()) < 1e-9 < float(gaps.median())

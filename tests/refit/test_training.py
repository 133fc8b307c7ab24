"""What is random in `train()` only: kept where it can be, else named."""

import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxzip


class Dropping(nn.Module):
    """Dropout as modules, as calls that follow the mode, and as one that does not."""

    def __init__(self, how, classes=3):
        super().__init__()
        self.how, self.rate = how, 0.5
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, classes)

    def forward(self, x):
        h = torch.relu(self.first(x))
        if self.how == "follows":
            h = F.dropout(h, self.rate, training=self.training)
        if self.how == "by place":
            h = F.dropout(h, self.rate, self.training)
        if self.how == "never":
            h = F.dropout(h, self.rate, training=False)
        if self.how == "mixed":
            h = F.dropout(F.dropout(h, 0.9, training=False), self.rate, training=self.training)
        if self.how == "attention":
            q = h[:, None, None, :]
            h = F.scaled_dot_product_attention(q, q, q, dropout_p=self.rate if self.training else 0.0)[:, 0, 0]
        if self.how == "own" and self.training:
            h = h * torch.rand(len(h), 1)
        if self.how == "factor":
            h = h * (2 if self.training else 1)
        if self.how == "slope":
            h = F.rrelu(h - 0.5, training=self.training)
        if self.how == "mask":
            h = h * torch.empty_like(h).bernoulli_(self.rate if self.training else 1.0)
        if self.how == "layers" and self.training and random.random() < 1:
            return self.head(h)
        return self.head(torch.relu(self.second(h)))


X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def zipped_pair(how, **options):
    torch.manual_seed(0)
    models = [Dropping(how, classes).eval() for classes in (3, 4)]
    return models, fxzip.compile_zip(*models, X, data=[X], progress=False, **options)


def moves(network):
    torch.manual_seed(1)
    with torch.no_grad():
        first, second = (network(X) for _ in range(2))
    first, second = (y[0] if isinstance(y, tuple) else y for y in (first, second))
    return not torch.equal(first, second)


@pytest.mark.parametrize("refit", ["lstsq", "repair", None])
@pytest.mark.parametrize("how", ["follows", "by place", "mixed"])
def test_calls_of_dropout_follow_the_mode(how, refit):
    models, zipped = zipped_pair(how, refit=refit)
    assert not moves(zipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zipped.train()
    assert moves(zipped)
    assert moves(models[0].train())
    rates = [module.p for module in zipped.modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.5]
    assert not moves(zipped.eval())
    assert not any("train()" in note and "random" in note for note in zipped.report["notes"])


def test_dropout_that_never_acts_stays_idle():
    models, zipped = zipped_pair("never")
    assert not moves(models[0].train())
    assert not moves(zipped.train())


@pytest.mark.parametrize("how", ["attention", "own"])
def test_what_tracing_cannot_keep_is_named(how):
    models, zipped = zipped_pair(how)
    assert moves(models[0].train())
    assert any("random calls in `the model itself`" in note for note in zipped.report["notes"])
    with pytest.warns(fxzip.FxzipWarning, match="`the model itself`"):
        zipped.train()
    assert not moves(zipped)


@pytest.mark.parametrize("how", ["factor", "slope", "mask", "layers"])
def test_whatever_else_a_model_does_in_train_mode_is_said(how):
    _, zipped = zipped_pair(how)
    assert any("in `train()` it computes something else" in note for note in zipped.report["notes"])
    with pytest.warns(fxzip.FxzipWarning, match="compute something else there"):
        zipped.train()


def test_stochastic_depth_of_known_packages_stays(tmp_path):
    ops = pytest.importorskip("torchvision.ops")

    class Deep(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, classes)
            self.depth = ops.StochasticDepth(0.5, "row")

        def forward(self, x):
            h = torch.relu(self.first(x))
            return self.head(h + self.depth(self.second(h)))

    torch.manual_seed(0)
    models = [Deep(classes).eval() for classes in (3, 4)]
    zipped = fxzip.compile_zip(*models, X, data=[X], progress=False)
    assert not moves(zipped)
    assert moves(zipped.train())
    torch.save(zipped.eval(), tmp_path / "zip.pt")
    loaded = torch.load(tmp_path / "zip.pt", weights_only=False)
    assert torch.equal(loaded(X)[0], zipped(X)[0])


def test_stochastic_depth_leaves_the_trace_around_it_alone():
    """Whether a module acts in train mode is found by a trace, whose random numbers are not the model's."""
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.depth = nn.Linear(6, 16), swin.SwinDropPath(0.5)

        def forward(self, x):
            rows, features = self.first(x).shape
            return x.sum() + self.depth(self.first(x)).view(rows, int(features / 4), 4)

    model = Folded().eval()
    program = fxzip.tracing.trace(model, X)
    assert program.rung == "symbolic with example values"
    assert not [node for node in program.module.graph.nodes if node.target is torch.rand]
    torch.testing.assert_close(program.module(X), model(X))


def test_tracing_leaves_state_and_modes_alone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.calls += 1
            return F.dropout(self.norm(self.layer(x)), 0.5, self.training)

    model = Counting().eval()
    model.layer.train()
    program = fxzip.tracing.trace(model, X)
    assert model.layer.training
    assert not model.norm.training
    assert not program.module.training
    assert float(model.calls) == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(4))

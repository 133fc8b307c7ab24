"""Nothing merged: every model's own outputs, bit by bit, behind the interface of a zip."""

import copy

import pytest
import torch
from models import randomise
from models.networks import Mixed, Residual, Segmenter
from torch import nn

import fxzip

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_gives_each_model_back():
    models = [randomise(Residual(4), 1), randomise(Segmenter(5), 2), randomise(Residual(3, 12), 3)]
    before = copy.deepcopy([m.state_dict() for m in models])
    both = fxzip.side_by_side(models, X)
    for k, model in enumerate(models):
        torch.testing.assert_close(both(X)[k], model(X))
        torch.testing.assert_close(both.single(k)(X[:2]), model(X[:2]))
        assert all(torch.equal(v, before[k][n]) for n, v in model.state_dict().items())
    own = {p.data_ptr() for m in models for p in m.parameters()}
    assert not own & {p.data_ptr() for p in both.parameters()}


def test_report_counts_every_model():
    models = [randomise(Residual(4), 1), randomise(Residual(5), 2)]
    report = fxzip.side_by_side(models, X).report
    for what in ("flops", "parameters"):
        assert report[what]["trunk"] == 0
        assert report[what]["heads"] == report[what]["originals"]
        assert report[what]["total"] == report[what]["side_by_side"] == sum(report[what]["originals"])
    assert report["parameters"]["originals"] == [sum(p.numel() for p in m.parameters()) for m in models]
    assert "nothing is merged" in str(report)


def test_tasks_by_name():
    models = {"pets": randomise(Residual(4), 1), "birds": randomise(Residual(5), 2)}
    both = fxzip.side_by_side(models, X)
    found = both(X)
    assert list(found) == both.report["tasks"] == ["pets", "birds"]
    for name, model in models.items():
        torch.testing.assert_close(found[name], model(X))
        torch.testing.assert_close(both.single(name)(X), model(X))


def test_models_without_a_common_node():
    x = torch.randn(6, 4)
    a, b = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.ReLU(), nn.Linear(4, 2, bias=False))
    with pytest.raises(fxzip.AlignError):
        fxzip.compile_zip(a, b, x, progress=False)
    both = fxzip.side_by_side([a, b], x)
    torch.testing.assert_close(both(x), (a(x), b(x)))


def test_keywords_in_another_order():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Mixed()

        def forward(self, words, image, shift=0.0):
            return self.inner(image, words)["classes"] + shift

    a, b = randomise(Mixed(), 1), randomise(Swapped(), 2)
    sample = {"image": X, "words": torch.arange(12).reshape(4, 3)}
    for models in ([a, b], [b, a]):
        found = fxzip.side_by_side(models, sample)(**sample)
        torch.testing.assert_close(found, tuple(model(**sample) for model in models))


def test_inputs_with_and_without_a_default_value():
    class Shifted(nn.Module):
        def forward(self, x, shift=1.0):
            return x + shift

    class Scaled(nn.Module):
        def forward(self, x, scale, shift=2.0):
            return x * scale + shift

    x = torch.randn(5, 4)
    sample = {"x": x, "scale": torch.tensor(3.0)}

    class Ignores(Shifted):
        def forward(self, x, shift=1.0, scale=None):
            return x + shift

    found = fxzip.side_by_side([Ignores(), Scaled()], sample)(**sample)
    torch.testing.assert_close(found, (x + 1, x * 3 + 2))


def test_a_model_that_writes_into_its_input_does_not_disturb_the_next():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            x[:, 0] = 0
            return self.linear(x)

    a, b, x = Writes(), nn.Linear(4, 3), torch.randn(5, 4)
    found = fxzip.side_by_side([a, b], x)(x.clone())
    torch.testing.assert_close(found[1], b(x))
    torch.testing.assert_close(found[0], a(x.clone()))


def test_one_model_is_an_error():
    with pytest.raises(fxzip.InputError, match="`side_by_side` needs at least two models; found 1"):
        fxzip.side_by_side([Residual()], X)
    with pytest.raises(fxzip.InputError, match=r"`model 1` must be a `torch.nn.Module`"):
        fxzip.side_by_side([Residual(), "b"], X)

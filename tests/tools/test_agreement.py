"""How far a zip agrees with its originals, and how accurate it is."""

import pytest
import torch
from torch import nn

import fxzip

X = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))


def net(outputs):
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs))


@pytest.fixture
def models():
    torch.manual_seed(0)
    return {"classes": net(5).eval(), "value": net(1).eval()}


def by_hand(z, y):
    error = (z - y).double().square().sum()
    return float((error / y.double().square().sum()).sqrt()), float(1 - error / (y - y.mean()).double().square().sum())


def test_figures_are_those_of_their_definitions(models):
    zipped = fxzip.compile_zip(models, X, data=[X], width=0.5)
    found = fxzip.agreement(zipped, models, [X[:32], X[32:]])
    with torch.no_grad():
        outputs = zipped(X)
    for head, (name, model) in zip(found.heads, models.items(), strict=True):
        error, fit = by_hand(outputs[name], model(X).detach())
        assert head.relative_error == pytest.approx(error, rel=1e-4)
        assert head.r_squared == pytest.approx(fit, rel=1e-4)
        assert error > 1e-3
    same = (outputs["classes"].argmax(1) == models["classes"](X).argmax(1)).double().mean()
    assert found.heads[0].same_class == pytest.approx(float(same))
    assert found.heads[1].same_class is None
    assert found.inputs == (96, 96)
    assert str(found).splitlines()[0].startswith("classes: same class ")


def test_data_per_model_and_labels_behind_the_inputs(models):
    zipped = fxzip.compile_zip(models, X, data=[X])
    loaders = {"value": [(X[:10], torch.zeros(10))], "classes": [[X[:20], torch.zeros(20)], [X[20:50]]]}
    assert fxzip.agreement(zipped, models, loaders).inputs == (50, 10)
    listed = fxzip.agreement(zipped, list(models.values()), fxzip.PerModel(loaders["classes"], loaders["value"]))
    assert listed == fxzip.agreement(zipped, models, loaders)


def test_modes_are_left_as_they_were(models):
    zipped = fxzip.compile_zip(models, X, data=[X]).train()
    models["value"].train()
    fxzip.agreement(zipped, models, [X])
    assert zipped.training
    assert models["value"].training
    assert not models["classes"].training


def test_accuracy():
    torch.manual_seed(0)
    models = [net(3).eval(), net(2).eval()]
    zipped = fxzip.compile_zip(*models, X, data=[X])
    labels = [model(X).argmax(1) for model in models]
    wrong = labels[1].clone()
    wrong[:24] = 1 - wrong[:24]
    found = fxzip.evaluate(fxzip.side_by_side(models, X), fxzip.PerModel([(X, labels[0])], [(X, wrong)]))
    assert found.per_task == (1.0, 0.75)
    assert found.average == 0.875
    assert "head 1: 75.00 % of 96 inputs" in str(found)
    same = fxzip.agreement(zipped, models, [X]).heads
    scores = fxzip.evaluate(zipped, fxzip.PerModel(*([(X, own)] for own in labels))).per_task
    assert scores == tuple(head.same_class for head in same)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda z, m: fxzip.agreement(z, [m["value"]], [X]), fxzip.InputError, "one for each of the 2 heads; found 1"),
    (lambda z, m: fxzip.agreement(m["value"], m, [X]), fxzip.InputError, "network of `compile_zip` or `side_by_side`"),
    (lambda z, m: fxzip.agreement(z, m, []), fxzip.DataError, "at least one batch"),
    (lambda z, m: fxzip.agreement(z, m, {"a": [X]}), fxzip.InputError, "names of the tasks, 'classes', 'value'"),
    (lambda z, m: fxzip.evaluate(z, [(X, X)]), fxzip.InputError, "for each of the 2 heads.*found 1 source"),
    (lambda z, m: fxzip.evaluate(z, fxzip.PerModel([X], [X])), fxzip.InputError, "found no labels"),
])  # fmt: skip
def test_mistakes_are_named(models, call, error, message):
    zipped = fxzip.compile_zip(models, X, data=[X])
    with pytest.raises(error, match=message):
        call(zipped, models)

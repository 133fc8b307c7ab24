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


class Rows(torch.utils.data.Dataset):
    """Single inputs with labels."""

    def __len__(self):
        return len(X)

    def __getitem__(self, place):
        return X[place], place % 2


def test_data_may_have_any_form_that_a_compile_takes(models):
    zipped = fxzip.compile_zip(models, X, data=[X])
    known = fxzip.agreement(zipped, models, [X])
    for data in (Rows(), [[[X]]], [X.numpy()], X, iter([X[:0], X]), [{"input": X, "labels": X[:, 0]}]):
        found = fxzip.agreement(zipped, models, data)
        assert found.inputs == (96, 96)
        assert found.heads[1].relative_error == pytest.approx(known.heads[1].relative_error, rel=1e-4)
    labels = torch.arange(96) % 2
    logits = [net(2), net(2)]
    both = fxzip.side_by_side(logits, X)
    scores = fxzip.evaluate(both, fxzip.PerModel([(X, labels)], [(X, labels)])).per_task
    for data in (Rows(), [([X], labels)], [(X.numpy(), labels.numpy())]):
        assert fxzip.evaluate(both, fxzip.PerModel(data, data)).per_task == scores


@pytest.mark.parametrize(("data", "message"), [
    ([torch.zeros(4, 99)], r"Batch 0 of `data` has shape \(4, 99\)"),
    ([(torch.zeros(4).long(), X)], "Let `data` yield the inputs first"),
    ([X.long()], "kind of dtype"),
    ([{"x": X}], "`input` missing, found `x`"),
    ([[1.0, 2.0]], "must hold 1 input"),
    ([X[:0]], "at least one input"),
    (None, "must be an iterable of batches; found `NoneType`"),
    (iter(()), "An iterator can be read only once"),
])  # fmt: skip
def test_data_that_networks_do_not_take_are_named(models, data, message):
    with pytest.raises(fxzip.DataError, match=message):
        fxzip.agreement(fxzip.side_by_side(list(models.values()), X), list(models.values()), data)


def test_of_a_network_without_known_inputs_a_batch_is_taken_as_it_is(models):
    both = fxzip.side_by_side(list(models.values()), X)
    both.meta.pop("fxzip_report")
    for data in ([X], [(X, X[:, 0])], [{"input": X}]):
        assert fxzip.agreement(both, list(models.values()), data).inputs == (96, 96)

"""How `compile_zip` may be called, and what it says where it may not."""

import inspect

import pytest
import torch
from torch import nn

import fxzip

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


def net(classes, width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


@pytest.fixture
def models():
    torch.manual_seed(0)
    return {"pets": net(2), "birds": net(3), "cars": net(4)}


def test_the_signature_can_be_read():
    text = str(inspect.signature(fxzip.compile_zip))
    assert len(text) <= 1200
    documented = inspect.getdoc(fxzip.compile_zip)
    for name in inspect.signature(fxzip.compile_zip).parameters:
        assert f"{name}: " in documented or f"`{name}=`" in documented, name


def test_names_of_methods_and_refits_are_those_of_the_registries():
    from typing import get_args

    from fxzip.compiler.options import MethodName, RefitName

    assert set(get_args(MethodName)) == {"auto", *fxzip.METHODS}
    assert set(get_args(RefitName)) == {"auto", *(name for name in fxzip.REFITS if name)}


def test_tasks_by_name(models):
    plain = fxzip.compile_zip(list(models.values()), X, data=[X])
    named = fxzip.compile_zip(models, X, data=[X])
    outputs = named(X)
    assert list(outputs) == ["pets", "birds", "cars"]
    assert all(torch.equal(found, expected) for found, expected in zip(outputs.values(), plain(X), strict=True))
    assert named.tasks == ("pets", "birds", "cars")
    assert named.report.tasks == ["pets", "birds", "cars"]
    for number, name in enumerate(models):
        assert torch.equal(named.single(name)(X), outputs[name])
        assert torch.equal(named.single(number)(X), outputs[name])
    with pytest.raises(KeyError, match="'pets', 'birds', 'cars'; found 'dogs'"):
        named.single("dogs")
    with pytest.raises(KeyError, match="numbers only; found 'pets'"):
        plain.single("pets")


def test_data_by_name_and_joint_decisions(models):
    torch.manual_seed(1)
    sources = {name: [torch.randn(40, 4) + k] for k, name in enumerate(models)}
    named = fxzip.compile_zip(models, X, data=dict(reversed(sources.items())), joint=True)
    plain = fxzip.compile_zip(list(models.values()), X, data=fxzip.PerModel(*sources.values()), joint=True)
    assert all(torch.equal(a, b) for a, b in zip(named(X).values(), plain(X), strict=True))
    with pytest.raises(fxzip.InputError, match="must have the names of the models, 'pets', 'birds', 'cars'; found 'a'"):
        fxzip.compile_zip(models, X, data={"a": [X]})


def test_named_networks_are_stored_and_loaded(models, tmp_path):
    named = fxzip.compile_zip(models, X)
    torch.save(named, tmp_path / "zip.pt")
    loaded = torch.load(tmp_path / "zip.pt", weights_only=False)
    assert {name: y.tolist() for name, y in loaded(X).items()} == {name: y.tolist() for name, y in named(X).items()}
    assert loaded.tasks == named.tasks


def test_the_sample_by_keyword(models):
    a, b, _ = models.values()
    expected = fxzip.compile_zip(a, b, X)(X)
    for found in (fxzip.compile_zip(a, b, sample_input=X), fxzip.compile_zip([a, b], sample_input=X)):
        assert all(map(torch.equal, found(X), expected))


SLIPS = [
    (lambda a, b, c: fxzip.compile_zip(a, b, X, [X]), "found a fourth. Calibration data goes by keyword, `data=...`"),
    (lambda a, b, c: fxzip.compile_zip([a, b], X, [X]), "found a third. Calibration data goes by keyword"),
    (lambda a, b, c: fxzip.compile_zip({"a": a, "b": b}, X, [X]), "found a third. Calibration data goes by keyword"),
    (lambda a, b, c: fxzip.compile_zip(a, b, c, X), r"Pass three or more models as a list: `compile_zip\(\[a, b, c\]"),
    (lambda a, b, c: fxzip.compile_zip([a, b]), "needs one batch of what the models take"),
    (lambda a, b, c: fxzip.compile_zip(a, b), "found two modules and nothing else"),
    (lambda a, b, c: fxzip.compile_zip({"a": a}, X), "needs at least two models; found 1"),
    (lambda a, b, c: fxzip.compile_zip({1: a, 2: b}, X), "Names of tasks must be strings that are not empty; found 1"),
]


@pytest.mark.parametrize(("call", "message"), SLIPS)
def test_slips_say_how(models, call, message):
    with pytest.raises(fxzip.InputError, match=message):
        call(*models.values())


@pytest.mark.parametrize("options", [
    {"width": 5}, {"width": "wide"}, {"width": "auto", "max_cost": -1}, {"until": "auto", "min_agreement": 2},
    {"width": "auto", "budget": "time"}, {"budget": "flops"},
    {"max_batches": 0}, {"method": "zipp"}, {"refit": "fix"}, {"until": 3.0}, {"until": "auto", "max_cost": 0},
])  # fmt: skip
def test_values_out_of_range_are_value_errors(models, options):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fxzip.compile_zip(models, X, **options)
    assert isinstance(caught.value, fxzip.FxzipError)
    assert not isinstance(caught.value, TypeError)


def test_zip_is_zipit_everywhere(models):
    a, b, _ = models.values()
    for refit in ("lstsq", "repair", None):
        zipped = fxzip.compile_zip(a, b, X, data=[X], method="zip", refit=refit)
        assert zipped.report["method"] == "Zip(alpha=1.0, beta=1.0)"
    assert fxzip.compile_zip(a, b, X, data=[X]).report["method"].startswith("Energy(")
    assert fxzip.compile_zip(a, b, X, data=[X], refit="repair").report["method"].startswith("Zip(")
    table = fxzip.compare([a, b], X[:4], data=[X], methods=["zip", "auto"], progress=False)
    names = ["zip", "auto"]
    by_hand = [fxzip.compile_zip(a, b, X[:4], data=[X], method=name) for name in names]
    assert by_hand[0].report["method"].startswith("Zip(")
    assert [row["method"] for row in table[1:]] == names

"""Every option of every public function, values that are none: each is an error that says what is allowed."""

import inspect
import math

import pytest
import torch
from torch import nn

import fxzip
from fxzip.tracing.option_values import checked

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
A = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
BOTH = fxzip.side_by_side([A, A], X)
GIVEN = {
    "agreement": {"zipped": BOTH, "models": [A, A], "data": [X]},
    "barrier": {"a": A, "b": A, "sample_input": X, "loss": lambda network: 0.0},
    "batch_heads": {"network": BOTH},
    "calibrate_joint": {"network": BOTH, "sample_input": X, "data": fxzip.PerModel([X], [X])},
    "compare": {"models": [A, A], "sample_input": X, "data": [X]},
    "compile_zip": {"sample_input": X},
    "evaluate": {"zipped": BOTH, "data": [(X, X[:, 0].long())]},
    "export": {"network": BOTH, "path": "zip.pt2"},
    "inspect": {"model": A, "sample_input": X},
    "load": {"folder": "zip"},
    "narrow": {"model": A, "sample_input": X, "data": [X]},
    "relabel": {"model": A, "sample_input": X},
    "save": {"zipped": BOTH, "folder": "zip"},
    "side_by_side": {"models": [A, A], "sample_input": X},
    "soup": {"models": [A, A]},
    "sweep": {"models": [A, A], "sample_input": X, "data": [X]},
}
NONE_OF_ANY = [object(), torch.ones(2), math.nan, {1: 2}, "", b"", [None], int, nn.Linear(2, 2)]
ALLOWED = {  # values of that list that some options take, or names that only a stage knows to be wrong
    "rules": [],
    "base": [nn.Linear(2, 2)],
    "weights": [torch.ones(2)],
    "model": [nn.Linear(2, 2)],
    "sample_input": [torch.ones(2)],
    "data": [],
    "held_out": [],
}
CALLED = [object(), torch.ones(2), math.nan, {1: 2}, "", b"", [None]]  # a class or a module may measure networks


def options():
    for name, given in GIVEN.items():
        for option, parameter in inspect.signature(getattr(fxzip, name)).parameters.items():
            if parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
                yield name, option, given


@pytest.mark.parametrize(
    ("name", "option", "given"), [pytest.param(*own, id=f"{own[0]}-{own[1]}") for own in options()]
)
def test_values_that_are_none_of_an_option(name, option, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = (A, A) if name == "compile_zip" else ()
    for value in CALLED if option in ("score", "loss") else NONE_OF_ANY:
        if any(value is own or type(value) is type(own) for own in ALLOWED.get(option, [])):
            continue
        with pytest.raises(fxzip.FxzipError) as raised:
            getattr(fxzip, name)(*models, **{**given, option: value})
        assert len(str(raised.value)) < 500
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": ""}, "`until` must be a name, a fraction in [0, 1], \"auto\" or None; found ''."),
        ({"until": []}, "`until` must be a name"),
        ({"until": True}, "`until` must be a name"),
        ({"resume": 5}, "`resume` must be the path of a folder, or None; found 5."),
        ({"resume": ""}, "`resume` must be the path of a folder"),
        ({"verify": "no"}, "`verify` must be True or False; found 'no'."),
        ({"progress": 2}, "`progress` must be True, False or None; found 2."),
        ({"width": None}, '`width` must be a number, a dict of numbers by name, or "auto"; found None.'),
        ({"rank": {"a": "b"}}, "`rank` must be a number, a dict of numbers by name"),
        ({"width": "auto", "max_cost": "1.3"}, "`max_cost` must be a number, or None; found '1.3'."),
        ({"until": "auto", "min_agreement": [0.9]}, "`min_agreement` must be a number, or None; found [0.9]."),
        ({"refit": fxzip.LeastSquares}, "or None; found the class `LeastSquares`."),
        ({"refit": lambda network: network}, "`refit` as a function must take three arguments"),
        ({"start": ""}, "`start` must be a name"),
    ],
)
def test_what_an_error_says(options, message):
    with pytest.raises(fxzip.FxzipError) as raised:
        fxzip.compile_zip(A, A, X, **{"progress": False, **options})
    assert message in str(raised.value)


def test_what_other_functions_say():
    with pytest.raises(fxzip.OptionError, match=r"`max_cost` of `narrow` must lie in \(0, 1\]; found 2"):
        fxzip.narrow(A, X, data=[X], max_cost=2)
    with pytest.raises(fxzip.OptionError, match="`budget` says what `max_costs` count"):
        fxzip.sweep([A, A], X, data=[X], budget="flops")
    with pytest.raises(fxzip.InputError, match="`models` must hold the networks that were zipped; found a `int`"):
        fxzip.agreement(BOTH, [1, 2], [X])
    with pytest.raises(fxzip.InputError, match="`sample_input` must be one batch of what the network takes; found"):
        fxzip.batch_heads(BOTH, torch.ones(2, 7))
    with pytest.raises(fxzip.OptionError, match="`functions` must be functions"):
        fxzip.trust(5)


def test_a_missing_argument_is_named_by_the_function_itself():
    @checked
    def zipped(model, sample_input):
        return model

    with pytest.raises(TypeError, match=r"zipped\(\) missing 1 required positional argument: 'sample_input'"):
        zipped(A)

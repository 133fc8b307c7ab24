"""Each bad input gets one clear error."""

import copy
import re

import pytest
import torch
from models import randomise
from models.networks import Residual
from torch import nn

import fxzip

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
A, B = randomise(Residual(4), 1), randomise(Residual(5), 2)


def says(text):
    return "(?s)" + ".*".join(re.escape(part) for part in text.split("..."))


def fails(error, text, *args, **options):
    with pytest.raises(error, match=says(text)):
        fxzip.compile_zip(*args, **{"progress": False} | options)


def test_models_that_part_at_the_first_node():
    a, b = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    fails(fxzip.AlignError, "`compile_zip` needs models that agree from the input on; they part at the first node: the "
          "first calls `Conv2d` (`0`), ...calls `Flatten` (`0`).", a, b, X)  # fmt: skip


@pytest.mark.parametrize(("until", "nearest"), [("layer9", "'layer1'"), ("layer1.0.conv", "'layer1.0.conv1'")])
def test_unknown_cut(until, nearest):
    fails(fxzip.CutError, f"`until` must name a module or a node of the first model; found '{until}'. "
          f"The nearest valid names are ...{nearest}", A, B, X, until=until)  # fmt: skip


def test_cut_beyond_the_common_trunk():
    fails(fxzip.CutError, "`until` must lie in what the models share; 'linear' needs node `linear`, which is not shared"
          "...The trunk can reach up to 'mean'.", A, B, X, until="linear")  # fmt: skip


@pytest.mark.parametrize("until", [-0.1, 1.5])
def test_fraction_out_of_range(until):
    fails(
        fxzip.CutError, f"`until` as a fraction of the FLOPs must lie in [0, 1]; found {until}.", A, B, X, until=until
    )


def test_fraction_too_small():
    fails(fxzip.AlignError, "no node with parameters lies before the cut", A, B, X, until=1e-6)


def test_a_name_in_front_of_all_weights_says_where_the_first_ones_are():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 3))
    models = randomise(copy.deepcopy(model), 1), randomise(model, 2)
    text = "no node with parameters lies before the cut. `until='0'` ends at node `_0`; the first place with some is "
    fails(fxzip.AlignError, text + "`until='_1'`. Or share nothing at all, `until=0`.", *models, X, until="0")
    for until in ("_1", 0):
        assert fxzip.compile_zip(*models, X, until=until, progress=False)(X)
    bare = nn.Sequential(nn.Flatten(), nn.ReLU())
    fails(fxzip.AlignError, "no node with parameters lies before the cut. `until='1'` ends at node `_1`; none can be "
          "shared: share nothing at all", bare, bare, X, until="1")  # fmt: skip


def test_fraction_too_small_says_what_is_enough():
    with pytest.raises(fxzip.AlignError, match="ask for that at least") as raised:
        fxzip.compile_zip(A, B, X, until=1e-6, progress=False)
    found = re.search(r"in front of it, ([0-9.e-]+) of the FLOPs", str(raised.value))
    assert found is not None
    assert fxzip.compile_zip(A, B, X, until=float(found[1]), progress=False).report["cut"]["after"]


def test_empty_data():
    fails(fxzip.DataError, "`data` must yield at least one batch; it gave none.", A, B, X, data=[])


@pytest.mark.parametrize("refit", [None, "repair"])
def test_batch_of_wrong_shape(refit):
    fails(fxzip.DataError, "Batch 1 of `data` has shape (2, 1, 8, 8); the models were traced with (2, 3, 8, 8)",
          A, B, X, data=[X, X[:, :1]], refit=refit)  # fmt: skip


def test_non_finite_features():
    broken = X.clone()
    broken[0, 0, 0, 0] = float("nan")
    fails(fxzip.DataError, "node `stem_0` of model 0 gave 8 non-finite features on batch 1 of `data`",
          A, B, X, data=[X, broken])  # fmt: skip


def test_dtypes_differ():
    fails(
        fxzip.InputError,
        "All models must be on one device and of one dtype; ...torch.float64",
        A,
        Residual().double(),
        X,
    )


def test_devices_differ():
    fails(fxzip.InputError, "All models must be on one device", A, Residual().to("meta"), X)


def test_scripted():
    fails(fxzip.InputError, "must be an eager module", torch.jit.trace(A, X), B, X)


def test_third_model_as_argument():
    fails(fxzip.InputError, "the third argument is a module too. Pass three or more models as a list: "
          "`compile_zip([a, b, c], sample_input)`.", A, B, A, X)  # fmt: skip
    fails(fxzip.InputError, "the third argument is a module too", A, B, A)


def test_wrong_arguments():
    fails(fxzip.InputError, "needs at least two models; found 1", [A], X)
    fails(fxzip.InputError, "found 1 positional arguments", A)
    fails(fxzip.InputError, "must be a `torch.nn.Module`; found `str`", [A, "b"], X)
    fails(fxzip.InputError, "`sample_input` must be a tensor", A, B, "x")
    fails(fxzip.InputError, "`sample_input` must be a tensor", A, B)


def test_wrong_settings():
    fails(fxzip.OptionError, "`method` must be one of", A, B, X, method="zipp")
    fails(fxzip.OptionError, "`refit` must be one of", A, B, X, refit="fix")


def test_sample_that_the_models_reject():
    fails(fxzip.InputError, "`model 0` must run on `sample_input`; it raised RuntimeError", A, B, X[:, :1])


class Cumulative(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.middle(self.first(x).relu()).kthvalue(4, 1, keepdim=True).values.expand(-1, 8))


def test_barrier():
    x = torch.randn(20, 4)
    model = Cumulative()
    zipped = fxzip.compile_zip(model, fxzip.relabel(model, x), x, data=[x], progress=False)
    for output in zipped(x):
        torch.testing.assert_close(output, model(x), atol=1e-4, rtol=1e-4)
    assert any("has no rule" in reason for reason in zipped.report["barriers"])
    fails(fxzip.BarrierError, "`strict=True` allows no barrier; ...has no rule...Pass `rules=fxzip.RULES | {...}`",
          model, Cumulative(), x, strict=True)  # fmt: skip


@pytest.mark.parametrize(
    ("option", "error", "text"),
    [
        (
            {"until": [0.5]},
            fxzip.OptionError,
            '`until` must be a name, a fraction in [0, 1], "auto" or None; found [0.5].',
        ),
        ({"start": 0}, fxzip.CutError, "`start` must be a name, or a list with one for each model; found 0."),
        (
            {"rules": 5},
            fxzip.OptionError,
            "`rules` must be a table by ATen call, `fxzip.RULES | ...`, or None; found 5.",
        ),
    ],
)
def test_options_of_another_type(option, error, text):
    with pytest.raises(error, match=re.escape(text)):
        fxzip.compile_zip(A, B, X, progress=False, **option)


def test_models_that_take_other_inputs():
    other = randomise(Residual(5), 2)
    other.stem[0] = nn.Conv2d(1, 8, 3, padding=1)
    fails(
        fxzip.InputError,
        "`model 1` must run on `sample_input`...`sample_input=fxzip.PerModel(...)`...`start`",
        A,
        other,
        X,
    )


def test_a_sample_without_any_input():
    fails(fxzip.InputError, "`sample_input` must hold at least one input; its batch has size 0.", A, B, X[:0], data=[X])


def test_nested_tensors_are_no_inputs():
    nested = torch.nested.nested_tensor([torch.randn(3, 8, 8), torch.randn(3, 6, 6)])
    fails(fxzip.InputError, "Inputs must be dense tensors; `sample_input` holds one that is nested", A, B, nested)
    fails(fxzip.DataError, "Batch 0 of `data` must hold dense tensors", A, B, X, data=[nested])


def test_weights_that_are_not_finite_are_named_where_only_weights_are_looked_at():
    a, b = (nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, n)) for n in (3, 4))
    b[0].weight.data[0] = float("nan")
    text = "Weights must be finite; in model 1 `0.weight` holds 6 values that are not"
    fails(fxzip.DataError, text, a, b, torch.randn(8, 6), method="weights")

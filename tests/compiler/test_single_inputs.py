"""A sample of one input, and batches of one: attention makes other ATen calls then, and means the same."""

import pytest
import torch
from models import randomise
from torch import nn
from torchvision.models import VisionTransformer

import fxzip
from fxzip.calibration.joining import joined
from fxzip.tracing import trace
from fxzip.tracing.calls import Call, JointCall, as_call, batch_size, twice
from fxzip.tracing.joint_inputs import trace_all

IMAGES = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FORMS = {
    "a sample of one": (1, [40]),
    "a last batch of one": (2, [20, 19, 1]),
    "one by one": (1, [1] * 40),
    "one by one, a sample of two": (2, [1] * 40),
}


def transformer(seed):
    return randomise(VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4), seed)


def zipped_in(form, **options):
    sample, sizes = form
    models = [transformer(seed) for seed in range(2)]
    return fxzip.compile_zip(*models, IMAGES[:sample], data=list(IMAGES.split(sizes)), progress=False, **options)


@pytest.fixture(scope="module")
def usual():
    return zipped_in((2, [20, 20])).meta["fxzip_fit"]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_same_calls_are_fitted(form, usual):
    fit = zipped_in(form).meta["fxzip_fit"]
    assert any("in_proj_weight" in name for name in usual.fitted)
    assert (fit.fitted, fit.left) == (usual.fitted, usual.left)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_features_inside_attention_are_observed(form):
    zipped = zipped_in(form, method="zip", refit="repair", hold_out=False)
    inside = [space for space in zipped.report["spaces"] if "self_attention" in space["name"]]
    assert len(inside) == 4
    assert all(space["correlation"] is not None for space in inside)


def test_inputs_that_are_thinned_to_one(monkeypatch):
    monkeypatch.setattr("fxzip.calibration.observer.ENOUGH", (1, 10))
    zipped = zipped_in((2, [8] * 5), hold_out=False)
    assert all(space["correlation"] is not None for space in zipped.report["spaces"])


def test_costs_are_those_of_the_sample():
    models = [transformer(seed) for seed in range(2)]
    one, two = (
        fxzip.compile_zip(*models, IMAGES[:n], data=IMAGES, refit="repair", progress=False).report for n in (1, 2)
    )
    assert two["flops"]["total"] == 2 * one["flops"]["total"]
    assert one["memory"]["zipped"] < two["memory"]["zipped"]
    assert "1, 3, 32, 32" in str(one["inputs"])


class OneByOne(nn.Module):
    """Takes a single input."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.body(x.reshape(6))))[None]


def test_a_model_of_single_inputs_is_traced_with_one():
    program = trace(randomise(OneByOne()), torch.ones(1, 6))
    assert program.call.args[0].shape == program.sample.args[0].shape == (1, 6)
    models = [randomise(OneByOne(), seed) for seed in range(2)]
    data = list(torch.randn(60, 1, 6, generator=torch.Generator().manual_seed(1)))
    zipped = fxzip.compile_zip(*models, data[0], data=data, progress=False)
    assert zipped(data[0])[0].shape == (1, 3)


def test_beside_such_a_model_the_others_are_traced_with_one():
    flexible = randomise(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    sample = as_call(torch.ones(1, 6))
    assert [batch_size(program.call) for program in trace_all([flexible, flexible], sample)] == [2, 2]
    assert [batch_size(program.call) for program in trace_all([randomise(OneByOne()), flexible], sample)] == [1, 1]


def calls_of(*sizes, shape=(4,)):
    return [(0, as_call(torch.randn(n, *shape))) for n in sizes]


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ((3, 1), [4]),
        ((1, 3), [4]),
        ((1, 1, 1), [3]),
        ((3, 2), [3, 2]),
        ((1,), [2]),
        ((20, 1), [21]),
        ((20, 1, 5), [20, 6]),
        ((20, 1, 1, 1), [20, 3]),
    ],
)
def test_batches_of_one_join_their_neighbours(sizes, found):
    calls = calls_of(*sizes)
    after = list(joined(calls))
    assert [len(call.args[0]) for _, call in after] == found
    given, taken = (torch.cat([call.args[0] for _, call in own]) for own in (calls, after))
    assert torch.equal(given.unique(dim=0), taken.unique(dim=0))


def test_batches_do_not_grow_without_end():
    sizes = [len(call.args[0]) for _, call in joined(calls_of(*[1] * 100))]
    assert sum(sizes) == 100
    assert max(sizes) <= 17


def test_inputs_of_other_shapes_and_sources_are_not_joined():
    calls = calls_of(1, shape=(4,)) + calls_of(1, shape=(5,)) + [(1, as_call(torch.ones(1, 5)))]
    assert [(source, *call.args[0].shape) for source, call in joined(calls)] == [(0, 2, 4), (0, 2, 5), (1, 2, 5)]


def test_the_only_input_of_a_source_counts_once():
    calls = calls_of(1) + [(1, call) for _, call in calls_of(2, 1)]
    assert [(source, len(call.args[0])) for source, call in joined(calls, sources=2)] == [(0, 1), (1, 3)]
    odd = calls_of(1, shape=(4,)) + calls_of(1, shape=(5,))
    assert [len(call.args[0]) for _, call in joined(odd, sources=2)] == [2, 2]


def test_a_batch_behind_a_held_one_of_another_shape():
    calls = calls_of(20, 1) + calls_of(7, shape=(5,))
    assert [tuple(call.args[0].shape) for _, call in joined(calls)] == [(21, 4), (7, 5)]


def test_what_is_no_input_stays():
    scale = torch.tensor([2.0, 3.0])
    ones = [(0, Call((torch.ones(1, 4), scale), {"mask": torch.ones(1, 4, dtype=torch.bool)})) for _ in range(2)]
    [(_, call)] = joined(ones)
    assert call.args[0].shape == call.kwargs["mask"].shape == (2, 4)
    assert torch.equal(call.args[1], scale)
    other = (0, Call((torch.ones(1, 4), scale + 1), ones[0][1].kwargs))
    assert [len(call.args[0]) for _, call in joined([ones[0], other])] == [2, 2]


def test_inputs_of_several_models_are_joined_each_with_its_own():
    joint = [(0, JointCall.of([as_call(torch.ones(1, 3)), as_call(torch.ones(1, 5))])) for _ in range(2)]
    [(_, call)] = joined(joint)
    assert [part.args[0].shape for part in call.parts] == [(2, 3), (2, 5)]


def test_a_single_input_twice_lies_as_it_did():
    image = torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last)
    both = twice(as_call(image)).args[0]
    assert both.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(both, torch.cat([image, image]))

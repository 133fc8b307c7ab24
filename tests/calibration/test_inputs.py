"""Identities of calls and batches, and the message of each error of `fxzip.inputs`."""

import re

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fxzip.calibration.batches import batches
from fxzip.calibration.rejections import wrong_shape
from fxzip.errors import DataError, InputError
from fxzip.tracing.calls import as_call, batch_size, leaves, with_batch

IMAGES = torch.randn(4, 3, 8, 8)
SAMPLE = as_call(torch.randn(2, 3, 8, 8))


def says(text):
    return re.escape(text)


@pytest.mark.parametrize(
    ("sample", "args", "kwargs"),
    [(IMAGES, 1, []), ((IMAGES, IMAGES), 2, []), ([IMAGES], 1, []), ({"x": IMAGES, "flag": True}, 0, ["x", "flag"])],
)
def test_as_call(sample, args, kwargs):
    call = as_call(sample)
    assert len(call.args) == args
    assert list(call.kwargs) == kwargs
    assert as_call(call) is call


def test_as_call_refuses_what_is_no_input():
    with pytest.raises(InputError, match=says("must be a tensor, or a tuple, list or dict with tensors; found `str`")):
        as_call("image")
    with pytest.raises(InputError, match=says("must hold at least one tensor; found a `dict` with none")):
        as_call({"use_cache": False})


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES, torch.zeros(4)), [IMAGES, "label"], ((IMAGES,), 1)])
def test_batch_of_one_input(batch):
    (call,) = batches([batch], SAMPLE)
    assert call.args[0] is IMAGES or torch.equal(call.args[0], IMAGES)
    assert len(call.args) == 1
    assert not call.kwargs


def test_a_tensor_or_dict_as_data_is_one_batch():
    assert len(list(batches(IMAGES, SAMPLE))) == 1
    assert len(list(batches({"x": IMAGES, "y": 1}, as_call({"x": IMAGES})))) == 1


def test_data_loader_and_generator():
    loader = DataLoader(TensorDataset(torch.randn(6, 3, 8, 8), torch.zeros(6)), batch_size=4)
    assert [len(call.args[0]) for call in batches(loader, SAMPLE)] == [4, 2]
    assert [len(call.args[0]) for call in batches((IMAGES for _ in range(2)), SAMPLE)] == [4, 4]


def test_several_inputs():
    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5)
    sample = as_call((ids, mask))
    for batch in [(ids, mask), (ids, mask, torch.zeros(2)), ((ids, mask), torch.zeros(2)), [[ids, mask], 3]]:
        (call,) = batches([batch], sample)
        assert torch.equal(call.args[0], ids)
        assert torch.equal(call.args[1], mask)
        assert len(call.args) == 2


def test_dicts():
    ids = torch.zeros(2, 5, dtype=torch.long)
    sample = as_call({"ids": ids, "use_cache": False})
    for batch in [{"ids": ids, "labels": ids}, ({"ids": ids}, 3), ids, {"ids": ids, "use_cache": False}]:
        (call,) = batches([batch], sample)
        assert call.kwargs["use_cache"] is False
        assert sorted(call.kwargs) == ["ids", "use_cache"]


def test_batches_take_the_dtype_of_the_sample():
    (call,) = batches([IMAGES], as_call(torch.zeros(1, 3, 8, 8, dtype=torch.float64)))
    assert call.args[0].dtype is torch.float64
    ids = torch.zeros(2, 5, dtype=torch.int32)
    (call,) = batches([ids], as_call(torch.zeros(1, 5, dtype=torch.long)))
    assert call.args[0].dtype is torch.int32


def test_other_spatial_sizes_pass():
    assert len(list(batches([torch.randn(2, 3, 16, 16)], SAMPLE))) == 1


@pytest.mark.parametrize(
    ("data", "sample", "message"),
    [
        ([], SAMPLE, "`data` must yield at least one batch; it gave none."),
        (
            [IMAGES, IMAGES[0]],
            SAMPLE,
            "Batch 1 of `data` has shape (3, 8, 8); the models were traced with (2, 3, 8, 8): 4 dimensions are needed",
        ),
        (
            [IMAGES.to(torch.uint8)],
            SAMPLE,
            "Batch 0 of `data` must have the kind of dtype of `sample_input`, torch.float32; found torch.uint8.",
        ),
        (["image"], SAMPLE, "Batch 0 of `data` must hold 1 input like `sample_input`, (2, 3, 8, 8); found `str`."),
        (
            [{"x": IMAGES}],
            SAMPLE,
            "Batch 0 of `data` must hold 1 input like `sample_input`, (2, 3, 8, 8); found {'x': (4, 3, 8, 8)}.",
        ),
        (
            [IMAGES],
            as_call((IMAGES, IMAGES)),
            "must hold 2 inputs like `sample_input`, [(4, 3, 8, 8), (4, 3, 8, 8)]; found (4, 3, 8, 8).",
        ),
        (
            [{"a": IMAGES}],
            as_call({"a": IMAGES, "b": IMAGES}),
            "Batch 0 of `data` must have the keys of `sample_input`, `a`, `b`; `b` missing, found `a`.",
        ),
        (
            [IMAGES],
            as_call({"a": IMAGES, "b": IMAGES}),
            "Batch 0 of `data` must be a dict like `sample_input`, with the keys `a`, `b`; found (4, 3, 8, 8).",
        ),
        (
            [{"a": [IMAGES]}],
            as_call({"a": [IMAGES, IMAGES]}),
            "Batch 0 of `data` must have the structure of `sample_input`",
        ),
    ],
)
def test_bad_batches(data, sample, message):
    with pytest.raises(DataError, match=says(message)):
        list(batches(data, sample))


def test_wrong_shape():
    error = wrong_shape(as_call(torch.ones(8, 1, 32, 32)), 4, as_call(torch.ones(2, 3, 32, 32)), ValueError("no\nyes"))
    assert str(error) == ("Batch 4 of `data` has shape (8, 1, 32, 32); the models were traced with (2, 3, 32, 32): no")


def test_leaves():
    assert len(leaves({"a": IMAGES, "b": (IMAGES, 3, None)})) == 2
    assert len(leaves(as_call((IMAGES, IMAGES)))) == 2


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_with_batch(n):
    ids = torch.randint(5, 9, (2, 6))
    table = torch.randn(6, 4)
    call = with_batch(as_call((torch.randn(2, 6), ids, ids > 6, table, torch.arange(2))), n)
    x, fresh_ids, mask, same, ints = call.args
    assert x.shape == fresh_ids.shape == mask.shape == (n, 6)
    assert ints.shape == (n,)
    assert torch.equal(same, table)
    assert set(fresh_ids.flatten().tolist()) <= set(ids.flatten().tolist())
    assert mask.dtype is torch.bool
    assert batch_size(call) == n


def test_with_batch_is_fresh_and_keeps_the_global_random_state():
    state = torch.get_rng_state()
    call = with_batch(as_call(torch.zeros(2, 6)), 2)
    assert call.args[0].abs().min() > 0
    assert torch.equal(state, torch.get_rng_state())
    infinite = with_batch(as_call(torch.full((2, 2), -torch.inf)), 2)
    assert torch.isinf(infinite.args[0]).all()

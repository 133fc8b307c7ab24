"""Calibration data: what `data` may be, and that every stage reads it afresh."""

import pytest
import torch

from fxzip.calibration.sources import Calibration, PerModel
from fxzip.tracing.calls import as_call

SAMPLE = as_call(torch.zeros(2, 3))


def batch(value, rows=4):
    return torch.full((rows, 3), float(value))


def calibrated(data, models=2, progress=False, sample=SAMPLE):
    return Calibration.of(data, sample, models, progress)


def values(calls):
    return [call.args[0][0, 0].item() for call in calls]


def labelled(calibration):
    return [(number, call.args[0][0, 0].item()) for number, call in calibration("x").by_source()]


def test_batches_are_read_as_often_as_stages_ask():
    calls = calibrated([batch(1), batch(2)])("observing")
    assert values(calls) == values(calls) == [1, 2]


def test_an_iterator_is_drained_once_and_replayed():
    calibration = calibrated(batch(i) for i in range(3))
    assert values(calibration("observing")) == values(calibration("refitting")) == [0, 1, 2]


@pytest.mark.parametrize("data", [
    PerModel([batch(1)], [batch(2), batch(3)]),
    (iter([batch(1)]), (batch(i) for i in (2, 3))),
    PerModel(iter([batch(1)]), (batch(i) for i in (2, 3))),
    PerModel([(batch(1), 0)], [(batch(2), 1), (batch(3), 1)]),
])  # fmt: skip
def test_sources_per_model_keep_their_number(data):
    calibration = calibrated(data)
    assert labelled(calibration) == labelled(calibration) == [(0, 1), (1, 2), (1, 3)]
    assert calibration.description == "calibrated on 2 sources of data, one per model"


@pytest.mark.parametrize("data", [
    [batch(1), batch(2)], [(batch(1), torch.zeros(4)), (batch(2), torch.zeros(4))], [[batch(1), 0], [batch(2), 0]],
])  # fmt: skip
def test_as_many_batches_as_models_are_no_sources(data):
    assert labelled(calibrated(data)) == [(0, 1), (0, 2)]
    assert calibrated(data).description == "calibrated on `data`"


def test_lists_of_one_tensor_each_are_batches_without_labels():
    sources = [batch(1)], [batch(2)]
    assert labelled(calibrated(sources)) == [(0, 1), (0, 2)]
    assert labelled(calibrated(PerModel(*sources))) == [(0, 1), (1, 2)]


def test_a_list_of_another_length_than_models_is_a_list_of_batches():
    assert labelled(calibrated([batch(1), batch(2)], models=3)) == [(0, 1), (0, 2)]


def test_dicts_are_batches():
    sample = as_call({"x": torch.zeros(2, 3)})
    calibration = calibrated([{"x": batch(1), "label": 5}, {"x": batch(2)}], sample=sample)
    assert [call.kwargs["x"][0, 0].item() for call in calibration("x")] == [1, 2]


@pytest.mark.parametrize("sample", [batch(7), (batch(7),), {"x": batch(7)}])
def test_without_data_the_sample_serves_and_a_note_says_so(sample):
    calibration = calibrated(None, sample=as_call(sample))
    (call,) = calibration("observing")
    assert torch.equal((call.kwargs.get("x") if call.kwargs else call.args[0]), batch(7))
    assert calibration.description == "calibrated on `sample_input`"
    assert calibration.notes == [
        "no `data` was given: `sample_input` served as calibration data, which is far too little to match by"
    ]


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_the_bar_shows_on_a_terminal_only_unless_forced(progress, shown, capsys):
    list(calibrated([batch(1)], progress=progress)("observing"))
    assert ("observing" in capsys.readouterr().err) == shown

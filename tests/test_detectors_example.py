"""`docs/examples/detectors.py`: the joined detector finds the boxes of the detectors."""

import copy
import sys
from pathlib import Path

import pytest
import torch

import fxzip

pytest.importorskip("torchvision")
sys.path.append(str(Path(__file__).parents[1] / "docs" / "examples"))

import detectors as example


def untrained(labels, seed):
    """A detector with random weights, with scores that are spread and boxes that have an area."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = example.detector(len(labels)).eval()
        for parameter in network.head.classification_head.cls_logits.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        torch.nn.init.constant_(network.head.regression_head.bbox_reg.bias, 2.0)
    return network


@pytest.fixture(scope="module")
def pair():
    return {task: untrained(own, seed) for seed, (task, own) in enumerate(example.TASKS.items())}


def apart(detectors, images):
    raw = [example.Raw(one).eval() for one in detectors.values()]
    return example._Named(fxzip.side_by_side(raw, images))


def found_by(network, like, images, labels=example.LABELS, tasks=example.TASKS):
    with torch.no_grad():
        return example.Joined(network, like, labels, tasks).eval()(images)


def test_joined_detectors_find_what_they_find_apart(pair):
    images, _ = example.draw(3, example.LABELS, seed=5)
    joined = found_by(apart(pair, images), pair["round"], images)
    with torch.no_grad():
        own = {task: one(list(images)) for task, one in pair.items()}
    for number, boxes in enumerate(joined):
        expected = []
        for task, found in own.items():
            places = torch.tensor([example.LABELS.index(label) for label in example.TASKS[task]])
            one = found[number]
            expected.append(torch.cat([one["boxes"], one["scores"][:, None], places[one["labels"]][:, None]], 1))
        rows = torch.cat(expected)
        best = rows[rows[:, 4].argsort(descending=True)][: len(boxes["scores"])]
        assert len(boxes["labels"].unique()) > 2  # of both detectors
        got = torch.cat([boxes["boxes"], boxes["scores"][:, None], boxes["labels"][:, None]], 1)
        torch.testing.assert_close(got, best)


def test_a_class_that_both_know_is_found_once(pair):
    images, _ = example.draw(2, example.LABELS, seed=5)
    twins = {"a": pair["round"], "b": pair["round"]}
    tasks = {"a": ("disc", "square"), "b": ("disc", "square")}
    raw = fxzip.side_by_side([example.Raw(one).eval() for one in twins.values()], images)

    class Named(torch.nn.Module):
        def forward(self, x):
            return dict(zip(tasks, raw(x), strict=True))

    both = found_by(Named(), pair["round"], images, ("disc", "square"), tasks)
    with torch.no_grad():
        own = pair["round"](list(images))
    for joined, one in zip(both, own, strict=True):
        torch.testing.assert_close(joined["boxes"], one["boxes"])
        torch.testing.assert_close(joined["scores"], one["scores"])


@pytest.mark.slow
def test_a_detector_and_its_relabelled_copy_are_zipped_behind_the_neck_without_loss(pair):
    images, _ = example.draw(4, example.LABELS, seed=6)
    sample = torch.stack([pair["round"].transform.normalize(image) for image in images]).double()
    network = example.Raw(copy.deepcopy(pair["round"])).eval().double()  # where rounding hides nothing
    raw = {"round": network, "pointed": fxzip.relabel(network, sample)}
    options = {"until": "backbone", "method": "weights", "refit": None, "verify": False, "progress": False}
    zipped = fxzip.compile_zip(raw, sample, **options)
    parameters = {name for name, _ in zipped.named_parameters()}
    assert {name.split(".")[0] for name in parameters if "fpn" in name} == {"trunk"}
    assert {name.split(".")[0] for name in parameters if "classification_head" in name} == {"head_0", "head_1"}
    outputs = zipped(sample)
    for task, one in raw.items():
        for key, value in one(sample).items():
            torch.testing.assert_close(outputs[task][key], value)

"""Accuracy of several heads."""

import pytest
import torch

from fxzip.tools.accuracy import evaluate_heads

TASKS = [[0, 2], [1, 3]]


def two_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of x in class order 0, 1, 2, 3 as the logits of the heads of `TASKS`."""
    return x[:, [0, 2]], x[:, [1, 3]]


def test_perfect_logits_are_right_everywhere():
    labels = torch.randint(0, 4, (50,))
    accuracy = evaluate_heads(two_heads, torch.eye(4)[labels], labels, TASKS, batch_size=7)
    assert accuracy.per_task == (1.0, 1.0)
    assert accuracy.average == accuracy.joint == 1.0


def test_per_task_ignores_the_other_head_and_joint_does_not():
    images = torch.tensor([[2.0, 9.0, 1.0, 0.0], [0.0, 3.0, 0.0, 1.0]])
    accuracy = evaluate_heads(two_heads, images, torch.tensor([0, 1]), TASKS)
    assert accuracy.per_task == (1.0, 1.0)
    assert accuracy.joint == 0.5


def test_per_task_counts_only_images_of_its_own_classes():
    images = torch.eye(4)[torch.tensor([0, 0, 2, 1])]
    accuracy = evaluate_heads(two_heads, images, torch.tensor([0, 2, 2, 1]), TASKS)
    assert accuracy.per_task == pytest.approx((2 / 3, 1.0))
    assert accuracy.average == pytest.approx(5 / 6)
    assert accuracy.joint == pytest.approx(3 / 4)


def test_images_of_no_task_are_left_out():
    images = torch.eye(4)[torch.tensor([0, 1, 3])]
    accuracy = evaluate_heads(two_heads, images, torch.tensor([0, 1, 9]), TASKS)
    assert accuracy.joint == 1.0


def test_three_heads():
    labels = torch.arange(6)
    accuracy = evaluate_heads(lambda x: x.split(2, dim=1), torch.eye(6), labels, [[0, 1], [2, 3], [4, 5]])
    assert accuracy.per_task == (1.0, 1.0, 1.0)
    assert accuracy.as_dict() == {"per_task": (1.0, 1.0, 1.0), "average": 1.0, "joint": 1.0}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([[0, 1, 2, 3]], "needs one output per task; 2 outputs for 1 tasks"),
        ([[0, 2, 5], [1, 3]], r"2 logits for classes \[0, 2, 5\]"),
        ([[0, 2], [7, 8]], r"none of 4 has one of the classes \[7, 8\]"),
    ],
)
def test_what_does_not_fit_is_named(tasks, message):
    with pytest.raises(ValueError, match=message):
        evaluate_heads(two_heads, torch.eye(4), torch.zeros(4, dtype=torch.int64), tasks)

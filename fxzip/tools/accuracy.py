"""Accuracy of several classifier heads: each on its own classes, and all together.

For K heads with logits z_k over the classes of task k, on an image of class y:
per task, head k alone decides among its own classes, on the images of those classes: argmax z_k;
jointly, the logits of all heads are put side by side in task order and the argmax is taken over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class HeadAccuracy:
    """Accuracies in [0, 1].

    Attributes:
        per_task: of each head on the images of its own classes.
        average: mean of `per_task`.
        joint: of all heads together on the images of all tasks.
    """

    per_task: tuple[float, ...]
    average: float
    joint: float

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


def evaluate_heads(
    forward: Forward, images: Tensor, labels: Tensor, tasks: Sequence[Sequence[int]], *, batch_size: int = 100
) -> HeadAccuracy:
    """Accuracy of K heads: `forward(images)` gives one tensor of logits per task, column i for class `tasks[k][i]`.

    >>> heads = lambda x: (x[:, :2], x[:, 2:])
    >>> images = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 0.0, 2.0, 4.0], [1.0, 0.0, 4.0, 2.0]])
    >>> evaluate_heads(heads, images, torch.tensor([5, 5, 8]), [[5, 6], [8, 9]])
    HeadAccuracy(per_task=(1.0, 1.0), average=1.0, joint=0.6666666666666666)

    Shapes: images [n, ...], labels [n]. Images of no task are left out; a task without images is a ValueError.
    """
    classes = torch.tensor([label for task in tasks for label in task], device=labels.device)
    known = torch.isin(labels, classes)
    images, labels = images[known], labels[known]
    with torch.no_grad():
        outputs = [tuple(forward(batch)) for batch in images.split(batch_size)]
    logits = [torch.cat(head).to(labels.device) for head in zip(*outputs, strict=True)]
    if len(logits) != len(tasks):
        raise ValueError(f"`evaluate_heads` needs one output per task; {len(logits)} outputs for {len(tasks)} tasks.")
    per_task = tuple(_task_accuracy(head, labels, task) for head, task in zip(logits, tasks, strict=True))
    joint = classes[torch.cat(logits, dim=1).argmax(dim=1)] == labels
    return HeadAccuracy(per_task, sum(per_task) / len(per_task), joint.double().mean().item())


def _task_accuracy(logits: Tensor, labels: Tensor, task: Sequence[int]) -> float:
    """Share of the images of `task` that its own head gets right."""
    classes = torch.tensor(task, device=labels.device)
    if logits.shape[1] != len(classes):
        raise ValueError(f"A head needs one logit per class of its task; {logits.shape[1]} logits for classes {task}.")
    own = torch.isin(labels, classes)
    if not own.any():
        raise ValueError(f"A task needs at least one image; none of {len(labels)} has one of the classes {task}.")
    return (classes[logits[own].argmax(dim=1)] == labels[own]).double().mean().item()

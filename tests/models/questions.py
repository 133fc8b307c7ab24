"""Questions about a value, in a file without a model."""

from torch import Tensor


def is_tensor(value):
    return isinstance(value, Tensor)


def can_be_called(value):
    return callable(value)

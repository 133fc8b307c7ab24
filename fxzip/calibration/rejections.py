"""What is said of batches that the models do not take, or cannot be fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, FxzipError
from ..tracing.calls import Call, leaves

_FEW = 8  # items of a list that messages list


def without_places(value: Tensor) -> str:
    """What a tensor is that has no values, or not one at each place; "" for all others."""
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"one of layout `{value.layout}`"
    return "one on the device `meta`" if value.is_meta else ""


def made_tensors(batch: Any) -> str:
    """A suggestion for a batch with lists of numbers in the place of tensors; "" for all others."""
    if isinstance(batch, Call):
        batch = batch.kwargs or batch.args
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    if any(_numbers(value) for value in values):
        return 'Make tensors of the lists of numbers, e.g. by `return_tensors="pt"` of a tokenizer.'
    return ""


def _numbers(value: Any) -> bool:
    """Whether a value is a list of numbers, or of such lists."""
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
        if isinstance(value, (int, float)):
            return True
    return False


def dimensions(value: Any, like: Tensor) -> str:
    """What is wrong with the number of dimensions."""
    if isinstance(value, Tensor) and value.ndim == like.ndim - 1:
        return (
            f"{like.ndim} dimensions are needed, the first of them the batch. Pass a DataLoader if these are single "
            "inputs"
        )
    return f"{like.ndim} dimensions are needed"


def wrong_shape(batch: Call, index: int, sample: Call, cause: Exception) -> DataError:
    """The error to raise when the models do not take batch `index`.

    >>> import torch
    >>> from fxzip.tracing.calls import as_call
    >>> sample = as_call(torch.ones(2, 3, 8, 8))
    >>> print(wrong_shape(as_call(torch.ones(4, 1, 8, 8)), 7, sample, ValueError("3 channels expected")))
    Batch 7 of `data` has shape (4, 1, 8, 8); the models were traced with (2, 3, 8, 8): 3 channels expected
    """
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    if isinstance(cause, IndexError):
        reason = f"{reason.rstrip('.')}. Numbers must be below the length of the tables that they are looked up in"
    found, traced = describe(batch), describe(sample)
    return DataError(f"Batch {index} of `data` has shape {found}; the models were traced with {traced}: {reason}")


def run_on(run: Callable[[], Any], batch: Call, index: int, sample: Call) -> Any:
    """What a model gives on batch `index`.

    >>> run_on(lambda: 3, Call((), {}), 0, Call((), {}))
    3

    Raises:
        DataError: it does not take the batch, whatever exception says so.
    """
    try:
        return run()
    except FxzipError:
        raise
    except Exception as error:
        raise wrong_shape(batch, index, sample, error) from error


def not_finite(features: int, node: str, network: str, index: int, batch: Call | None = None) -> DataError:
    """The error to raise when features on batch `index` are not finite; `batch`: the batch itself, if it is at hand.

    >>> print(not_finite(3, "layer1_conv", "model 0", 7))
    Features must be finite; node `layer1_conv` of model 0 gave 3 non-finite features on batch 7 of `data`. Look for \
overflow, or for NaN in the data or the parameters.
    """
    odd = sum(int((~value.isfinite()).sum()) for value in leaves(batch)) if batch is not None else 0
    itself = f" The batch itself holds {odd} that {'is' if odd == 1 else 'are'} not finite." if odd else ""
    return DataError(
        f"Features must be finite; node `{node}` of {network} gave {features} non-finite features on batch {index} of "
        f"`data`. Look for overflow, or for NaN in the data or the parameters.{itself}"
    )


def describe(value: Any) -> str:
    """The shapes of a batch, in its structure.

    >>> describe({"ids": torch.ones(2, 3), "length": 3})
    "{'ids': (2, 3), 'length': `int`}"
    """
    if isinstance(value, Call):
        value = value.kwargs or (value.args[0] if len(value.args) == 1 else value.args)
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        if len(value) <= _FEW:
            return "[" + ", ".join(describe(item) for item in value) + "]"
        return f"a `{type(value).__name__}` of {len(value)} that starts with {describe(value[0])}"
    return f"`{type(value).__name__}`"

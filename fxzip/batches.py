"""Calibration batches as calls: each is brought to the form of the sample input, whatever container it came in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import DataError
from .inputs import Call, JointCall, batch_size, leaves


def replayable(data: Any) -> Iterable[Any]:
    """The data as something that can be iterated several times; an iterator is drained into a list, once.

    >>> import torch
    >>> data = replayable(torch.ones(1) for _ in range(2))
    >>> len(list(data)), len(list(data))
    (2, 2)
    """
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise DataError(
            f"`data` must be an iterable of batches; found `{type(data).__name__}`. "
            "Pass a DataLoader, or a list of tensors."
        )
    return list(data) if isinstance(data, Iterator) else data


def batches(data: Any, sample: Call) -> Iterator[Call]:
    """Every batch of `data` as a call of the sample's form, on the sample's device, floats in the sample's dtype.

    >>> import torch
    >>> from fxzip.inputs import as_call
    >>> images, labels = torch.ones(4, 3), torch.zeros(4)
    >>> [call.args[0].shape for call in batches([(images, labels)], as_call(torch.ones(1, 3)))]
    [torch.Size([4, 3])]
    """
    index = -1
    for index, batch in enumerate([data] if isinstance(data, (Tensor, Mapping)) else data):
        if isinstance(sample, JointCall):
            yield _joined(batch, index, sample)
        else:
            yield _checked(_in_form(batch, index, sample), index, sample)
    if index < 0:
        raise DataError("`data` must yield at least one batch; it gave none.")


def _in_form(batch: Any, index: int, sample: Call) -> Call:
    if sample.kwargs:
        return _keywords(batch, index, sample)
    wanted = len(sample.args)
    if isinstance(batch, (tuple, list)) and len(batch) > 0:
        for candidate in (batch, batch[0]):
            if (
                isinstance(candidate, (tuple, list))
                and len(candidate) >= wanted
                and (wanted > 1 or candidate is not batch)
            ):
                given = tuple(candidate[:wanted])
                if all(_alike(a, b) for a, b in zip(given, sample.args, strict=True)):
                    return Call(given, {})
        batch = batch[0]
    if wanted == 1 and (isinstance(batch, Tensor) or not isinstance(sample.args[0], Tensor)):
        return Call((batch,), {})
    raise DataError(
        f"Batch {index} of `data` must hold {_plural(wanted, 'input')} like `sample_input`, {_describe(sample)}; found "
        f"{_describe(batch)}. Let `data` yield batches of that form, labels after the inputs."
    )


def _joined(batch: Any, index: int, sample: JointCall) -> JointCall:
    """A batch of inputs that belong together, one for each model."""
    for candidate in (batch, batch[0] if isinstance(batch, (tuple, list)) and batch else None):
        if isinstance(candidate, (tuple, list)) and len(candidate) >= len(sample.parts):
            given = list(zip(candidate, sample.parts, strict=False))
            if all(_is_part(value, part) for value, part in given):
                calls = [_checked(_in_form(value, index, part), index, part) for value, part in given]
                if len(sizes := {batch_size(call) for call in calls}) > 1:
                    raise DataError(
                        f"Batch {index} of `data` must hold inputs that belong together, as many of each model; found "
                        f"{', '.join(str(n) for n in sorted(n or 0 for n in sizes))}."
                    )
                return JointCall.of(calls)
    raise DataError(
        f"Batch {index} of `data` must hold the inputs of all {len(sample.parts)} models that belong together, like "
        f"{', '.join(_describe(part) for part in sample.parts)}; found {_describe(batch)}. Let `data` yield tuples "
        "with an input for each model, labels after them."
    )


def _is_part(value: Any, sample: Call) -> bool:
    """Whether a value, taken as it is, can be the input of one model."""
    if sample.kwargs:
        return isinstance(value, Mapping)
    if len(sample.args) == 1:
        return _alike(value, sample.args[0])
    return isinstance(value, (tuple, list)) and len(value) == len(sample.args)


def _keywords(batch: Any, index: int, sample: Call) -> Call:
    if isinstance(batch, (tuple, list)) and len(batch) > 0:
        batch = batch[0]
    required = [key for key, value in sample.kwargs.items() if leaves(value)]
    if isinstance(batch, Tensor) and len(required) == 1:
        batch = {required[0]: batch}
    if not isinstance(batch, Mapping):
        raise DataError(
            f"Batch {index} of `data` must be a dict like `sample_input`, with the keys {_names(required)}; found "
            f"{_describe(batch)}. Let `data` yield dicts."
        )
    missing = [key for key in required if key not in batch]
    if missing:
        raise DataError(
            f"Batch {index} of `data` must have the keys of `sample_input`, {_names(required)}; {_names(missing)} "
            f"missing, found {_names(batch)}. Let `data` yield dicts with these keys; further ones are dropped."
        )
    return Call((), {key: batch.get(key, value) for key, value in sample.kwargs.items()})


def _checked(batch: Call, index: int, sample: Call) -> Call:
    """The batch moved to the sample's device and dtype, after a check of structure, dimensions and kind of dtype."""
    given, _structure = pytree.tree_flatten((batch.args, batch.kwargs))
    wanted, expected = pytree.tree_flatten((sample.args, sample.kwargs))
    if len(given) != len(wanted):
        raise DataError(
            f"Batch {index} of `data` must have the structure of `sample_input`, {_describe(sample)}; found "
            f"{_describe(batch)}. Let `data` yield batches of that form."
        )
    moved = []
    for value, like in zip(given, wanted, strict=True):
        if isinstance(like, Tensor):
            if not isinstance(value, Tensor) or value.ndim != like.ndim:
                raise wrong_shape(batch, index, sample, ValueError(f"{like.ndim} dimensions are needed"))
            if _kind(value) != _kind(like):
                raise DataError(
                    f"Batch {index} of `data` must have the kind of dtype of `sample_input`, {like.dtype}; found "
                    f"{value.dtype}. Convert it in the data, e.g. `images.float() / 255`."
                )
            value = value.detach().to(like.device, like.dtype if like.is_floating_point() else value.dtype)
        moved.append(value)
    args, kwargs = pytree.tree_unflatten(moved, expected)
    return Call(args, kwargs)


def wrong_shape(batch: Call, index: int, sample: Call, cause: Exception) -> DataError:
    """The error to raise when the models do not take batch `index`.

    >>> import torch
    >>> from fxzip.inputs import as_call
    >>> sample = as_call(torch.ones(2, 3, 8, 8))
    >>> print(wrong_shape(as_call(torch.ones(4, 1, 8, 8)), 7, sample, ValueError("3 channels expected")))
    Batch 7 of `data` has shape (4, 1, 8, 8); the models were traced with (2, 3, 8, 8): 3 channels expected
    """
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    found, traced = _describe(batch), _describe(sample)
    return DataError(f"Batch {index} of `data` has shape {found}; the models were traced with {traced}: {reason}")


def not_finite(features: int, node: str, network: str, index: int) -> DataError:
    """The error to raise when features on batch `index` are not finite.

    >>> print(not_finite(3, "layer1_conv", "model 0", 7))
    Features must be finite; node `layer1_conv` of model 0 gave 3 non-finite features on batch 7 of `data`. Look for \
overflow, or for NaN in the data or the parameters.
    """
    return DataError(
        f"Features must be finite; node `{node}` of {network} gave {features} non-finite features on batch {index} of "
        "`data`. Look for overflow, or for NaN in the data or the parameters."
    )


def _alike(value: Any, like: Any) -> bool:
    if isinstance(like, Tensor):
        return isinstance(value, Tensor) and value.ndim == like.ndim and _kind(value) == _kind(like)
    return not isinstance(value, Tensor)


def _kind(value: Tensor) -> str:
    return "float" if value.is_floating_point() or value.is_complex() else "int"


def _describe(value: Any) -> str:
    if isinstance(value, Call):
        value = value.kwargs or (value.args[0] if len(value.args) == 1 else value.args)
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_describe(item) for item in value) + "]"
    return f"`{type(value).__name__}`"


def _names(keys: Iterable[Any]) -> str:
    return ", ".join(f"`{key}`" for key in keys) or "none"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

"""Calibration batches as calls: each is brought to the form of the sample input, whatever container it came in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import DataError
from ..tracing.calls import Call, JointCall, batch_size, leaves
from ..tracing.containers import flatten
from .rejections import describe, dimensions, made_tensors, without_places, wrong_shape


def batches(data: Any, sample: Call) -> Iterator[Call]:
    """Every batch of `data` as a call of the sample's form, floats in the sample's dtype, on the device it comes on.

    >>> import torch
    >>> from fxzip.tracing.calls import as_call
    >>> images, labels = torch.ones(4, 3), torch.zeros(4)
    >>> [call.args[0].shape for call in batches([(images, labels)], as_call(torch.ones(1, 3)))]
    [torch.Size([4, 3])]
    """
    index, rows = -1, 0
    for index, given in enumerate([data] if isinstance(data, (Tensor, Mapping)) else data):
        batch, call = as_tensors(given), sample
        if isinstance(sample, JointCall):
            call = _joined(batch, index, sample)
        else:
            call = call_of(batch, index, sample)
        size = batch_size(call)
        if size != 0:  # of an empty batch there is nothing to learn, not even a mean
            rows += size or 1
            yield call
    if index < 0:
        raise DataError("`data` must yield at least one batch; it gave none.")
    if not rows:
        raise DataError(f"`data` must yield at least one input; all of its batches ({index + 1}) are empty.")


def call_of(batch: Any, index: int, sample: Call) -> Call:
    """Batch `index`, of tensors, as a call of the sample's form. Labels behind the inputs are dropped.

    Raises:
        DataError: it has another form.
    """
    return _checked(_in_form(batch, index, sample), index, sample)


def as_tensors(value: Any) -> Any:
    """A batch with numpy arrays made tensors. Tuples, lists and dicts that hold some become plain ones; all others stay
    what they are, since models may ask more of them than items.

    >>> as_tensors([np.zeros(2), "a"])
    [tensor([0., 0.], dtype=torch.float64), 'a']
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value))  # a copy: the array may be read-only or lie backwards
    if isinstance(value, Mapping):
        made = {key: as_tensors(item) for key, item in value.items()}
        return made if any(made[key] is not item for key, item in value.items()) else value
    if isinstance(value, (tuple, list)):
        items = [as_tensors(item) for item in value]
        changed = any(new is not old for new, old in zip(items, value, strict=True))
        return (items if type(value) is list else tuple(items)) if changed else value
    return value


def fits(value: Any, sample: Call) -> bool:
    """Whether a value has the form of a batch: kind and number of dimensions of the sample's tensors.

    >>> from fxzip.tracing.calls import as_call
    >>> fits(torch.ones(4, 3), as_call(torch.ones(1, 3))), fits(torch.ones(4), as_call(torch.ones(1, 3)))
    (True, False)
    """
    try:
        _checked(_in_form(as_tensors(value), 0, sample), 0, sample)
    except DataError:
        return False
    return True


def single(item: Any, sample: Call) -> bool:
    """Whether an item of a dataset is one input without a batch axis, not a batch."""
    item = as_tensors(item)
    if isinstance(sample, JointCall) or fits(item, sample):
        return False
    flat = item.values() if isinstance(item, Mapping) else item if isinstance(item, (tuple, list)) else [item]
    likes = [like for like in leaves(sample) if like.ndim]
    found = [value for value in flat if isinstance(value, Tensor)]
    return bool(likes) and any(value.ndim == likes[0].ndim - 1 and _kind(value) == _kind(likes[0]) for value in found)


def _in_form(batch: Any, index: int, sample: Call) -> Call:
    if sample.kwargs:
        return _keywords(batch, index, sample)
    wanted = len(sample.args)
    _check_order(batch, index, sample)
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
        f"Batch {index} of `data` must hold {_plural(wanted, 'input')} like `sample_input`, {describe(sample)}; found "
        f"{describe(batch)}. {_where_else(batch, sample)}"
    )


def _check_order(batch: Any, index: int, sample: Call) -> None:
    """Inputs come first: an item behind the first that alone is like the sample means that labels came first."""
    like = sample.args[0]
    if len(sample.args) > 1 or not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(like, Tensor):
        return
    first = batch[0][0] if isinstance(batch[0], (tuple, list)) and len(batch[0]) else batch[0]

    later = [place for place, value in enumerate(batch) if place and _alike(value, like)]
    if later and isinstance(first, Tensor) and not _alike(first, like):
        raise DataError(
            f"Batch {index} of `data` must start with the inputs, {describe(sample)} of {like.dtype} as in "
            f"`sample_input`; item 0 is {describe(first)} of {first.dtype}, as labels are, and item {later[0]} "
            f"looks like the inputs. Let `data` yield the inputs first: `((b[{later[0]}], b[0]) for b in data)`."
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
        f"{', '.join(describe(part) for part in sample.parts)}; found {describe(batch)}. Let `data` yield tuples "
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
        later = [place for place, value in enumerate(batch) if isinstance(value, Mapping)]
        if later and not isinstance(batch[0], Mapping):
            raise DataError(
                f"Batch {index} of `data` must start with a dict like `sample_input`; item 0 is {describe(batch[0])}, "
                f"item {later[0]} a dict. Let `data` yield the inputs first, labels after them."
            )
        batch = batch[0]
    required = [key for key, value in sample.kwargs.items() if leaves(value)]
    if isinstance(batch, Tensor) and len(required) == 1:
        batch = {required[0]: batch}
    if not isinstance(batch, Mapping):
        raise DataError(
            f"Batch {index} of `data` must be a dict like `sample_input`, with the keys {_names(required)}; found "
            f"{describe(batch)}. Let `data` yield dicts."
        )
    missing = [key for key in required if key not in batch]
    if missing:
        raise DataError(
            f"Batch {index} of `data` must have the keys of `sample_input`, {_names(required)}; {_names(missing)} "
            f"missing, found {_names(batch)}. Let `data` yield dicts with these keys; further ones are dropped."
        )
    return Call((), {key: batch.get(key, value) for key, value in sample.kwargs.items()})


def _checked(batch: Call, index: int, sample: Call) -> Call:
    """The batch in the sample's dtype, after a check of structure, dimensions and kind of dtype."""
    given, structure = flatten((batch.args, batch.kwargs))
    wanted = leaves(sample)
    if len(given) != len(wanted):
        raise DataError(
            f"Batch {index} of `data` must have the structure of `sample_input`, {describe(sample)}; found "
            f"{describe(batch)}. {made_tensors(batch) or 'Let `data` yield batches of that form.'}"
        )
    moved = []
    for value, like in zip(given, wanted, strict=True):
        if odd := without_places(value):
            raise DataError(
                f"Batch {index} of `data` must hold dense tensors with values; found {odd}. Let `data` yield tensors "
                "as `sample_input` has them."
            )
        if value.ndim != like.ndim:
            raise wrong_shape(batch, index, sample, ValueError(dimensions(value, like)))
        if _kind(value) != _kind(like):
            raise DataError(
                f"Batch {index} of `data` must have the kind of dtype of `sample_input`, {like.dtype}; found "
                f"{value.dtype}. Convert it in the data, e.g. `images.float() / 255`."
            )
        same = like.is_floating_point() or like.is_complex() or torch.bool in (like.dtype, value.dtype)
        own = value.detach()
        if type(like) is Tensor and not is_traceable_wrapper_subclass(value):  # an image of torchvision is its pixels
            own = own.as_subclass(Tensor)
        moved.append(own.to(like.dtype if same else value.dtype))
    return Call(*structure.build(moved))


def _alike(value: Any, like: Any) -> bool:
    if isinstance(like, Tensor):
        return isinstance(value, Tensor) and value.ndim == like.ndim and _kind(value) == _kind(like)
    return not isinstance(value, Tensor)


def _kind(value: Tensor) -> str:
    return "complex" if value.is_complex() else "float" if value.is_floating_point() else "int"


def _where_else(batch: Any, sample: Call) -> str:
    """A suggestion for a batch of another form."""
    if numbers := made_tensors(batch):
        return numbers
    if isinstance(batch, Mapping) and len(sample.args) == 1:
        found = [key for key, value in batch.items() if _alike(value, sample.args[0])]
        if found:
            return f"Let `data` yield the inputs alone, e.g. `(b[{found[0]!r}] for b in data)`."
        return "Let `data` yield the inputs alone; or pass a dict as `sample_input` if the models take keywords."
    return "Let `data` yield batches of that form, labels after the inputs."


def _names(keys: Iterable[Any]) -> str:
    return ", ".join(f"`{key}`" for key in keys) or "none"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

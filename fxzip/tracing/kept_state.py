"""What a model keeps between calls: which attributes and buffers a call changes, and those of before put back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

_CONTAINERS = (dict, list, set)
_PLAIN = (*_CONTAINERS, OrderedDict)  # hooks are in the latter; subclasses may refuse to be written into
_Marks = dict[str, tuple[Any, Any]]


def marks(model: nn.Module) -> _Marks:
    """Attributes and buffers of a model and its modules by name, each with what tells whether it has changed.

    >>> net = nn.Sequential(nn.BatchNorm1d(2))
    >>> before = marks(net)
    >>> _ = net[0].running_mean.add_(1), setattr(net[0], "calls", 1)
    >>> changed(before, marks(net))
    ['0.calls', '0.running_mean']
    """
    found: _Marks = {}
    for path, module in model.named_modules():
        held = {key: value for key, value in vars(module).items() if key not in ("_modules", "training")}
        for key, value in {**held, **module._buffers, **module._parameters}.items():
            if not key.startswith("_") or not isinstance(value, dict):
                found[f"{path}.{key}".lstrip(".")] = value, _mark(value)
    return found


def _mark(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if type(value) in _CONTAINERS:
        items = value.values() if isinstance(value, dict) else value
        return len(value), [
            (id(item), _mark(item)) for item in list(items)[:16] if isinstance(item, (Tensor, *_NUMBERS))
        ]
    return value if isinstance(value, _NUMBERS) else None


_NUMBERS = (int, float, str)


def changed(before: Mapping[str, tuple[Any, Any]], after: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Names of what is another one, or has been written into."""
    return sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before
        or name not in after
        or (before[name][0] is not after[name][0] and not isinstance(after[name][0], _NUMBERS))
        or before[name][1] != after[name][1]
    )


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards attributes and buffers of the model are what they were, and dicts, lists and sets among them hold what
    they held: hooks that a first call installs are gone with the mark that they are there.

    >>> net = nn.BatchNorm1d(2)
    >>> with state_kept(net):
    ...     net.calls = net.running_mean.add_(1)
    >>> hasattr(net, "calls"), net.running_mean
    (False, tensor([0., 0.]))
    """
    stores = _stores(model)
    held = [(store, dict(store)) for store in stores]
    contents = [(value, value.copy()) for store in stores for value in store.values() if type(value) in _PLAIN]
    values = [(tensor, tensor.detach().clone()) for tensor in model.buffers()]
    try:
        yield
    finally:
        for store, before in held:
            store.clear()
            store.update(before)
        for live, own in contents:
            _refill(live, own)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)


@contextmanager
def without_proxies(model: nn.Module) -> Iterator[None]:
    """Afterwards no module holds a proxy: what code of the model has put into attributes, buffers, lists and dicts
    while it was traced is taken out again."""
    held = [
        (store, dict(store), {key: value.copy() for key, value in store.items() if type(value) in _CONTAINERS})
        for store in _stores(model)
    ]
    try:
        yield
    finally:
        for store, before, contents in held:
            for key in [key for key, value in store.items() if _is_proxy(value)]:
                del store[key]
                store.update({key: before[key]} if key in before else {})
            for key, value in contents.items():
                live = store.get(key)
                if live is before[key] and any(map(_is_proxy, live.values() if isinstance(live, dict) else live)):
                    _refill(live, value)


def _stores(model: nn.Module) -> list[dict[str, Any]]:
    """Where the modules of a model hold attributes and buffers."""
    return [store for module in model.modules() for store in (vars(module), module._buffers)]


def _refill(live: Any, value: Any) -> None:
    """Let a dict, list or set hold what another one does."""
    live.clear()
    (live.extend if isinstance(live, list) else live.update)(value)


def _is_proxy(value: Any) -> bool:
    return issubclass(type(value), fx.Proxy)

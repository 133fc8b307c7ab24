"""A second type of device that any machine has: `privateuseone`, whose memory is the host's.

PyTorch keeps that type for backends outside of it. Here its tensors are plain tensors of that device: DLPack lets
memory be claimed for it. So they have storages, views, version counters, autograd and fake tensors as those of a GPU
have. What PyTorch has no kernel for on such a device comes to `_fallback`, which calls the CPU's kernel on the same
memory. Results are those of the CPU but for the order of some sums.

It refuses what a GPU refuses: operands elsewhere, but for numbers of no dimension in elementwise calls; a generator of
the CPU; `.numpy()`. It is stricter in one thing: indices must be on the device, where CUDA copies those of the CPU each
time. It counts how often the host and the device have to wait for each other (`copies`). It does not compute beside the
host, has no generator of its own (`torch.Generator(device=...)`), and `torch.load` cannot load to it.

Of the other ways to such a device, a tensor subclass has no storage, so that aliasing, which tracing compares, is not
seen; and under a mode that marks CPU tensors `.device`, which code asks for, is still the CPU.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

import fxzip

NAME = "privateuseone"
DEVICE = torch.device(NAME, 0)
_KEYS = torch._C.DispatchKey
_CPU, _SPARSE_CPU = (torch._C.DispatchKeySet(key) for key in (_KEYS.CPU, _KEYS.SparseCPU))
_aten = torch.ops.aten
_PLACES = {
    _aten.as_strided.default, _aten.set_.source_Storage, _aten.set_.source_Storage_storage_offset,
    _aten.set_.source_Tensor,
}  # fmt: skip
"""Calls that look at no value: the CPU's kernels are those of every device."""
_SPARSE_PARTS = (
    "_indices", "_values", "_nnz", "is_coalesced", "_coalesced_", "sparse_dim", "dense_dim",
    "_sparse_coo_tensor_with_dims", "_sparse_coo_tensor_with_dims_and_tensors",
)  # fmt: skip
"""Those of sparse tensors."""
_ROOT = Path(fxzip.__file__).parent


# Memory


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Block(ctypes.Structure):
    """`DLManagedTensor` of DLPack 0.8, and the shape it points to; the bytes of the tensor come behind it."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("size", ctypes.c_int64),
    ]


_EXTENSION = 12  # DLPack's `kDLExtDev`
_HEADER, _ALIGNED = 128, 64
_libc = ctypes.CDLL(None)
_libc.aligned_alloc.restype, _libc.aligned_alloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t, ctypes.c_size_t]
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def _allocated(size: int) -> Tensor:
    """Bytes of the device. PyTorch frees header and bytes at once, by C's `free`: it may do so while an error is on its
    way, when no Python can run."""
    place = _libc.aligned_alloc(_ALIGNED, -(-(_HEADER + size) // _ALIGNED) * _ALIGNED)
    block = _Block.from_address(place)
    block.data, block.size, block.shape = place + _HEADER, size, place + _Block.size.offset
    block.device, block.ndim, block.dtype = _Device(_EXTENSION, 0), 1, _Type(1, 8, 1)
    block.strides, block.byte_offset, block.context, block.deleter = None, 0, None, _FREE
    return torch.from_dlpack(_new_capsule(place, b"dltensor", None))


def _on_host(value: Tensor) -> Tensor:
    """The tensor of the CPU in the same memory."""
    storage = value.untyped_storage()
    size = storage.nbytes()
    empty = _aten.empty([0], dtype=torch.uint8)
    seen = (
        torch.frombuffer((ctypes.c_char * size).from_address(storage.data_ptr()), dtype=torch.uint8) if size else empty
    )
    return _like(value, _aten.empty([0], dtype=value.dtype), seen.untyped_storage())


def _on_device(value: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """The tensor of the device in the same memory; where that is the host's, its bytes are copied, once."""
    if value.dtype is torch.float64 and not has_float64:
        raise TypeError(f"Cannot make a float64 tensor on the device '{NAME}', which holds none.")
    storage = value.untyped_storage()
    if storage.data_ptr() not in storages:
        new = _allocated(storage.nbytes()).untyped_storage()
        ctypes.memmove(new.data_ptr(), storage.data_ptr(), storage.nbytes())
        storages[storage.data_ptr()] = new
    return _like(value, torch._C._acc.create_empty_tensor((0,), value.dtype), storages[storage.data_ptr()])


def _like(value: Tensor, new: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """The new tensor at the place and with the shape of another, in a storage."""
    _put(new, value, storage)
    if value.is_conj():
        torch._C._set_conj(new, True)
    if value.is_neg():
        torch._C._set_neg(new, True)
    return new


def _put(value: Tensor, like: Tensor, storage: torch.UntypedStorage) -> None:
    place = like.storage_offset(), like.size(), like.stride()
    _aten.set_.source_Storage_storage_offset.redispatch(_CPU, value, storage, *place)


# Calls


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The call on the CPU's tensors of the same memory."""
    if op in _PLACES:
        return op.redispatch(_CPU, *args, **kwargs)
    with torch._C.DisableTorchFunction():
        leaves = list(_leaves((*args, *kwargs.values())))
        _check(op, leaves)
        _count(op, args)
        own = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == NAME}
        hosts = {key: _on_host(leaf) for key, leaf in own.items()}
        storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage() for leaf in own.values()}
        storages.pop(0, None)  # what is empty shares nothing

        def on_host(leaf: Any) -> Any:
            return torch.device("cpu") if isinstance(leaf, torch.device) else hosts.get(id(leaf), leaf)

        args = _mapped(on_host, args)
        found = _overload(op, args)(*args, **{name: _mapped(on_host, value) for name, value in kwargs.items()})
        for key, leaf in own.items():  # `out=` of no size, `transpose_`
            host = hosts[key]
            if host.size() != leaf.size() or host.stride() != leaf.stride():
                _put(leaf, host, _on_device(host, storages).untyped_storage())
        back = {id(hosts[key]): leaf for key, leaf in own.items()}

        def on_device(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return back[id(value)] if id(value) in back else _on_device(value, storages)

        return tuple(_mapped(on_device, found)) if isinstance(found, tuple) else _mapped(on_device, found)


def _check(op: Any, leaves: Sequence[Any]) -> None:
    """What a GPU refuses."""
    elsewhere = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type != NAME]
    numbers = torch.Tag.pointwise in op.tags
    if op is not _aten.copy_.default and any(own.dim() or not numbers for own in elsewhere):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and "
            f"{elsewhere[0].device}! ({op})"
        )
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value


def _mapped(function: Callable[[Any], Any], values: Any) -> Any:
    """What a function gives of a leaf, or of the leaves of a list."""
    if isinstance(values, tuple | list):
        return [_mapped(function, value) if isinstance(value, tuple | list) else function(value) for value in values]
    return function(values)


@cache
def _tensor_places(op: Any) -> list[int]:
    """Of the operands that are one tensor each."""
    return [place for place, own in enumerate(op._schema.arguments) if str(own.type) == "Tensor"]


def _overload(op: Any, args: Sequence[Any]) -> Any:
    """The call, or the one of its name that takes numbers: those that PyTorch made tensors of come as numbers again."""
    numbers = any(place < len(args) and not isinstance(args[place], Tensor) for place in _tensor_places(op))
    return op.overloadpacket if numbers else op


def _sparse(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The call on copies of sparse tensors on the CPU; what is sparse in what it returns is made of copies."""
    with torch._C.DisableTorchFunction(), uncounted():
        leaves, spec = pytree.tree_flatten((args, kwargs))
        _check(op, leaves)
        args, kwargs = pytree.tree_unflatten([_copied(leaf, "cpu") for leaf in leaves], spec)
        return pytree.tree_map_only(Tensor, lambda value: _copied(value, NAME), op(*args, **kwargs))


def _copied(leaf: Any, device: str) -> Any:
    """A tensor on another device."""
    if not isinstance(leaf, Tensor):
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf
    if leaf.layout is not torch.sparse_coo:
        return leaf.to(device)
    return _aten._sparse_coo_tensor_with_dims_and_tensors(
        leaf.sparse_dim(), leaf.dense_dim(), leaf.size(), leaf._indices().to(device), leaf._values().to(device),
        dtype=leaf.dtype, layout=torch.sparse_coo, device=device, pin_memory=False, is_coalesced=leaf.is_coalesced(),
    )  # fmt: skip


# What it costs


has_float64 = True
"""False: it refuses float64, as Apple's GPUs do."""
copies: Counter[tuple[str, str]] = Counter()
"""How often the host and the device had to wait for each other, by kind and line of fxzip: something was copied "to the
host" or "to the device", or a "number" was asked for."""
_uncounted = [0]


class uncounted:
    """Inside, nothing is counted."""

    def __enter__(self) -> None:
        _uncounted[0] += 1

    def __exit__(self, *_: object) -> None:
        _uncounted[0] -= 1


def _count(op: Any, args: tuple[Any, ...]) -> None:
    if _uncounted[0]:
        return
    if op is _aten._local_scalar_dense.default:
        copies["number", _line()] += 1
    elif op is _aten.copy_.default and args[0].device != args[1].device:
        copies["to the device" if args[0].device.type == NAME else "to the host", _line()] += 1


def _line() -> str:
    """Where in fxzip a call is made that it does not merely pass on; nothing where it is not made in fxzip."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_ROOT) and frame.f_code.co_name not in ("__torch_dispatch__", "__torch_function__"):
            return f"{path.relative_to(_ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


# Kernels of its own: for these PyTorch has one for every device, which asks for others, or needs memory of its own


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What `copy_` comes to where one of the two is on the device."""
    return _fallback(_aten.copy_.default, target, source, non_blocking)


def _convolution(*args: Any) -> Any:
    return _fallback(_aten.convolution.default, *args)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> Any:
    return _fallback(_aten.convolution_backward.default, grad, x, weight, None, *settings)


def _lstm_cell(gates: Tensor, hidden: Tensor, cell: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    total = sum((own for own in biases if own is not None), gates + hidden)
    entry, forget, value, out = total.chunk(4, 1)
    new = torch.sigmoid(forget) * cell + torch.sigmoid(entry) * torch.tanh(value)
    return torch.sigmoid(out) * torch.tanh(new), new, torch.cat([entry, forget, value, out], 1)


def _gru_cell(gates: Tensor, hidden: Tensor, before: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor]:
    first, second = biases or (None, None)
    reset, update, value = (gates if first is None else gates + first).chunk(3, 1)
    resets, updates, values = (hidden if second is None else hidden + second).chunk(3, 1)
    part = torch.sigmoid(update + updates)
    new = torch.tanh(value + torch.sigmoid(reset + resets) * values)
    return part * before + (1 - part) * new, gates


def _resize(value: Tensor, size: list[int], *, memory_format: torch.memory_format | None = None) -> Tensor:
    """In new memory where the old is too small: that cannot grow."""
    new = torch.empty(size, dtype=value.dtype, device=DEVICE, memory_format=memory_format or torch.contiguous_format)
    storage, kept = value.untyped_storage(), value.untyped_storage().nbytes()
    if new.untyped_storage().nbytes() + value.storage_offset() * value.element_size() > kept:
        larger = torch.empty(kept + new.untyped_storage().nbytes(), dtype=torch.uint8, device=DEVICE)
        larger[:kept].copy_(larger.new_empty(0).set_(storage))
        storage = larger.untyped_storage()
    place = value.storage_offset(), new.size(), new.stride()
    return _aten.set_.source_Storage_storage_offset.redispatch(_CPU, value, storage, *place)


_KERNELS = {
    "_copy_from": _copy,
    "_copy_from_and_resize": _copy,
    "convolution_overrideable": _convolution,
    "convolution_backward_overrideable": _convolution_backward,
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_thnn_fused_gru_cell": _gru_cell,
    "resize_": _resize,
}


# Its place in PyTorch


_clone, _synchronize = torch.UntypedStorage.clone, torch.accelerator.synchronize


def _clone_of_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """`deepcopy` of a tensor asks for it; PyTorch makes storages by allocators in C++."""
    if storage.device.type != NAME:
        return _clone(storage)
    return torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(storage).clone().untyped_storage()


def _wait(device: Any = None, /) -> None:
    """Nothing runs beside the host."""
    if torch.device(device or DEVICE).type != NAME:
        _synchronize(device)


_here = [False]


class _Module(backend_registration._DummyBackendModule):
    """What `torch.cuda` is to "cuda". Random numbers are of the CPU's generator."""

    def is_available(self) -> bool:
        return _here[0]

    def device_count(self) -> int:
        return int(_here[0])

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device="cpu")

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _here[0]


@contextmanager
def second_device() -> Iterator[None]:
    """Inside, PyTorch has the device. Outside it still knows the type, of which there is none."""
    _register()
    _here[0] = True
    try:
        yield
    finally:
        _here[0] = False


@cache
def _register() -> tuple[torch.library.Library, ...]:
    """Once in a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hook())
    every, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_fallback, "PrivateUse1")
    every.fallback(_sparse, "SparsePrivateUse1")
    for name, kernel in _KERNELS.items():
        own.impl(name, kernel, "PrivateUse1")
    for name in _SPARSE_PARTS:
        own.impl(name, partial(getattr(_aten, name).default.redispatch, _SPARSE_CPU), "SparsePrivateUse1")
    torch.UntypedStorage.clone = _clone_of_storage
    torch.accelerator.synchronize = _wait
    return every, own

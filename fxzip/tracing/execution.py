"""Running models and programs without leaving a trace: no gradients, no fused fast paths, random state given back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..errors import ContainerError, SpecializationError
from .calls import Call, map_tensors
from .containers import flatten, is_written
from .dispatch_mode import DispatchMode
from .precision import full_precision
from .randomness import OwnRandomness, own_randomness
from .state import restored_state, seed_python
from .structure import Structure
from .threads import Replacement, ThreadPatch, tracing
from .ways import entered

TOLERANCE = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-4, torch.complex64: 1e-4}
"""Largest difference that counts as rounding, relative to the largest magnitude; 2e-2 for the half precisions."""


_FASTPATH = ThreadPatch(lambda: [(torch.backends.mha, "get_fastpath_enabled", lambda: False)])


def _mask_questions() -> list[Replacement]:
    """What PyTorch's transformer layers ask of a mask: whether it is the causal one, for a faster kernel that gives the
    same, and whether it is a tensor. A trace cannot tell the first, which is about values, and need not."""
    table: list[Replacement] = [
        (nn.modules.transformer, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: is_causal is True),
        (nn.functional, "_none_or_dtype", lambda input: None if input is None else input.dtype),
    ]
    return [(owner, name, own) for owner, name, own in table if hasattr(owner, name)]


_MASKS = ThreadPatch(_mask_questions)


@contextmanager
def quiet_execution(*, seed: int = 0) -> Iterator[OwnRandomness]:
    """No gradients, no fused transformer layers that hide features, random numbers from own generators, which it gives;
    for this thread only, and afterwards all is as it was. No TF32 meanwhile, in any thread.

    >>> state = torch.get_rng_state()
    >>> with quiet_execution():
    ...     _ = torch.rand(3)
    >>> bool((torch.get_rng_state() == state).all())
    True
    """
    with restored_state(), full_precision(), _FASTPATH.inside(), own_randomness(seed) as own, torch.no_grad():
        yield own


@contextmanager
def tracing_execution() -> Iterator[None]:
    """`quiet_execution` for a tracer: one thread at a time."""
    with tracing(), quiet_execution(), _MASKS.inside():
        yield


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Afterwards every module of the models is in the mode, train or eval, that it was in before.

    >>> net = nn.Sequential(nn.Dropout()).eval()
    >>> with modes_kept(net):
    ...     _ = net.train()
    >>> net[0].training
    False
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def run_eager(model: nn.Module, call: Call, *, seed: int = 0) -> Any:
    """Output of the model on copies of the inputs, from a fixed seed, of Python's and NumPy's random numbers as well.

    >>> run_eager(nn.Linear(3, 4), Call((torch.ones(2, 3),), {})).shape
    torch.Size([2, 4])
    """
    own = map_tensors(lambda value: value.detach().clone(), call)
    with quiet_execution(seed=seed):
        seed_python(seed)
        return entered(model, *own.args, **own.kwargs)


def flat_inputs(module: fx.GraphModule, call: Call) -> list[Any]:
    """The arguments of the call in the order of the placeholders, as `torch.fx.Interpreter.run` takes them; copies of
    them if the program writes in place, so that the caller's stay what they are.

    >>> module = fx.symbolic_trace(nn.Linear(3, 4))
    >>> len(flat_inputs(module, Call((), {"input": torch.ones(2, 3)})))
    1
    """
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    if any(_may_write(node, module) for node in module.graph.nodes):
        call = map_tensors(torch.clone, call)
    values = dict(zip([str(node.target) for node in nodes], call.args, strict=False)) | call.kwargs
    return [values[str(node.target)] if str(node.target) in values else node.args[0] for node in nodes]


def _may_write(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether a node looks like one that writes into what it is given."""
    if node.op == "call_module":
        return any(getattr(part, "inplace", False) for part in module.get_submodule(str(node.target)).modules())
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
    written = name.endswith("_") and not name.endswith("__")
    return written or name in _IN_PLACE or "out" in node.kwargs or bool(node.kwargs.get("inplace"))


_IN_PLACE = frozenset(
    ["setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "imatmul", "iand", "ior", "ixor"]
)


@dataclass
class Record:
    """What one run of a program showed: its output, tensor shapes by node, structures of plain containers by node,
    nodes that wrote into older tensors, guards that failed."""

    output: Any = None
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    structures: dict[str, Structure] = field(default_factory=dict)
    mutators: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)


def run_recorded(module: fx.GraphModule, call: Call, *, lenient: bool = False, seed: int = 0) -> Record:
    """Run the graph node by node on copies of the inputs, from a seed. `lenient`: go on where a guard fails.

    >>> module = fx.symbolic_trace(nn.Linear(3, 4))
    >>> sorted(run_recorded(module, Call((torch.ones(2, 3),), {})).shapes.values())
    [torch.Size([2, 3]), torch.Size([2, 4]), torch.Size([2, 4]), torch.Size([4]), torch.Size([4, 3])]
    """
    own = map_tensors(lambda value: value.detach().clone(), call)
    recorder = _Recorder(module, lenient)
    with quiet_execution(seed=seed):
        recorder.record.output = recorder.run(*flat_inputs(module, own))
    return recorder.record


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, lenient: bool) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.record, self.lenient = Record(), lenient

    def run_node(self, n: fx.Node) -> Any:
        with Writes() as writes:
            try:
                value = super().run_node(n)
            except SpecializationError:
                if not self.lenient:
                    raise
                self.record.failed.add(n.name)
                return None
        if writes.written:
            self.record.mutators.add(n.name)
        if isinstance(value, Tensor):
            self.record.shapes[n.name] = value.shape
        elif is_written(value):
            with suppress(ContainerError):
                found, structure = flatten(value)
                self.record.structures |= {n.name: structure} if found else {}
        return value


class Writes(DispatchMode):
    """Sees which memory is written into that was there before: before this mode was entered, or since it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()
        self._born: dict[int, Any] = {}

    def since_last(self) -> set[int]:
        """What was written since the last time it was asked; what has come about since then is old from now on."""
        found, self.written, self._born = self.written, set(), {}
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {storage_of(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        if func._schema.is_mutable:
            for position, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                written = args[position] if position < len(args) else kwargs.get(argument.name)
                tensors = [value for value in tree_leaves(written) if isinstance(value, Tensor)]
                self.written |= {storage_of(value) for value in tensors} - self._born.keys()
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and storage_of(value) not in inputs:
                self._born[storage_of(value)] = value  # the reference keeps the storage's address from being used again
        return result


def storage_of(value: Tensor) -> int:
    """The address of a tensor's memory; it is used again once the memory is free."""
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have no storage
        return id(value)


def difference(found: Any, expected: Any) -> str | None:
    """Why two outputs are not the same up to rounding, or None.

    >>> difference([torch.ones(2)], [torch.zeros(2)])
    'the output differs by inf relative to its largest magnitude'
    >>> difference({"a": 1}, {"a": 1}) is None
    True
    """
    (mine, left), (theirs, right) = flatten(found), flatten(expected)
    return _structure_difference(left, right, mine, theirs)


def _structure_difference(left: Structure, right: Structure, mine: list[Tensor], theirs: list[Tensor]) -> str | None:
    if left.kind is None and right.kind is None:
        return _tensor_difference(mine[left.place], theirs[right.place])
    outlines = _outline(left), _outline(right)
    if left.kind is not None and right.kind is not None and left.is_constant and right.is_constant:
        if _same(left.constant, right.constant):
            return None
        if outlines[0] == outlines[1]:
            return "an output that is no tensor differs"
    if (left.kind, left.keys, len(left.parts)) != (right.kind, right.keys, len(right.parts)) or not left.parts:
        return f"the output is {outlines[0]} instead of {outlines[1]}"
    pairs = zip(left.parts, right.parts, strict=True)
    return next((reason for a, b in pairs if (reason := _structure_difference(a, b, mine, theirs))), None)


def _same(found: Any, expected: Any) -> bool:
    """Objects that cannot be compared are the same if they are of one class."""
    if found is expected:
        return True
    alike = type(found) is type(expected)
    if alike and "__eq__" not in {name for kind in type(expected).__mro__[:-1] for name in vars(kind)}:
        return True
    try:
        return bool(found == expected)
    except Exception:
        return alike


def _tensor_difference(found: Tensor, expected: Tensor) -> str | None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        here, there = (f"{tuple(value.shape)} of {value.dtype}" for value in (found, expected))
        return f"the output is {here} instead of {there}"
    if found.layout != expected.layout:
        return f"the output is of layout {found.layout} instead of {expected.layout}"
    if expected.layout != torch.strided:
        found, expected = found.to_dense(), expected.to_dense()
    if not (expected.is_floating_point() or expected.is_complex()):
        return None if torch.equal(found, expected) else "an integer output differs"
    odd = ~expected.isfinite()
    if odd.any() and not torch.equal(torch.nan_to_num(found[odd]), torch.nan_to_num(expected[odd])):
        return "the output has non-finite values at other places"
    gap = torch.where(odd, 0, found.detach() - expected.detach()).abs()
    scale = torch.where(odd, 0, expected.detach()).abs().max() if expected.numel() else torch.tensor(0.0, device="cpu")
    error = float(gap.max()) if expected.numel() else 0.0
    error = 0.0 if error == 0.0 else error / float(scale) if float(scale) > 0 else float("inf")
    if error <= TOLERANCE.get(expected.dtype, 2e-2):
        return None
    return f"the output differs by {error:.2g} relative to its largest magnitude"


def _outline(structure: Structure) -> str:
    kind, keys, count = structure.kind, list(structure.keys), len(structure.parts)
    if kind is None:
        return "a `Tensor`"
    if structure.is_constant and isinstance(structure.constant, (dict, tuple, list)):
        keys, count = list(structure.constant), len(structure.constant)
    if kind is dict:
        return f"a dict with {keys}"
    return f"a {kind.__name__} of {count}" if kind in (tuple, list) else f"a `{kind.__name__}`"

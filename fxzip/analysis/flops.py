"""FLOPs of a graph, node by node: 2 per multiply-add of products, convolutions, attention, recurrent layers.

torch's counter knows most of them; what it does not know is added here (`_MORE`). Elementwise functions, sums,
normalisations and moves count as none, as in torch. A call of which nothing is known (an operator of another library, a
factorisation) counts as none as well, but is named: shares of FLOPs then leave it out, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..tracing import Program, quiet_execution
from ..tracing.aten_calls import run
from ..tracing.calls import Call
from ..tracing.containers import leaves
from ..tracing.dispatch_mode import DispatchMode
from .rules import RULES, is_pointwise


@dataclass(frozen=True)
class Flops:
    """FLOPs by node, and by node the names of calls whose FLOPs are not known.

    Attributes:
        by_node: of every node.
        unknown: where there are any.
        shapes: of every node that gives a tensor, on the sample.
        plain: nodes that give no tensor, in no container: sizes and other numbers.
    """

    by_node: Mapping[str, int]
    unknown: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    plain: frozenset[str] = frozenset()

    @property
    def total(self) -> int:
        """Of all nodes."""
        return sum(self.by_node.values())


def count_flops(module: fx.GraphModule, call: Call) -> Flops:
    """FLOPs of every node on a sample.

    >>> from torch import nn
    >>> count_flops(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU())), Call((torch.ones(5, 2),), {})).total
    60
    """
    flops: dict[str, int] = {}
    unknown: dict[str, tuple[str, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    plain: set[str] = set()

    def file(node: fx.Node, value: Any) -> Any:
        flops[node.name] = counter.total
        if counter.unknown:
            unknown[node.name] = tuple(counter.unknown)
        counter.total, counter.unknown = 0, {}
        if isinstance(value, Tensor):
            shapes[node.name] = tuple(value.shape)
        elif node.op != "output" and not leaves(value):
            plain.add(node.name)
        return value

    with quiet_execution(), _Counter() as counter:
        run(module, call, on_node=file)
    return Flops(flops, unknown, shapes, frozenset(plain))


_COUNTED: WeakKeyDictionary[Program, Flops] = WeakKeyDictionary()


def flops_of(program: Program) -> Flops:
    """FLOPs of every node of a traced model on its sample; each program is run for that once."""
    if program not in _COUNTED:
        _COUNTED[program] = count_flops(program.module, program.sample)
    return _COUNTED[program]


class _Counter(DispatchMode):
    """Counts the calls of a thread, as torch's `FlopCounterMode` does, which hooks the modules of all threads.

    Not by `run`'s numbered calls: attention counts as one kernel here, and calls of a higher order by their parts.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.unknown: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = _counts(func)
        if count is None and hasattr(func, "decompose") and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if count is not None:
            self.total += int(count(*args, **kwargs, out_val=out))
        elif not _is_light(func, args, kwargs, out):
            space, name = _name(func)
            self.unknown[name if space == "aten" else f"{space}::{name}"] = None
        return out


def _counts(func: Any) -> Callable[..., int] | None:
    """What counts the FLOPs of a call."""
    space, name = _name(func)
    if space == "aten" and name in _MORE:
        return partial(_more, _MORE[name])
    found: Callable[..., int] | None = flop_registry.get(getattr(func, "_overloadpacket", func))
    return found


def _more(count: Callable[..., int], *args: Any, out_val: Any = None, **flags: Any) -> int:
    del flags  # scales and the like
    return count(*args, out=out_val[0] if isinstance(out_val, (tuple, list)) else out_val)


def _name(func: Any) -> tuple[str, str]:
    """Namespace and name of a call."""
    if hasattr(func, "_schema"):
        space, name = func._schema.name.split("::")
        return space, name
    return "higher_order", str(getattr(func, "__name__", func))


def _is_light(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether a call that is not counted cannot cost much: a view, an elementwise function, one without floats in or
    out, and what `_LIGHT` and the table of rules name; of torch's own others what reads one tensor."""
    space, name = _name(func)
    given = [value for value in tree_leaves((args, kwargs)) if _floats(value)]
    if not given or not any(_floats(value) for value in tree_leaves(out)):
        return True
    if space not in ("aten", "prims", "prim"):
        return False
    views = any(result.alias_info is not None for result in func._schema.returns)
    name = name.rstrip("_")
    if views or is_pointwise(func) or name in RULES or name in _LIGHT:
        return True
    return len(given) == 1 and not name.startswith(_HEAVY)


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


_HEAVY = (
    "linalg_",
    "_linalg",
    "cholesky",
    "inverse",
    "matrix_exp",
    "lu_",
    "_lu",
    "svd",
    "qr",
    "geqrf",
    "orgqr",
    "ormqr",
)
_LIGHT = frozenset(
    [
        "_embedding_bag",
        "_embedding_bag_forward_only",
        "segment_reduce",
        "masked_scatter",
        "index_fill",
        "put",
        "_fused_rms_norm",
        "rrelu_with_noise",
        "rrelu_with_noise_functional",
        "_thnn_fused_lstm_cell",
        "_thnn_fused_gru_cell",
        "linalg_vector_norm",
        "linalg_cross",
        "polar",
        "complex",
        "block_diag",
        "dist",
        "nll_loss_forward",
        "nll_loss2d_forward",
        "mse_loss",
        "smooth_l1_loss",
        "huber_loss",
        "binary_cross_entropy",
    ]
)


def _rows(value: Tensor) -> int:
    return value.numel() // max(value.shape[-1], 1) if value.ndim else 1


def _recurrent(weights: Sequence[Any], value: Tensor) -> int:
    """Every weight meets every row of the input once."""
    return 2 * _rows(value) * sum(w.numel() for w in weights if isinstance(w, Tensor) and w.ndim == 2)


def _mm(first: Tensor, other: Tensor) -> int:
    """2 n m p; of a sparse factor only what it holds is multiplied."""
    for value, width in ((first, other.shape[-1]), (other, first.shape[0])):
        if value.layout == torch.sparse_coo:
            return 2 * int(value._nnz()) * int(width)
        if value.layout != torch.strided:
            return 2 * int(value.values().numel()) * int(width)
    return 2 * first.shape[0] * first.shape[1] * other.shape[1]


def _transform(value: Tensor, sizes: Sequence[int], numel: int, real: bool) -> int:
    """5 n log₂ n for each complex transform of length n, half of that for a real one."""
    n = math.prod(sizes)
    return round((2.5 if real else 5) * numel * math.log2(max(n, 1)))


def _sizes(value: Tensor, dims: Sequence[int]) -> list[int]:
    return [int(value.shape[d]) for d in dims]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Scores and their sum of values."""
    heads, rows = math.prod(q.shape[:-2]), q.shape[-2] * k.shape[-2]
    return 2 * heads * rows * (q.shape[-1] + v.shape[-1])


def _trilinear(a: Tensor, b: Tensor, c: Tensor, *expand: Any) -> int:
    wide = []
    for value, dims in zip((a, b, c), expand, strict=False):
        for d in sorted(dims):
            value = value.unsqueeze(d)
        wide.append(value.shape)
    return 2 * int(math.prod(torch.broadcast_shapes(*wide)))


def _grouped(a: Tensor, b: Tensor, out: Tensor) -> int:
    both = a.ndim == 2 and b.ndim == 2
    return 2 * a.shape[0] * b.shape[1] * a.shape[1] if both else 2 * out.numel() * a.shape[-1]


_MORE: dict[str, Callable[..., int]] = {
    "mm": lambda a, b, out: _mm(a, b),
    "_sparse_mm": lambda a, b, out: _mm(a, b),
    "addmm": lambda c, a, b, out: _mm(a, b),
    "_sparse_addmm": lambda c, a, b, out: _mm(a, b),
    "mv": lambda a, b, out: 2 * a.numel(),
    "addmv": lambda c, a, b, out: 2 * a.numel(),
    "dot": lambda a, b, out: 2 * a.numel(),
    "vdot": lambda a, b, out: 2 * a.numel(),
    "addr": lambda c, a, b, out: 2 * out.numel(),
    "addbmm": lambda c, a, b, out: 2 * a.numel() * b.shape[-1],
    "_trilinear": lambda a, b, c, *rest, out: _trilinear(a, b, c, *rest),
    "_cdist_forward": lambda a, b, *rest, out: 2 * out.numel() * a.shape[-1],
    "_euclidean_dist": lambda a, b, out: 2 * out.numel() * a.shape[-1],
    "_pdist_forward": lambda a, *rest, out: 2 * out.numel() * a.shape[-1],
    "_grouped_mm": lambda a, b, *rest, out: _grouped(a, b, out),
    "mkldnn_rnn_layer": lambda x, w, h, *rest, out: _recurrent([w, h], x),
    "_cudnn_rnn": lambda x, weights, *rest, out: _recurrent(weights, x),
    "miopen_rnn": lambda x, weights, *rest, out: _recurrent(weights, x),
    "_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *rest, out: _attention(q, k, v),
    "_scaled_dot_product_attention_math_for_mps": lambda q, k, v, *rest, out: _attention(q, k, v),
    "_scaled_dot_product_fused_attention_overrideable": lambda q, k, v, *rest, out: _attention(q, k, v),
    "_fft_c2c": lambda x, dims, *rest, out: _transform(x, _sizes(x, dims), x.numel(), False),
    "_fft_r2c": lambda x, dims, *rest, out: _transform(x, _sizes(x, dims), x.numel(), True),
    "_fft_c2r": lambda x, dims, *rest, out: _transform(out, _sizes(out, dims), out.numel(), True),
}

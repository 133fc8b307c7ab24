"""One low-level tensor call as the rules see it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .axis_labels import AxisLabels, Operand
from .constraint_store import ConstraintStore


@dataclass(frozen=True, eq=False)
class Invocation:
    """An ATen call with its operands as they were before the call and its result.

    `operand(t)` gives fields and axes of a tensor argument; `restart(t, fields, groups)` gives a parameter other labels
    than one run per axis, once (a grouped convolution's weight has inputs of its own in every group);
    `numbers(t, why)` says that a result holds numbers of places, which fixes features only where it is used: `why()`
    states that then; `lies_in_blocks(t, axis)` says that a parameter is met block by block along an axis, so that each
    block shall have labels of its own.
    """

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any
    store: ConstraintStore
    operand: Callable[[Tensor], Operand]
    restart: Callable[[Tensor, Callable[[], AxisLabels], int], None]
    lies_in_blocks: Callable[..., None] = lambda parameter, blocks, others=(): None
    numbers: Callable[[Tensor, Callable[[], None]], None] = lambda result, why: None

    @property
    def ledger(self) -> ConstraintStore:
        """The former name of `store`."""
        warnings.warn("`call.ledger` is called `call.store` now.", DeprecationWarning, stacklevel=2)
        return self.store

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or name, or its default in the schema."""
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(name, default)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the arguments, those inside lists too."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from (item for item in value if isinstance(item, Tensor))

    def operands(self) -> list[Operand]:
        return [self.operand(tensor) for tensor in self.tensors()]


# A rule returns the fields of the result: one tuple for a single tensor, a list of tuples for several results,
# or None to decline (then the call is a barrier).
Rule = Callable[[Invocation], "AxisLabels | list[AxisLabels] | None"]


def axes_of(dim: Any, ndim: int) -> frozenset[int]:
    """Normalise a `dim` argument (None, int or list) to a set of non-negative axes."""
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return frozenset(range(ndim))
    dims = dim if isinstance(dim, (list, tuple)) else [dim]
    return frozenset(int(d) % max(ndim, 1) for d in dims)


def names(text: str) -> frozenset[str]:
    """Names of calls, written with spaces between them."""
    return frozenset(text.split())


def is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


def is_pointwise(func: Any) -> bool:
    return torch.Tag.pointwise in getattr(func, "tags", ())

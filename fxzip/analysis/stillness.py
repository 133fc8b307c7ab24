"""Random numbers held still: every draw gives its expectation, so that what a network computes can be compared.

A relabelled network that draws noise computes the same function in distribution only: the noise of one feature falls on
another. Without noise it has to compute the same to the bit, but for rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tracing.dispatch_mode import DispatchMode
from .rules import is_random


class Still(DispatchMode):
    """Replaces what calls draw at random by one value for all elements; permutations are drawn as ever.

    >>> with Still():
    ...     torch.randn(2), torch.nn.functional.dropout(torch.ones(2), 0.5)
    (tensor([0., 0.]), tensor([1., 1.]))
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)

        name = func._schema.name.split("::")[-1]
        if name.startswith("rrelu"):
            return func(*args[:4], False, **{key: value for key, value in kwargs.items() if key != "training"})
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)

        arguments = [argument.name for argument in func._schema.arguments]
        if "dropout_p" in arguments:  # attention in one kernel
            place = arguments.index("dropout_p")
            return func(*args[:place], *([0.0] if len(args) > place else []), *args[place + 1 :],
                        **{key: 0.0 if key == "dropout_p" else value for key, value in kwargs.items()})  # fmt: skip

        out = func(*args, **kwargs)
        value = _expected(name, func, args, kwargs) if isinstance(out, Tensor) else None
        return out if value is None else out.copy_(value) if isinstance(value, Tensor) else out.fill_(value)


def _expected(name: str, func: Any, args: Any, kwargs: Any) -> Tensor | float | None:
    """The expectation of a draw; None if it is to stay as it was drawn."""
    own = name.rstrip("_")
    if own in ("multinomial", "randperm"):
        return None
    if own.startswith("rand"):
        return {"rand": 0.5, "rand_like": 0.5, "randn": 0.0, "randn_like": 0.0}.get(own, 0.0)

    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    if own == "bernoulli":
        result = given.get("p", given["self"] if not name.endswith("_") else 0.5)
    elif own == "uniform":
        result = (given.get("from", 0.0) + given.get("to", 1.0)) / 2
    elif own in ("normal", "normal_functional"):
        result = given.get("mean", 0.0)
    elif own == "poisson":
        result = given["self"]
    elif own == "binomial":
        result = given["count"] * given["prob"]
    else:  # exponential, geometric, ...: positive, and of no use as zero
        result = 1.0

    return result if isinstance(result, Tensor) else float(result)

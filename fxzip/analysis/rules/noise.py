"""Random numbers: independent and all alike, so that any order of theirs is as good as another.

Noise gets labels of its own. What is added to it, or multiplied with it, may move as long as the noise moves along,
which in distribution changes nothing; two tensors that meet the same noise move together.
"""

from __future__ import annotations

from torch import Tensor

from .axis_labels import AxisLabels, along, varying
from .elementwise import elementwise
from .invocation import Invocation


def noise(call: Invocation) -> AxisLabels:
    """rand, randn, uniform_ ...: labels along every axis; rand_like and its kin: fields like those of the operand."""
    given = list(call.tensors())
    if given and not call.func._schema.is_mutable:
        return tuple(call.store.fresh(*labels.shape) for labels in call.operand(given[0]).fields)
    out = call.out
    return tuple(along(call.store.fresh(n), axis, out.ndim) for axis, n in enumerate(out.shape) if n > 1)


def given_noise(call: Invocation) -> AxisLabels:
    """bernoulli(p), normal(mean, std), poisson(rate): one draw for each element of the operands."""
    given = list(call.tensors())[1:] if call.func._schema.is_mutable else list(call.tensors())
    if not given or (call.name == "bernoulli" and call.func._overloadname == "p"):
        return noise(call)

    fields = elementwise(call)
    ndim, loose = call.out.ndim, frozenset[int]()

    for operand in map(call.operand, given):
        loose |= operand.place(range(ndim - operand.ndim, ndim), ndim).loose

    apart = loose.union(*map(varying, fields))  # elsewhere draws are of the same distribution
    axes = [axis for axis, n in enumerate(call.out.shape) if n > 1 and axis not in apart]
    return (*fields, *(along(call.store.fresh(call.out.shape[axis]), axis, ndim) for axis in axes))


def drawn(call: Invocation) -> AxisLabels:
    """multinomial(weights, count): positions along the last axis, by number."""
    x = call.operand(call.args[0])
    for labels in x.fields:
        call.store.fix(labels, frozenset({x.ndim - 1}), f"`{call.name}` draws it by number")
    return ()


def rrelu(call: Invocation) -> AxisLabels | list[AxisLabels]:
    """rrelu_with_noise(x, noise, ...): elementwise; the noise is drawn for each element."""
    fields = call.operand(call.args[0]).fields
    return fields if isinstance(call.out, Tensor) else [fields for _ in call.out]

"""Parameters of the trunk that a method of task vectors makes, in place of weighted means.

Features stand where they are in all models and in the base. What is no parameter (running statistics), what the base
cannot have because tracing has made it, and what all models agree in to the bit is merged as ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..matching import Parameter, TaskVectorMethod
from ..partition.region import Trunk


@dataclass(frozen=True, eq=False)
class Combination:
    """A method of task vectors with the base.

    Attributes:
        method: makes one of the parameters.
        base: θ_0, by the names of the trunk's parameters in model 0.
    """

    method: TaskVectorMethod
    base: Mapping[str, Tensor]

    @classmethod
    def of(cls, trunk: Trunk, method: TaskVectorMethod, base: Mapping[str, Tensor] | None) -> Combination:
        """The combination for a trunk.

        Raises:
            InputError: there is no base, or it lacks a parameter of the trunk, or has it in another shape.
        """
        if base is None:
            raise InputError(
                f"`{method.name}` needs `base`, the network that the models were fine-tuned from, or its state dict; "
                'found None. Without it use `method="average"`.'
            )
        return cls(method, base_of(trunk, base))

    def tensors(self, trunk: Trunk, tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """θ* by name in model 0, for those that are combined. `tensors`: of each model, by name."""
        found: list[Parameter] = []
        for name, base in self.base.items():
            values = [tensors[k][twin].detach() for k, twin in enumerate(trunk.alignment.params[name])]
            if any(not torch.equal(value, values[0]) for value in values[1:]):
                dtype = torch.promote_types(values[0].dtype, torch.float32)
                found.append(Parameter(name, base.to(values[0].device, dtype), tuple(v.to(dtype) for v in values)))
        merged = self.method.combine(found)
        return {one.name: value for one, value in zip(found, merged, strict=True)}


def trunk_parameters(trunk: Trunk) -> list[str]:
    """Names in model 0 of the floating parameters that nodes of the trunk read, in the order of the model."""
    read = {param for node in trunk.nodes for param in trunk.labellings[0].touches[node]}
    named = trunk.alignment.programs[0].module.named_parameters()
    return [name for name, value in named if name in read and value.is_floating_point()]


def base_of(trunk: Trunk, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the base has for the parameters of a trunk, by their names in model 0; what tracing has made is left out.

    Raises:
        InputError: it lacks one, or has it in another shape, or with values that are not finite.
    """
    program = trunk.alignment.programs[0]
    own, names = dict(program.module.named_parameters()), trunk_parameters(trunk)
    origins = {name: program.origins[name] for name in names if name in program.origins}
    missing = [name for name, origin in origins.items() if origin not in base]
    if missing:
        raise InputError(
            f"`base` must have all parameters that the models share; {len(missing)} of {len(origins)} are not there, "
            f"the first `{origins[missing[0]]}`, {list(own[missing[0]].shape)} in the first model. Pass the network "
            "that the models were fine-tuned from, or its state dict; its heads may be others, or missing."
        )
    result = {}
    for name, origin in origins.items():
        value = base[origin].detach()
        if value.shape != own[name].shape:
            raise InputError(
                f"`base` must be a network of the models' architecture; they differ first in `{origin}`, "
                f"{list(value.shape)} in the base and {list(own[name].shape)} in the first model."
            )
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"`base` must hold finite numbers; `{origin}` holds others.")
        result[name] = value
    return result

"""A relabelled copy of a model: the same function, its features in another order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..analysis.checking import self_check
from ..analysis.labelling import label
from ..analysis.relabelling import random_relabelling, relabelled
from ..analysis.rules import Rule
from ..analysis.spaces import solve
from ..tracing import check_model, plain_context, trace
from ..tracing.calls import as_call
from ..tracing.option_values import checked
from ..tracing.preparation import copied, folded


@plain_context()
@checked
def relabel(
    model: nn.Module, sample_input: Any, *, seed: int = 0, verify: bool = True, rules: Mapping[str, Rule] | None = None
) -> nn.Module:
    """A copy of a model with all features that may move relabelled at random: other weights, the same function.

    >>> model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 3)
    >>> twin = relabel(model, x)
    >>> torch.equal(twin[0].weight, model[0].weight), torch.allclose(twin(x), model(x), atol=1e-6)
    (False, True)

    What zips perfectly if anything does: `compile_zip(model, relabel(model, x), x, data=...)` gives `model` at both
    heads. Parametrisations (`weight_norm` ...) become plain parameters.

    Args:
        model: any model that `compile_zip` takes.
        sample_input: as for `compile_zip`.
        seed: of the permutations.
        verify: run the self-check first, and leave alone what fails it.
        rules: rule table for ATen calls.

    Raises:
        InputError, TraceError, SelfCheckError: as `compile_zip`.
    """
    program = trace(check_model(model), as_call(sample_input))
    labelling = label(program, rules)
    spaces = self_check(labelling)[0] if verify else solve(labelling)
    perms = random_relabelling(spaces, torch.Generator().manual_seed(seed))
    tensors = {**dict(program.module.named_parameters()), **dict(program.module.named_buffers())}
    values = relabelled({name: value.detach() for name, value in tensors.items()}, spaces, perms)
    twin = folded(copied(check_model(model)))
    # the graph may have safe names in the stead of the model's
    held = {origin: name for name, origin in program.origins.items() if name in values}
    with torch.no_grad():
        for name, own in (*twin.named_parameters(), *twin.named_buffers()):
            if held.get(name, name) in values:
                own.copy_(values[held.get(name, name)])
    return twin.train(model.training)

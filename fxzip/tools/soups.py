"""Model Soups (Wortsman et al., ICML 2022, arXiv 2203.05482): the mean of networks fine-tuned from one initialisation.

Nothing is matched: feature i of one network is feature i of the others, which holds for fine-tunes of one network only.

Uniform soup (section 2): the mean of all. Greedy soup (section 2, recipe 1): sort the networks by their score, best
first; take the first; go once through the others in that order and keep each with which the mean of all that are kept
scores at least as well as without. So the greedy soup never scores below the best network, on what `score` looks at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.arguments import check_models
from ..errors import InputError, OptionError
from ..partition.alignment import align
from ..tracing import plain_context, trace
from ..tracing.option_values import checked
from ..tracing.precision import place_of_float64

KINDS = ("uniform", "greedy")


@dataclass(frozen=True)
class Ingredients:
    """What a soup is made of.

    Attributes:
        models: numbers of the networks in it, in the order in which they came in.
        alone: score of each network; None for a uniform soup without a score.
        scores: score of the soup after each of `models` came in; of a uniform soup only the last.
    """

    models: tuple[int, ...]
    alone: tuple[float, ...] | None = None
    scores: tuple[float, ...] = ()


@plain_context()
@checked
def soup(
    models: Sequence[nn.Module],
    sample_input: Any = None,
    *,
    kind: str = "uniform",
    score: Callable[[nn.Module], float] | None = None,
) -> nn.Module:
    """One network whose parameters are the means of those of several, fine-tuned from one initialisation.

    >>> models = [nn.Linear(2, 1, bias=False) for _ in range(3)]
    >>> for value, model in zip((0.0, 1.0, 5.0), models, strict=True):
    ...     _ = nn.init.constant_(model.weight, value)
    >>> soup(models).weight
    Parameter containing:
    tensor([[2., 2.]], requires_grad=True)
    >>> greedy = soup(models, kind="greedy", score=lambda net: -abs(float(net.weight[0, 0]) - 0.6))
    >>> greedy.fxzip_soup.models, greedy.weight.tolist()
    ((1, 0), [[0.5, 0.5]])

    Args:
        models: two or more of one architecture, heads included.
        sample_input: if given, the networks are traced on it, and their graphs must agree as well.
        kind: "uniform" or "greedy".
        score: of one network, in evaluation mode; greater is better. Held-out accuracy, say. Needed by "greedy".

    Returns:
        A copy of the first network, in evaluation mode, with the means of parameters and floating buffers; integer
        scalars, such as counts of batches, are the first network's. `fxzip_soup` says what went into it.

    Raises:
        OptionError: the networks differ in more than their weights, or `kind` or `score` do not fit.
    """
    if kind not in KINDS:
        raise OptionError(f"`kind` must be one of {', '.join(map(repr, KINDS))}; found {kind!r}.")
    if kind == "greedy" and score is None:
        raise InputError(
            '`kind="greedy"` needs a `score`: a function that takes a network and returns a number, greater is better; '
            "found None. Pass the accuracy on held-out inputs, or take the uniform soup."
        )
    networks = check_models(list(models), "soup")
    _check_alike(networks, sample_input)
    result = copy.deepcopy(networks[0]).eval()
    total = _Total(result)
    if kind == "uniform":
        for network in networks:
            total.add(network)
        total.pour()
        last = () if score is None else (_scored(score, result),)
        record = Ingredients(tuple(range(len(networks))), None, last)
    else:
        assert score is not None
        record = _greedy(networks, result, total, score)
    result.fxzip_soup = record  # type: ignore[assignment]
    return result


def _greedy(
    networks: Sequence[nn.Module], result: nn.Module, total: _Total, score: Callable[[nn.Module], float]
) -> Ingredients:
    """Recipe 1 of the paper; the soup ends up in `result`."""
    alone = []
    for network in networks:
        total.add(network)
        total.pour()
        alone.append(_scored(score, result))
        total.remove(network)
    kept: list[int] = []
    scores: list[float] = []
    for number in sorted(range(len(networks)), key=lambda i: -alone[i]):  # stable: of equals the first comes first
        total.add(networks[number])
        total.pour()
        found = _scored(score, result)
        if not kept or found >= scores[-1]:
            kept.append(number)
            scores.append(found)
        else:
            total.remove(networks[number])
    total.pour()
    return Ingredients(tuple(kept), tuple(alone), tuple(scores))


class _Total:
    """Sums of the floating tensors of networks, in float64; `pour` writes the means into a network."""

    def __init__(self, sink: nn.Module) -> None:
        self.sink = _floating(sink)
        self.kept: list[dict[str, Tensor]] = []

    def add(self, network: nn.Module) -> None:
        self.kept.append(_floating(network))

    def remove(self, network: nn.Module) -> None:
        del self.kept[-1]

    def pour(self) -> None:
        with torch.no_grad():
            for name, own in self.sink.items():
                wide = torch.promote_types(own.dtype, torch.float64)
                place = place_of_float64(own.device)
                own.copy_(torch.stack([part[name].to(place).to(wide) for part in self.kept]).mean(0))


def _floating(network: nn.Module) -> dict[str, Tensor]:
    tensors = (*network.named_parameters(), *network.named_buffers())
    return {name: t.detach() for name, t in tensors if t.is_floating_point() or t.is_complex()}


def _scored(score: Callable[[nn.Module], float], network: nn.Module) -> float:
    with torch.no_grad():
        found = score(network.eval())
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = float("nan")
    if value != value:
        raise InputError(f"`score` must return a number, greater is better; found {found!r}.")
    return value


def _check_alike(networks: Sequence[nn.Module], sample_input: Any) -> None:
    """The same tensors everywhere; with a sample the same graph, too."""
    first = networks[0].state_dict()
    for k, network in enumerate(networks[1:], 1):
        own = network.state_dict()
        lone = next((name for name in (*first, *own) if name not in own or name not in first), None)
        if lone is not None:
            owner = "the first has" if lone in first else f"model {k} has"
            raise InputError(_differ(f"{owner} `{lone}` and the other has not"))
        for name, tensor in first.items():
            if tensor.shape != own[name].shape:
                shapes = f"{tuple(tensor.shape)} and {tuple(own[name].shape)}"
                raise InputError(_differ(f"`{name}` has the shapes {shapes} in the first and model {k}"))
            whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.ndim > 0
            if whole and not torch.equal(tensor, own[name]):
                raise InputError(_differ(f"`{name}`, which holds no floats, has other values in model {k}"))
    if sample_input is not None:
        programs = [trace(network, sample_input, name=f"model {k}") for k, network in enumerate(networks)]
        for k, parting in enumerate(align(programs).parting, 1):
            if parting:
                raise InputError(_differ(f"the graphs of the first and model {k} part: the first {parting}"))


def _differ(how: str) -> str:
    return (
        f"`soup` needs networks that differ in their weights only, fine-tuned from one initialisation; {how}. For "
        'heads of their own use `compile_zip(..., method="average")`.'
    )

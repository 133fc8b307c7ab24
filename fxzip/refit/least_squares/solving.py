"""The regression of one unit: from samples of its calls to its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, fx, nn

from ...errors import OptionError
from ...rewriting.factorised import Factors
from ...rewriting.module import ZippedModule
from ..linear_calls.kernels import effective, install
from ..linear_calls.units import Unit, called
from .alternating import FreeTarget
from .blocks import Blocks
from .memory import Usage
from .ridge import Regression, affine_solution, best_ridge, ridge_solution
from .samples import Sample
from .spill_file import Page, fetched


@dataclass
class Fit:
    """What was fitted: calls fitted, calls left as zipped with the reason, calls whose ridge had to grow,
    how many inputs were used, the memory that was expected and taken, for calls with free features the share of the
    originals' that is lost, what the weights of calls of a given rank are made of and (once the graph has both) their
    ranks, and the calls that were to have a rank and could not be fitted."""

    fitted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    raised: dict[str, float] = field(default_factory=dict)
    inputs: int = 0
    memory: Usage | None = None
    lost: dict[str, float] = field(default_factory=dict)
    factors: dict[fx.Node, Factors] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)

    def take_factors(self) -> dict[fx.Node, Factors]:
        """What the weights of calls of a given rank are made of; kept are only the ranks, by name."""
        found, self.factors = self.factors, {}
        self.ranks = {node.name: len(own.first) for node, own in found.items()}
        return found

    def notes(self) -> list[str]:
        """What the report says of it."""
        notes = [f"least squares fitted {len(self.fitted)} calls"]
        if self.lost:
            worst = max(self.lost, key=lambda name: self.lost[name])
            notes.append(
                f"{len(self.lost)} of them compute whatever tells most of the originals' features; most is lost in "
                f"`{worst}`, {self.lost[worst]:.1%} of what their weights read there"
            )
        for why in dict.fromkeys(self.left.values()):
            names = [f"`{name}`" for name, own in self.left.items() if own == why]
            notes.append(f"left as zipped, since {why}: " + ", ".join(names))
        if self.whole:
            calls = ", ".join(f"`{name}`" for name in self.whole)
            notes.append(f"two calls were asked for, but one stays, since it could not be fitted: {calls}")
        notes += [
            f"`{name}` needed a ridge of {ridge:.0e}: its inputs are rank-deficient"
            for name, ridge in self.raised.items()
        ]
        if self.memory is not None and self.memory.spilled:
            notes.append(f"least squares kept to a bound on memory: {self.memory}")
        if self.memory is not None and self.memory.expected > self.memory.limit:
            notes.append(
                f"one batch, or one regression, takes more than the bound on memory: {self.memory}; smaller batches "
                "mend that, or a larger bound (`fxzip.LeastSquares(memory=...)`)"
            )
        return notes


@dataclass(frozen=True)
class Settings:
    """Settings of `LeastSquares`; the defaults are those of every figure in the docs, of some with `turns=3` as it was
    before, which is no better.

    Attributes:
        ridge: λ relative to the mean diagonal of the Gram matrix. Where fewer than `scarce` positions per input were to
            be had, a tenth of the best on held-out positions of this and up to 10⁴ times as much, if that is more.
        scarce: see `ridge`.
        positions: sampled positions per input of a call, and at least `least` in all.
        least: see `positions`.
        rounds: of majorisation in front of a ReLU, see `ridge_solution`.
        turns: of alternating least squares, at most, where merged features may be any that tell of the originals', see
            `alternating`; 0: none.
        memory: bytes that the activations of all networks, the inputs and the samples of a regression may take at a
            time; what is beyond lies in a temporary file meanwhile, or is computed again where there is no room for
            one, and the result is the same to the bit. None: a third of what is free, at most 3 GiB of main memory.
    """

    ridge: float = 1e-4
    scarce: int = 16
    positions: int = 20
    least: int = 12288
    rounds: int = 3
    turns: int = 2
    memory: int | None = None

    def __post_init__(self) -> None:
        least = {"ridge": 0, "scarce": 0, "positions": 1, "least": 1, "rounds": 0, "turns": 0, "memory": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            fits = isinstance(value, (int, float)) and value >= bound
            if not (fits or value is None):
                default = next(own.default for own in fields(self) if own.name == name)
                raise OptionError(
                    f"`LeastSquares` needs `{name}` >= {bound}; got {name}={value!r}. The default is {default}."
                )


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of a unit's solution beside the least error.

    Attributes:
        free_target: what its features should tell, where they are free.
        rank: that its weight is to have; None: any.
    """

    free_target: FreeTarget | None = None
    rank: int | None = None


ANYTHING = Asked()


@dataclass(frozen=True, eq=False)
class _Joined:
    """The samples of all calls of a unit on all batches, one below the other.

    Attributes:
        x, t, offset: see `Sample`.
        rectified: nothing but ReLUs follow on any of them.
        held: bool [places]: every second batch; of a single one every second position.
    """

    x: Blocks
    t: Blocks
    offset: Blocks | None
    rectified: bool
    held: Blocks

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> _Joined:
        x, t = blocks_of([own.x for own in samples]), blocks_of([own.t for own in samples])
        rectified = all(sample.rectified for sample in samples)
        return cls(x, t, offset_of(samples), rectified, _half(samples))

    def regression(self, group: int, outputs: slice, prior: Tensor, read: Tensor) -> Regression:
        """That of one group, of the inputs that are read; without a constant if the prior has no row for it."""
        offset = None if self.offset is None else self.offset.map(lambda own: own[:, outputs])
        constant = len(prior) > int(read.sum())
        x, t = self.x.map(lambda own: own[:, group]), self.t.map(lambda own: own[:, outputs])
        if not bool(read.all()):
            x = x.map(lambda own: own[:, read])
        return Regression(x, t, prior, offset, constant)


def blocks_of(values: Sequence[Tensor | Page]) -> Blocks:
    """What was drawn on each batch; what is made of it lies where it lies."""
    file = next((value.file for value in values if isinstance(value, Page)), None)
    return Blocks(len(values), lambda number: fetched(values[number]), file, lambda: [len(own) for own in values])


def offset_of(samples: Sequence[Sample]) -> Blocks | None:
    """What residual sums add, if they do on all samples."""
    offsets = [sample.offset for sample in samples if sample.offset is not None]
    return blocks_of(offsets) if len(offsets) == len(samples) else None


@dataclass(frozen=True, eq=False)
class Solved:
    """What came of one unit.

    Attributes:
        left: why it stays as it was zipped; "" where it was solved.
        weight: of a linear call with the BatchNorm behind it, float64 [groups, outputs, inputs]; of others the scale
            of each feature.
        bias: float64 [outputs], or the shift of each feature.
        factors: what the weight is made of where it has a rank, [rank, inputs] and [outputs, rank].
        lost: see `Fit`.
        raised: the ridge, where it had to grow.
    """

    left: str = ""
    weight: Tensor | None = None
    bias: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    lost: float | None = None
    raised: float | None = None


def solve(
    net: ZippedModule, unit: Unit, samples: Sequence[Sample], settings: Settings, asked: Asked = ANYTHING
) -> Solved:
    """Solve the regression of one unit. Nothing is changed."""
    joined = _Joined.of(samples)
    if unit.kernel is not None:
        return _solve_linear(net, unit, joined, settings, asked)
    scale, shift = affine_solution(
        joined.x, joined.t, settings.ridge, scaled=unit.scale is not None, shifted=unit.shift is not None
    )
    return Solved(weight=scale, bias=shift)


def write(net: ZippedModule, unit: Unit, solved: Solved, fit: Fit) -> None:
    """Write a solution into the parameters of its unit, and note what the report says of it."""
    weight, bias = solved.weight, solved.bias
    assert weight is not None
    assert bias is not None
    fit.fitted.append(unit.name)
    if unit.kernel is None:
        _write_affine(unit, weight, bias)
        return

    if solved.factors is not None:
        fit.factors[unit.sites[0].node] = Factors(*solved.factors)
    if solved.lost is not None:
        fit.lost[unit.name] = solved.lost
    if solved.raised is not None:
        fit.raised[unit.name] = solved.raised
    norm = _norm(net, unit)
    install(unit.kernel, norm, weight, bias)
    if unit.owner is not None and norm is None:
        like = unit.kernel.weight
        unit.owner.bias = nn.Parameter(bias.to(like), requires_grad=like.requires_grad)


def _norm(net: ZippedModule, unit: Unit) -> nn.Module | None:
    return called(net, unit.norm) if unit.norm is not None else None


def _write_affine(unit: Unit, scale: Tensor, shift: Tensor) -> None:
    """One scale and one shift for each feature."""
    if unit.scale is not None:
        unit.scale.mul_(scale.reshape(unit.scale.shape).to(unit.scale))
    if unit.shift is not None:
        unit.shift.copy_(
            scale.reshape(unit.shift.shape).to(unit.shift) * unit.shift + shift.reshape(unit.shift.shape).to(unit.shift)
        )


def _solve_linear(net: ZippedModule, unit: Unit, joined: _Joined, settings: Settings, asked: Asked) -> Solved:
    """x [places, groups, inputs], t [places, outputs]: one regression per group."""
    kernel, norm = unit.kernel, _norm(net, unit)
    assert kernel is not None
    flat, bias = effective(kernel, norm)
    groups, rows, inputs = flat.shape
    read = kernel.read
    rounds = settings.rounds if joined.rectified else 0
    constant = kernel.bias is not None or norm is not None or unit.owner is not None
    scarce = joined.x.rows < settings.scarce * int(read.sum())
    result = Solved(weight=flat, bias=bias)

    for g in range(groups):
        mine = slice(g * rows, (g + 1) * rows)
        own = flat[g][:, read].T
        regression = joined.regression(g, mine, torch.cat([own, bias[None, mine]]) if constant else own, read)
        given = settings.ridge
        if scarce:
            # Halves want more of it than the whole, and what it holds back adds up from call to call: a tenth. So what
            # is less than ten times as given need not be tried.
            tried = [given * 10**power for power in range(1, 5)]
            best = best_ridge(regression, tried, joined.held, rectified=rounds > 0)
            given = max(given, best / 10)

        solution, ridge, lost, factors = ridge_solution(
            regression, given, rounds=rounds, free_target=None if scarce else asked.free_target, turns=settings.turns,
            rank=asked.rank,
        )  # fmt: skip
        if factors is not None:
            first = factors[0].new_zeros(inputs, factors[0].shape[1])
            first[read] = factors[0]
            result = replace(result, factors=(first.T.contiguous(), factors[1].T.contiguous()))
        flat[g][:, read] = (solution[:-1] if constant else solution).T
        if constant:
            bias[mine] = solution[-1]
        if lost is not None:
            result = replace(result, lost=lost)
        if ridge > given:
            result = replace(result, raised=ridge)
    return result


def _half(samples: Sequence[Sample]) -> Blocks:
    """Every second batch; of a single one every second position. Bool [places]."""

    def half(number: int) -> Tensor:
        own, x = samples[number], fetched(samples[number].x)
        if own.batch is None:
            return torch.arange(len(x), device=x.device) % 2 == 1
        return x.new_full((len(x),), own.batch % 2, dtype=torch.bool)

    return Blocks(len(samples), half)
